"""A running ``vring serve --keeper`` whose worker a test kills."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.kept import worker_of
from tests.support.processes import end
from tests.support.waiting import until


class Kept:
    """A keeper and its worker.

    Attributes:
        process: the keeper.
    """

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def worker(self) -> int:
        """Its process id."""
        found = worker_of(self.process.pid)
        assert found is not None
        return found

    async def logged(self, text: str, count: int = 1) -> None:
        """Wait until the log contains ``text`` so many times."""
        await until(
            lambda: self.log.count(text) >= count, lambda: f"{text!r} {count} times in:\n{self.log}"
        )

    async def kill_worker(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Kill the worker, and wait until the next one serves."""
        served = self.log.count("serving;")
        os.kill(self.worker, number)
        await self.logged("serving;", served + 1)

    async def kill_until_anew(self) -> None:
        """Kill workers until the keeper does not believe in what they leave any more."""
        for _ in range(12):  # what was under way at the first deaths changes what is left
            await self.kill_worker()
            if "begins anew" in self.log:
                return
        raise AssertionError(self.log)

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the keeper a signal; return its exit status."""
        self.process.send_signal(number)
        return await self.process.wait()


@asynccontextmanager
async def kept(
    directory: Path,
    *arguments: str,
    socket: str = "v",
    ready: str = "serving;",
    stdin: int = asyncio.subprocess.DEVNULL,
    stdout: int | None = None,
    preexec_fn: Callable[[], object] | None = None,
) -> AsyncIterator[Kept]:
    """``vring serve --keeper`` in that directory, which ends with the block. Its log is ``log``."""
    log = directory / "log"
    with log.open("ab") as stream:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "vring_serial", "serve", "--keeper", "--vhost-user", socket),
            *arguments,
            cwd=directory,
            stdin=stdin,
            stdout=stdout,
            stderr=stream,
            start_new_session=True,
            preexec_fn=preexec_fn,
        )
        keeper = Kept(process, log)
        try:
            if ready:
                await keeper.logged(ready)
            yield keeper
        finally:
            await end(process, session=True)
