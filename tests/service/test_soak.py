"""A service of two VMs with 64 ports, under everything that happens to one, for as long as it may.

``SOAK_SECONDS`` says how long; `make soak` an hour. Clients connect, stall and leave, guests are
reset, workers are killed, and the code is upgraded; every byte is checked, and at the end keeper
and workers have what they had at the start.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import signal
import sys
from collections import Counter
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.keeper import DEATHS, SERVING
from tests.support.processes import running
from tests.support.streams import pattern
from tests.support.vfio_guest import VfioGuest
from tests.support.waiting import until
from vring_serial import EmbeddedGuest

SECONDS = float(os.environ.get("SOAK_SECONDS", "3"))
#: Of each VM.
PORTS = 32
#: Ports of a guest in use at once, and bytes that go each way through one.
AT_ONCE = 8
MOST = 200_000
RAM = 192 << 20
#: Seconds between upgrades.
UPGRADE_SECONDS = 45.0
#: KiB of private memory that a process may have more at the end than at the start.
MORE = {"keeper": 1024, "worker": 6144}

VMS = {"a": "vhost-user", "b": "vfio-user"}


@dataclass
class Figures:
    """What was done, and what a process had.

    Attributes:
        counts: by what it is.
        at_start, at_end: of each process, by its role: descriptors, threads and KiB of memory.
    """

    counts: Counter[str] = field(default_factory=Counter)
    at_start: dict[str, tuple[Counter[str], int, int]] = field(default_factory=dict)
    at_end: dict[str, tuple[Counter[str], int, int]] = field(default_factory=dict)


def config():
    """The service's file."""
    lines = []
    for name, protocol in VMS.items():
        lines += [f"[vm.{name}]", f'{protocol} = "{name}"', f"max-ports = {PORTS + 1}"]
        for nr in range(1, PORTS + 1):
            chardev = f'backend = "socket", path = "{name}{nr}", server = true, wait = false'
            lines.append(f"chardev.c{nr} = {{ {chardev} }}")
        ports = [
            f'{{ chardev = "c{nr}", nr = {nr}, name = "p{nr}" }}' for nr in range(1, PORTS + 1)
        ]
        lines.append(f"port = [{', '.join(ports)}]")
    return "\n".join(lines)


def guest_of(name):
    if VMS[name] == "vhost-user":
        return EmbeddedGuest(name, memory=RAM)
    return VfioGuest(name, PORTS, memory=RAM)


def workers_of(keeper):
    return [int(pid) for pid in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()]


def what_it_has(pid):
    """Descriptors by kind, threads, and KiB that the process shares with nobody."""
    fds = Counter(os.readlink(fd).partition(":")[0] for fd in Path(f"/proc/{pid}/fd").iterdir())
    memory = Path(f"/proc/{pid}/smaps_rollup").read_text()
    private = sum(int(kib) for kib in re.findall(r"^Private_\w+: +(\d+) kB", memory, re.MULTILINE))
    return fds, len(os.listdir(f"/proc/{pid}/task")), private


async def what_all_have(keeper, expected=None):
    """What the processes have once the last guest is gone: what is expected, or twice the same."""
    found = []

    async def settled():
        with suppress(FileNotFoundError, ProcessLookupError):  # one is being closed, or has ended
            found.append(_what_all_have(keeper))
        await asyncio.sleep(0.2)
        wanted = expected or (held(found[-2]) if len(found) > 1 else None)
        return found and held(found[-1]) == wanted

    await until(settled, lambda: f"{expected} {found[-1:]}")
    return found[-1]


def held(all_have):
    """The same without memory."""
    return {role: has[:2] for role, has in all_have.items()}


def _what_all_have(keeper):
    found = {"keeper": what_it_has(keeper)}
    for number, pid in enumerate(sorted(workers_of(keeper))):
        found[f"worker {number}"] = what_it_has(pid)
    return found


async def transfer(reader, writer, length, at):
    """Send so many bytes of the pattern through a port and check what arrives."""

    async def send():
        sent = 0
        while sent < length:
            piece = pattern(at + sent, min(60_000, length - sent))
            writer.write(piece)
            await writer.drain()
            sent += len(piece)

    async def receive():
        received = 0
        while received < length:
            data = await reader.read(1 << 16)
            assert data, f"it ended after {received} of {length} bytes"
            assert data == pattern(at + received, len(data)), f"wrong after byte {received}"
            received += len(data)

    async with asyncio.TaskGroup() as group:
        group.create_task(send())
        group.create_task(receive())


