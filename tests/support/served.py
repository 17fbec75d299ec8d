"""A running ``vring serve``, for the tests of what it does."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from tests.support.processes import end
from tests.support.waiting import until
from vring_serial.guest.guest import EmbeddedGuest

TIMEOUT = 20.0
NULL_PORT = ("--chardev", "null,id=n", "--port", "chardev=n")


class Server:
    """A running ``vring serve``.

    Attributes:
        lines: what it has logged so far.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.lines: list[str] = []
        self._process = process
        self._more = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())

    @property
    def pid(self) -> int:
        return self._process.pid

    async def _read(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            async with self._more:
                self.lines.append(line.decode().rstrip("\n"))
                self._more.notify_all()

    async def logged(self, text: str, count: int = 1) -> str:
        """Wait for the ``count``-th line that contains ``text``."""

        def found() -> list[str]:
            return [line for line in self.lines if text in line]

        try:
            async with asyncio.timeout(TIMEOUT), self._more:
                await self._more.wait_for(lambda: len(found()) >= count)
        except TimeoutError:
            log = "\n".join(self.lines)
            raise AssertionError(f"{text!r} was not logged {count} times:\n{log}") from None
        return found()[count - 1]

    async def exit_status(self) -> int:
        """Wait for the end."""
        async with asyncio.timeout(TIMEOUT):
            status = await self._process.wait()
            await self._reading
        return status

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        self._process.send_signal(number)
        return await self.exit_status()

    async def kill(self) -> None:
        await end(self._process, self._reading, session=True)


Serve = Callable[..., AbstractAsyncContextManager[Server]]


async def listening(path: Path) -> None:
    """Wait until a server listens there; __SO_ACCEPTCON is what tells that it does."""

    def listens() -> bool:
        lines = Path("/proc/net/unix").read_text().splitlines()
        return any(" 00010000 0001 01 " in line for line in lines if str(path) in line)

    await until(listens, f"nothing listens at {path}")


def guest_of(path: Path) -> EmbeddedGuest:
    return EmbeddedGuest(str(path), memory=32 << 20)


async def connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    async with asyncio.timeout(TIMEOUT):
        return await asyncio.open_unix_connection(str(path))


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()
