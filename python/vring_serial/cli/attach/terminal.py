"""The terminal of ``vring attach``: raw while it lasts, and as it was found afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import termios
from collections.abc import Callable
from typing import Any

from vring_serial.chardev.terminal import set_raw, terminal_size
from vring_serial.lifetime import Closing

_INPUT, _OUTPUT, _ERROR = 0, 1, 2
_READ_MAX = 1 << 16


class Terminal(Closing):
    """Standard input and output, which may also be files and pipes.

    Attributes:
        is_interactive: standard input is a terminal, somebody's keyboard.
        shows: standard output is a terminal.
    """

    def __init__(self) -> None:
        self.is_interactive = os.isatty(_INPUT)
        self.shows = os.isatty(_OUTPUT)
        self._output = self._own_output()
        self._saved: list[Any] | None = None

    def close(self) -> None:
        """Let go of the terminal, as it was found."""
        self.put_back(b"")
        if self._output != _OUTPUT:
            os.close(self._output)
            self._output = _OUTPUT

    def put_back(self, undo: bytes) -> None:
        """Put the terminal back as it was found.

        Args:
            undo: puts in order what output has done to it.
        """
        if self.shows and undo:
            with contextlib.suppress(OSError):  # it has hung up, or is held (Ctrl-S)
                os.write(self._output, undo + b"\r\n")
        if self._saved is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(_INPUT, termios.TCSANOW, self._saved)
            self._saved = None

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows in characters; zeros if there is no terminal."""
        return (terminal_size(_OUTPUT) if self.shows else None) or (0, 0)

    def set_raw(self) -> None:
        """Pass every key on; called again after somebody else has set the terminal's modes."""
        if self.is_interactive:
            if self._saved is None:
                self._saved = termios.tcgetattr(_INPUT)
            set_raw(_INPUT)

    async def read(self) -> bytes:
        """Return what came next on standard input; nothing at its end."""
        try:
            await self._ready(_INPUT, asyncio.get_running_loop().add_reader)
        except PermissionError:  # a regular file: it is always ready
            await asyncio.sleep(0)
        try:
            return os.read(_INPUT, _READ_MAX)
        except BlockingIOError:
            return await self.read()
        except OSError:  # the terminal has hung up
            return b""

    async def write(self, data: bytes) -> None:
        """Write all of ``data`` to standard output. Raises OSError if nobody reads it any more."""
        while data:
            try:
                data = data[os.write(self._output, data) :]
            except BlockingIOError:
                await self._ready(self._output, asyncio.get_running_loop().add_writer)

    def say(self, text: str) -> None:
        """Write a line of this program's own to standard error."""
        line = f"\r\n[vring: {text}]\r\n" if os.isatty(_ERROR) else f"vring: {text}\n"
        with contextlib.suppress(OSError):
            os.write(_ERROR, line.encode())

    @staticmethod
    async def _ready(fd: int, add: Callable[..., None]) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()

        def is_ready() -> None:
            if not ready.done():
                ready.set_result(None)

        add(fd, is_ready)
        try:
            await ready
        finally:
            (loop.remove_reader if add == loop.add_reader else loop.remove_writer)(fd)

    def _own_output(self) -> int:
        """Return a descriptor for standard output that never blocks, where there can be one.

        O_NONBLOCK belongs to the open file, which the shell has too, so it is opened again.
        """
        if self.shows or stat.S_ISFIFO(os.fstat(_OUTPUT).st_mode):
            with contextlib.suppress(OSError):
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                return os.open(f"/proc/self/fd/{_OUTPUT}", flags)
        return _OUTPUT
