"""Commands on a terminal of their own."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import sys
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.processes import end
from tests.support.waiting import DEADLINE, until


class Terminal:
    """A command with a terminal of its own, which it controls; made by :func:`on_terminal`.

    Attributes:
        data: all that was shown.
        process: the command's; ``setsid`` if it waits for it.
        found, left: the terminal's modes before the command, and after its end.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, master: int, slave: int, found: list[Any]
    ) -> None:
        self.data = bytearray()
        self.process = process
        self.found = found
        self.left: list[Any] = []
        self._master = master
        self._slave = slave
        self._more = asyncio.Event()
        self._ended = False
        asyncio.get_running_loop().add_reader(master, self._read)

    @property
    def text(self) -> str:
        """All that was shown."""
        return self.data.decode(errors="replace")

    def _read(self) -> None:
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # nobody has the other side any more
            data = b""
        self.data += data
        self._more.set()
        if not data:
            self._ended = True
            asyncio.get_running_loop().remove_reader(self._master)

    async def said(self, pattern: str) -> None:
        """Wait until that was shown."""
        try:
            async with asyncio.timeout(DEADLINE):
                while not re.search(pattern, self.text):
                    assert not self._ended, self.text
                    await self._more.wait()
                    self._more.clear()
        except TimeoutError:
            raise AssertionError(f"{pattern!r} was not said: {self.text[-4000:]!r}") from None

    async def shown(self, count: int) -> None:
        """Wait until so many bytes were shown in all."""
        await until(lambda: len(self.data) >= count, lambda: f"{len(self.data)} of {count}")

    def press(self, keys: bytes) -> None:
        """Type."""
        os.write(self._master, keys)

    def hold(self) -> None:
        """Show nothing more: what the command says stays with it."""
        asyncio.get_running_loop().remove_reader(self._master)

    def interrupt(self) -> None:
        """Type Ctrl-C."""
        self.press(b"\x03")

    def resize(self, cols: int, rows: int) -> None:
        """Give the terminal another size, of which the command is told."""
        termios.tcsetwinsize(self._master, (rows, cols))

    async def status(self) -> int:
        """Wait for the end of the command and of all that it says."""
        async with asyncio.timeout(DEADLINE):
            status = await self.process.wait()
        self._release()
        async with asyncio.timeout(DEADLINE):
            while not self._ended:
                await self._more.wait()
                self._more.clear()
        return status

    def _release(self) -> None:
        """Close the side that the command has; what was written is still shown."""
        if self._slave >= 0:
            self.left = termios.tcgetattr(self._slave)
            os.close(self._slave)
            self._slave = -1

    async def aclose(self) -> None:
        """End the command."""
        asyncio.get_running_loop().remove_reader(self._master)
        await end(self.process, session=True)
        self._release()
        os.close(self._master)


async def on_terminal(
    directory: Path,
    *arguments: str | Path,
    program: Sequence[str | Path] = (sys.executable, "-m", "vring_serial"),
    environment: Mapping[str, str] | None = None,
) -> Terminal:
    """Run ``vring``, or another program, on a terminal of 80 columns and 24 rows."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    found = termios.tcgetattr(slave)
    process = await asyncio.create_subprocess_exec(
        # The shell's terminal becomes the controlling one: Ctrl-C is for the command.
        *("setsid", "--ctty", "--wait", *program, *arguments),
        cwd=directory,
        env={**(environment or os.environ), "TERM": "xterm", "COLUMNS": "80"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    return Terminal(process, master, slave, found)
