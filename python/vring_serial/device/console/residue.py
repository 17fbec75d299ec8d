"""The last bytes of a flow that ended before its descriptor took them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from vring import Backlog, recorded, send_recorded, set_record
from vring_serial.chardev.base import DescriptorEnd
from vring_serial.device.console.state import ChainState


class ResidueWriter:
    """Writes a residue to a non-blocking descriptor as it takes the bytes.

    Args:
        end: has the descriptor; open until :meth:`stop`.
        chain: has the residue, which is what is not written yet at any time.
        record: of what a socket took (``vring.send_recorded``), for a successor; None: none.
        on_written: called after some bytes were written that are not recorded.
        on_done: called, never from within the constructor, when all is written or with the error
            that prevents it. Call :meth:`stop` then too.
        backlog: has the residue too, and a successor finds it there, whatever was written: neither
            ``record`` nor ``on_written`` are used then. None: there is none.

    Attributes:
        taken: bytes that the descriptor has taken.
    """

    def __init__(
        self,
        end: DescriptorEnd,
        chain: ChainState,
        record: memoryview | None,
        on_written: Callable[[], None],
        on_done: Callable[[OSError | None], None],
        backlog: Backlog | None = None,
    ) -> None:
        self.taken = 0
        self._end = end
        self._fd = end.write_fd
        self._backlog = backlog
        self._chain = chain
        self._record = record
        self._on_written = on_written
        self._on_done = on_done
        self._loop = asyncio.get_running_loop()
        self._watching = False
        self._turn: asyncio.Handle | None = self._loop.call_soon(self._write)

    def stop(self) -> None:
        """Write no more."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        if self._watching:
            self._loop.remove_writer(self._fd)
            self._watching = False

    def _write(self) -> None:
        self._turn = None
        try:
            written = self._put(self._chain.residue)
        except BlockingIOError:
            if not self._watching:
                self._loop.add_writer(self._fd, self._write)
                self._watching = True
            return
        except OSError as error:
            self._on_done(error)
            return
        self.taken += written
        if self._backlog is None:
            self._chain.residue = self._chain.residue[written:]
            self._chain.gone += written
            if self._record is None:
                self._on_written()
        if not self._chain.residue:
            self._on_done(None)
        elif not self._watching:
            self._turn = self._loop.call_soon(self._write)

    def _put(self, data: bytes) -> int:
        """Write as much as fits, and return how much. Raises BlockingIOError, OSError."""
        if self._backlog is not None:
            try:
                relay = self._end.write_relay
                return self._backlog.write_to(self._fd, kept=self._end.kept, relay=relay)
            finally:  # it may have found out that a predecessor has written some
                self._chain.residue = self._backlog.data
        if self._record is None:
            return os.write(self._fd, data)
        if recorded(self._record)[0] != self._chain.number:
            set_record(self._record, self._chain.number, self._chain.gone)
        return send_recorded(self._fd, data, self._record)
