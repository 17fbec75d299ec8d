"""What file, pipe and stdio have in common: descriptors opened at start, no peer to wait for."""

from __future__ import annotations

import abc
import asyncio
import logging
import os
from typing import ClassVar

from vring_serial.chardev.base import Chardev, DescriptorEnd

log = logging.getLogger(__name__)


class StreamChardev(Chardev):
    """A chardev whose end opens at ``start`` and lasts as long as its output works.

    When the input is at its end the chardev goes on without one: the end closes and opens again
    with ``read_fd`` -1. When the output fails, the end closes and, where a kind says so, opens
    again after a while, so that a guest waits for a full disk instead of losing what it writes.
    """

    retry_seconds: ClassVar[float] = 0.0  # after an error; 0 for never

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self._input = -1
        self._output = -1
        self._started = False
        self._reopening: asyncio.Handle | None = None
        self._reported: tuple[int | None, float] | None = None

    @abc.abstractmethod
    def _open_streams(self) -> None:
        """Set ``_input`` and ``_output`` to descriptors of our own. Raises ResourceError."""

    def _streams_closing(self) -> None:
        """The descriptors are about to be closed; also after ``_open_streams`` raised."""

    async def start(self) -> None:
        if self._started:
            return
        try:
            self._open_streams()
        except BaseException:
            self._release()
            raise
        self._started = True
        self._open()

    async def stop(self) -> None:
        self._started = False
        if self._reopening is not None:
            self._reopening.cancel()
            self._reopening = None
        self._close_end()
        self._release()

    def peer_gone(self, reason: OSError | None = None) -> None:
        if self.end is None:
            return
        self._close_end()
        loop = asyncio.get_running_loop()
        if reason is None:
            self._input_ended()
            self._reopening = loop.call_soon(self._open)
        else:
            self._report(reason, loop.time())
            if self.retry_seconds:
                self._reopening = loop.call_later(self.retry_seconds, self._open)

    def _open(self) -> None:
        self._reopening = None
        self._open_end(DescriptorEnd(read_fd=self._input, write_fd=self._output))

    def _input_ended(self) -> None:
        if self._input >= 0:
            os.close(self._input)
            self._input = -1

    def _report(self, reason: OSError, now: float) -> None:
        """Log an error, but not each time it is met again by trying again."""
        last, self._reported = self._reported, (reason.errno, now)
        if last is None or last[0] != reason.errno or now - last[1] > 5 * self.retry_seconds:
            after = f"; trying again every {self.retry_seconds:g} s" if self.retry_seconds else ""
            log.warning("chardev %s: %s: %s%s", self.id, self.description, reason.strerror, after)

    def _release(self) -> None:
        self._streams_closing()
        self._input_ended()
        if self._output >= 0:
            os.close(self._output)
            self._output = -1
