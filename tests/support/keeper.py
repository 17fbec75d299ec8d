"""``vring serve`` with its keeper as a process, whose workers a test kills."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from tests.support.bench import Stream
from tests.support.processes import running
from tests.support.waiting import until

DEATHS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)
#: What the log says when a worker is ready.
SERVING = "serving;"


def socket_ports(numbers: Iterable[int]) -> list[str]:
    """Return the arguments for ports of these numbers, each with a name and a socket."""
    words: list[str] = []
    for nr in numbers:
        words += ["--chardev", f"socket,id=c{nr},path=c{nr},server=on,wait=off"]
        words += ["--port", f"chardev=c{nr},nr={nr},name=org.example.data{nr}"]
    return words


def _held_by(pid: int) -> Counter[str]:
    """What a process has open, without what says only which one it is, and how many of each."""
    return Counter(os.readlink(fd).partition(":")[0] for fd in Path(f"/proc/{pid}/fd").iterdir())


def _is_monitor(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text() == "vring monitor\n"
    return False


class Kept:
    """A keeper and its worker; made by :func:`kept`.

    Attributes:
        process: the keeper.
        path: where the device is served.
        kills: workers that were killed so far.
    """

    def __init__(
        self, directory: Path, process: asyncio.subprocess.Process, path: Path, log: Path
    ) -> None:
        self.process = process
        self.path = path
        self.kills = 0
        self._directory = directory
        self._log = log
        self._served = self._in_a_row = 0  # workers that have, and kills since then

    @property
    def log(self) -> str:
        """What keeper and workers said."""
        return self._log.read_text()

    @property
    def children(self) -> list[int]:
        """The keeper's processes in the order in which they began."""
        keeper = self.process.pid
        children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        return [int(child) for child in children]

    def _worker(self) -> int | None:
        return next((child for child in self.children if not _is_monitor(child)), None)

    @property
    def worker(self) -> int:
        """Its process id."""
        found = self._worker()
        assert found is not None
        return found

    @property
    def monitor(self) -> int:
        """The process id of the monitor."""
        return next(child for child in self.children if _is_monitor(child))

    @property
    def held(self) -> tuple[Counter[str], Counter[str]]:
        """What the keeper has open, and its worker.

        What a worker tells its keeper may be on its way; when another worker begins, it is there.
        """
        return _held_by(self.process.pid), _held_by(self.worker)

    async def logged(self, text: str, count: int = 1) -> None:
        """Wait until the log contains ``text`` so many times."""
        await until(
            lambda: self.log.count(text) >= count, lambda: f"{text!r} {count} times in:\n{self.log}"
        )

    async def connect(self, nr: int) -> Stream:
        """Return a stream to the host end of one of the ``socket_ports``."""
        return await asyncio.open_unix_connection(self._directory / f"c{nr}")

    def kill_now(self, number: int = signal.SIGKILL) -> int:
        """Kill the worker; return its process id."""
        victim = self.worker
        with suppress(ProcessLookupError):
            os.kill(victim, number)
        self.kills += 1
        return victim

    async def replaced(self, victim: int) -> None:
        """Wait until there is another worker than this one."""
        await until(lambda: self._worker() not in (None, victim), lambda: self.log)

    async def kill(self, number: int = signal.SIGKILL) -> None:
        """Kill the worker, and wait until there is another one.

        Five in a row that have not served are given up, and how far a worker comes in a test's time
        is the machine's affair: of four, the last is waited for.
        """
        if (served := self.log.count(SERVING)) != self._served:
            self._served, self._in_a_row = served, 0
        if self._in_a_row == 3:
            await self.logged(SERVING, served + 1)
            self._served, self._in_a_row = served + 1, 0
        self._in_a_row += 1
        await self.replaced(self.kill_now(number))

    async def kill_until_served(self, number: int = signal.SIGKILL) -> None:
        """Kill the worker, and wait until the next one serves."""
        served = self.log.count(SERVING)
        self.kill_now(number)
        await self.logged(SERVING, served + 1)

    async def kill_of(self, victim: int) -> None:
        """Kill one of several workers, and wait until the next one serves."""
        served = self.log.count(SERVING)
        os.kill(victim, signal.SIGKILL)
        self.kills += 1
        await self.logged(SERVING, served + 1)

    async def kill_until_anew(self) -> None:
        """Kill workers until the keeper does not believe in what they leave any more."""
        for _ in range(12):  # what was under way at the first deaths changes what is left
            await self.kill_until_served()
            if "begins anew" in self.log:
                return
        raise AssertionError(self.log)

    @asynccontextmanager
    async def dying(self, chance: random.Random, pause: float = 0.4) -> AsyncIterator[None]:
        """Have workers killed at random moments while the block runs, ``pause`` apart at most.

        Each second one has served before: five in a row that have not are given up.
        """
        enough = asyncio.Event()

        async def go_on_killing() -> None:
            for kill in itertools.cycle((self.kill_until_served, self.kill)):
                with suppress(TimeoutError):
                    await asyncio.wait_for(enough.wait(), chance.random() * pause)
                    return
                await kill(chance.choice(DEATHS))

        killing = asyncio.create_task(go_on_killing())
        try:
            yield
        finally:
            enough.set()
            await killing

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the keeper a signal; return its exit status."""
        self.process.send_signal(number)
        return await self.process.wait()


@asynccontextmanager
async def kept(
    directory: Path,
    *arguments: str,
    protocol: str = "vhost-user",
    socket: str = "v",
    ready: str = SERVING,
    stdin: int = asyncio.subprocess.DEVNULL,
    stdout: int | None = None,
    preexec_fn: Callable[[], object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[Kept]:
    """Run ``vring serve`` with its keeper in a directory for a block.

    Args:
        directory: has the sockets and the log.
        arguments: further ones of the command.
        protocol, socket: how the device is served, and at which path; "config" and a file of VMs.
        ready: the log says so when the block can begin; empty: at once.
        stdin, stdout, preexec_fn, environment: of the process.
    """
    log = directory / "log"
    with log.open("ab") as stream:
        async with running(
            *(sys.executable, "-m", "vring_serial", "serve", f"--{protocol}", socket),
            *arguments,
            cwd=directory,
            stdin=stdin,
            stdout=stdout,
            stderr=stream,
            start_new_session=True,
            preexec_fn=preexec_fn,
            env=environment,
        ) as process:
            keeper = Kept(directory, process, directory / socket, log)
            if ready:
                await keeper.logged(ready)
            yield keeper
