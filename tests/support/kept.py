"""``vring serve --keeper`` as a process, whose workers are killed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self

from tests.support.bench import Stream
from tests.support.processes import end
from tests.support.waiting import until

DEATHS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)


def worker_of(keeper: int) -> int | None:
    """The process id of a keeper's worker; None while there is none."""
    children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    return int(children[0]) if children else None


def held_by(pid: int) -> Counter[str]:
    """What a process has open, without what says only which one it is, and how many of each."""
    return Counter(os.readlink(fd).partition(":")[0] for fd in Path(f"/proc/{pid}/fd").iterdir())


class KeptServer:
    """A device with socket ports, each named and numbered; made by :meth:`start`.

    Args:
        directory: where its sockets and its log are.
        process: the keeper.

    Attributes:
        path: where the device is served.
        kills: workers that were killed so far.
    """

    def __init__(self, directory: Path, process: asyncio.subprocess.Process) -> None:
        self.path = directory / "vring.sock"
        self.kills = 0
        self._directory = directory
        self._process = process

    @classmethod
    async def start(cls, directory: Path, ports: tuple[int, ...], *options: str) -> Self:
        """Serve ports of these numbers, with further options of ``vring serve``."""
        words: list[str] = []
        for nr in ports:
            words += ["--chardev", f"socket,id=c{nr},path=c{nr},server=on,wait=off"]
            words += ["--port", f"chardev=c{nr},nr={nr},name=org.example.data{nr}"]
        with (directory / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "vring_serial", "serve", "--keeper"),
                *("--vhost-user", "vring.sock", *words, *options),
                cwd=directory,
                stdin=asyncio.subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        server = cls(directory, process)
        try:
            await until(lambda: "serving;" in server.log, lambda: server.log)
        except BaseException:
            await server.aclose()
            raise
        return server

    @property
    def log(self) -> str:
        """What keeper and workers said."""
        return (self._directory / "log").read_text()

    @property
    def held(self) -> tuple[Counter[str], Counter[str]]:
        """What the keeper has open, and its worker."""
        worker = worker_of(self._process.pid)
        assert worker is not None
        return held_by(self._process.pid), held_by(worker)

    async def connect(self, nr: int) -> Stream:
        """A stream to the host end of a port."""
        return await asyncio.open_unix_connection(self._directory / f"c{nr}")

    async def kill(self, number: int = signal.SIGKILL) -> None:
        """Kill the worker, and wait until there is another one."""
        victim = worker_of(self._process.pid)
        assert victim is not None
        with suppress(ProcessLookupError):
            os.kill(victim, number)
        await until(lambda: worker_of(self._process.pid) not in (None, victim), lambda: self.log)
        self.kills += 1

    @asynccontextmanager
    async def dying(self, chance: random.Random, pause: float = 0.4) -> AsyncIterator[None]:
        """Have workers killed at random moments while the block runs, ``pause`` apart at most."""
        enough = asyncio.Event()

        async def go_on_killing() -> None:
            while not enough.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(enough.wait(), chance.random() * pause)
                    return
                await self.kill(chance.choice(DEATHS))

        killing = asyncio.create_task(go_on_killing())
        try:
            yield
        finally:
            enough.set()
            await killing

    async def aclose(self) -> None:
        """End keeper and worker. Safe to call twice."""
        await end(self._process, session=True)
