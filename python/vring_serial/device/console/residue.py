"""The last bytes of a flow that ended before its descriptor took them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable


class ResidueWriter:
    """Writes bytes to a non-blocking descriptor as it takes them.

    Args:
        fd: the descriptor; open until :meth:`stop`.
        data: the bytes.
        on_done: called, never from within the constructor, when all is written or with the error
            that prevents it. Call :meth:`stop` then too.
    """

    def __init__(self, fd: int, data: bytes, on_done: Callable[[OSError | None], None]) -> None:
        self._fd = fd
        self._data = data
        self._on_done = on_done
        self._loop = asyncio.get_running_loop()
        self._watching = False
        self._turn: asyncio.Handle | None = self._loop.call_soon(self._write)

    def stop(self) -> bytes:
        """Write no more; returns what is not written."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        if self._watching:
            self._loop.remove_writer(self._fd)
            self._watching = False
        data, self._data = self._data, b""
        return data

    def _write(self) -> None:
        self._turn = None
        try:
            self._data = self._data[os.write(self._fd, self._data) :]
        except BlockingIOError:
            if not self._watching:
                self._loop.add_writer(self._fd, self._write)
                self._watching = True
            return
        except OSError as error:
            self._on_done(error)
            return
        if not self._data:
            self._on_done(None)
        elif not self._watching:
            self._turn = self._loop.call_soon(self._write)
