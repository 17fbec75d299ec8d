"""A console that prints 10 MB/s, with three readers attached, one of them stopped.

The guest writes 64 KB at a time. Readers write to files, which have all that they were sent.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.support.keeper import kept
from tests.support.processes import running
from tests.support.waiting import until
from vring_serial import EmbeddedGuest

RATE = 10e6
SECONDS = 5.0
END = b"the end of it\n"
#: Bytes that are written at once; then the guest waits for its time.
BURST = 64_000
CONSOLE = ("--chardev", "console,id=con,path=c,scrollback=1M", "--console", "chardev=con,nr=1")


def _cpu(pid: int) -> float:
    """Processor time of a process, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _ended(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(END)))
        return file.read() == END


@pytest.mark.parametrize("readers", [0, 1, 3])
@pytest.mark.parametrize("rate", [RATE, None], ids=["10MB/s", "unlimited"])
def test_attached_readers(benchmark, tmp_path, monkeypatch, readers, rate):
    """Of three readers, the third is stopped."""
    monkeypatch.chdir(tmp_path)
    notes = {}
    command = (sys.executable, "-m", "vring_serial", "attach", "./c")

    async def run() -> None:
        async with AsyncExitStack() as stack:
            keeper = await stack.enter_async_context(kept(tmp_path, *CONSOLE))
            paths = [tmp_path / f"reader-{n}" for n in range(readers)]
            attached = []
            for path in paths:
                with path.open("wb") as file:
                    process = running(*command, stdin=asyncio.subprocess.DEVNULL, stdout=file)
                    attached.append(await stack.enter_async_context(process))
            await keeper.logged("a client attached", readers)
            guest = await stack.enter_async_context(EmbeddedGuest("v", memory=32 << 20))
            port = await guest.wait_port(nr=1)
            await port.wait_host()
            _, writer = await port.open()
            for process in attached[2:]:
                process.send_signal(signal.SIGSTOP)
            data = (b"." * 79 + b"\n") * (BURST // 80)
            before, first, sent = _cpu(keeper.worker), time.monotonic(), 0
            while (past := time.monotonic() - first) < SECONDS:
                if rate is not None and sent > past * rate:
                    await asyncio.sleep(0.001)
                    continue
                writer.write(data)
                sent += BURST
                await writer.drain()
            took = time.monotonic() - first
            notes["MB/s"] = sent / took / 1e6
            notes["worker's CPU %"] = 100 * (_cpu(keeper.worker) - before) / took
            writer.write(END)
            for path in paths[:2]:
                await until(lambda path=path: _ended(path))
            late = time.monotonic() - first - took
            shown = [path.stat().st_size / (sent + len(END)) for path in paths[:2]]
            notes["shown %"] = 100 * min(shown, default=0)
            notes["last line after ms"] = late * 1e3
            writer.close()

    benchmark.pedantic(lambda: asyncio.run(run()), rounds=1)
    what = f"{rate / 1e6:.0f} MB/s" if rate is not None else "as fast as it goes"
    benchmark.extra_info.update(workload=f"{readers} readers, {what}", **notes)