async def session(name, guest, nr, chance, figures):
    """A client of one port, from when it connects until it leaves."""
    reader, writer = await asyncio.open_unix_connection(f"{name}{nr}")
    port = await guest.wait_port(name=f"p{nr}")
    await port.wait_host()
    guest_reader, guest_writer = await port.open()
    out, back, at = chance.randrange(MOST), chance.randrange(MOST), chance.randrange(1000)
    ways = [(reader, guest_writer, out), (guest_reader, writer, back)]
    if chance.random() < 0.3:  # nobody reads the second way before the first is done
        figures.counts["stalls"] += 1
        guest_writer.write(pattern(at, 70_000))
        await transfer(*ways[1], at)
        assert await reader.readexactly(70_000) == pattern(at, 70_000)
        await transfer(*ways[0], at)
    else:
        async with asyncio.TaskGroup() as group:
            for way in ways:
                group.create_task(transfer(*way, at))
    writer.close()
    assert await guest_reader.read() == b""
    guest_writer.close()
    figures.counts["sessions"] += 1
    figures.counts["bytes"] += out + back


async def boot(name, chance, figures):
    """One life of a guest: all of its ports are used, a few at once."""
    async with guest_of(name) as guest:
        numbers = chance.sample(range(1, PORTS + 1), PORTS)
        for first in range(0, PORTS, AT_ONCE):
            async with asyncio.TaskGroup() as group:
                for nr in numbers[first : first + AT_ONCE]:
                    group.create_task(session(name, guest, nr, chance, figures))
    figures.counts["resets"] += 1


class Serving:
    """Which VMs are served now, by the service's log, of which only what is new is read."""

    def __init__(self, log):
        self._log = log
        self._names = set()
        self._rest = b""

    def all(self):
        self._rest += self._log.read()
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            for name in VMS:
                if f" {name}: {SERVING}".encode() in line:
                    self._names.add(name)
                elif f" {name}: its worker ended".encode() in line:
                    self._names.discard(name)
        return len(self._names) == len(VMS)


async def kill_now_and_then(keeper, chance, figures, quiet, log):
    """Kill any worker at any moment; before each second one all serve.

    Five of a VM's in a row that have not served would end its session.
    """
    serving = Serving(log)
    for number in itertools.count():
        await asyncio.sleep(chance.random())
        async with quiet:
            if number % 2:
                await until(serving.all, "a worker serves")
            if workers := workers_of(keeper):
                with suppress(ProcessLookupError):
                    os.kill(chance.choice(workers), chance.choice(DEATHS))
                figures.counts["kills"] += 1
                await until(lambda: len(workers_of(keeper)) == len(VMS))


async def upgrade(figures, quiet):
    """Replace the code by the same one; return whether it did, which a busy machine may refuse."""
    async with quiet:
        async with running(
            *(sys.executable, "-m", "vring_serial", "upgrade", "--pid-file", "pid"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        ) as process:
            text, _ = await process.communicate()
        if process.returncode:
            assert b"did not serve within" in text, text
            figures.counts["upgrades refused"] += 1
            return False
        figures.counts["upgrades"] += 1
        return True


async def upgrade_now_and_then(figures, quiet):
    while True:
        await asyncio.sleep(UPGRADE_SECONDS)
        await upgrade(figures, quiet)


@asynccontextmanager
async def cancelled_at_the_end(*coroutines):
    """Run coroutines beside the block; what one raises ends it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
        yield
        for task in tasks:
            task.cancel()


@pytest.mark.timeout(200.0 + 2 * SECONDS)
async def test_a_service_stays_as_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # short socket paths
    Path("soak.toml").write_text(config())
    chance, figures, quiet = random.Random(SECONDS), Figures(), asyncio.Lock()
    log = Path("log")
    with log.open("wb") as stream, log.open("rb") as said:
        async with running(
            *(sys.executable, "-m", "vring_serial", "serve"),
            *("--config", "soak.toml", "--pid-file", "pid"),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=stream,
            start_new_session=True,
        ) as process:
            keeper = process.pid
            await until(lambda: log.read_text().count(SERVING) == len(VMS), log.read_text)
            while not await upgrade(figures, quiet):
                pass
            for name in VMS:
                await boot(name, chance, figures)
            figures.at_start = await what_all_have(keeper)
            end = asyncio.get_running_loop().time() + SECONDS

            async def live(name):
                while asyncio.get_running_loop().time() < end:
                    await boot(name, chance, figures)

            async with (
                cancelled_at_the_end(
                    kill_now_and_then(keeper, chance, figures, quiet, said),
                    upgrade_now_and_then(figures, quiet),
                ),
                asyncio.TaskGroup() as group,
            ):
                for name in VMS:
                    group.create_task(live(name))
            while not await upgrade(figures, quiet):  # it ends as it began
                pass
            for name in VMS:
                await boot(name, chance, figures)
            figures.at_end = await what_all_have(keeper, held(figures.at_start))
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    with capsys.disabled():
        print("", dict(figures.counts), figures.at_start, figures.at_end, sep="\n")
    assert "Traceback" not in log.read_text()
    assert "begins anew" not in log.read_text()
    for role, (_, _, memory) in figures.at_end.items():
        assert memory <= figures.at_start[role][2] + MORE[role.partition(" ")[0]], role
    assert sorted(os.listdir()) == ["log", "soak.toml"]
