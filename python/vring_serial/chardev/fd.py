"""The common part of file, pipe and stdio: descriptors opened at start, no peer to wait for."""

from __future__ import annotations

import abc
import asyncio
import logging
import os
from typing import ClassVar

from vring_serial.chardev.base import Chardev, DescriptorEnd
from vring_serial.chardev.kept import Kept
from vring_serial.chardev.relay import Relay

log = logging.getLogger(__name__)

MAX_RETRY_SECONDS = 30.0
#: Roles of descriptors (see Keeping).
INPUT, OUTPUT = "input", "output"


class FdChardev(Chardev):
    """A chardev whose end opens at ``start`` and lasts as long as its output works.

    At the end of its input the chardev continues without one: the end closes and opens again with
    ``read_fd`` -1. If the output fails, the end closes and, if `retry_seconds` is set, opens again
    later, so that a guest waits for a full disk instead of losing its output.

    A successor of a process that was killed goes on with the same open files, at their positions.
    """

    retry_seconds: ClassVar[float] = 0.0  # delay after the first error; 0: no retry
    kept: ClassVar[bool] = True  # the descriptors outlive the process that opened them

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self._input = -1
        self._output = -1
        self._started = False
        self._kept = Kept(None)
        self._relays = Kept(None)
        self._input_relay: Relay | None = None
        self._output_relay: Relay | None = None
        self._reopening: asyncio.Handle | None = None
        self._last_failure: tuple[int | None, float] | None = None
        self._delay = self.retry_seconds

    @abc.abstractmethod
    def _open_fds(self) -> None:
        """Open ``_input`` and ``_output``, which the chardev will close. Raises ResourceError."""

    def _fds_closing(self) -> None:
        """Prepare for closing the descriptors; also called after ``_open_fds`` raised."""

    async def start(self) -> None:
        if self._started:
            return
        try:
            self._kept = Kept(self.keeping if self.kept else None)
            self._relays = Kept(self.keeping)
            if self._kept.started_before:
                self._input, self._output = self._kept.take(INPUT), self._kept.take(OUTPUT)
            else:
                self._open_fds()
                self._kept.keep(INPUT, self._input)
                self._kept.keep(OUTPUT, self._output)
                self._kept.started()
            self._make_relays()
        except BaseException:
            self._release()
            raise
        self._started = True
        self._open()

    async def aclose(self) -> None:
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
            self._failed(reason, loop.time())
            if self.retry_seconds:
                self._reopening = loop.call_later(self._delay, self._open)

    def _open(self) -> None:
        self._reopening = None
        self._open_end(self._descriptors())

    def _descriptors(self) -> DescriptorEnd:
        return DescriptorEnd(
            read_fd=self._input,
            write_fd=self._output,
            kept=self.keeping is not None,
            read_relay=self._input_relay,
            write_relay=self._output_relay,
        )

    def _make_relays(self) -> None:
        """Make what the descriptors need and do not have. Raises ResourceError."""
        try:
            self._input_relay = self._input_relay or self._relays.relay(INPUT, self._input)
            self._output_relay = self._output_relay or self._relays.relay(OUTPUT, self._output)
        except OSError as error:
            raise self._error("make a pipe", error) from error

    def _input_ended(self) -> None:
        if self._input >= 0:
            self._kept.keep(INPUT, -1)
            os.close(self._input)
            self._input = -1
        relay, self._input_relay = self._input_relay, None
        self._relays.end_relay(INPUT, relay)

    def _failed(self, reason: OSError, now: float) -> None:
        """Log a new error; for one that a retry met again, only double the delay."""
        last, self._last_failure = self._last_failure, (reason.errno, now)
        if last is not None and last[0] == reason.errno and now - last[1] < 3 * self._delay:
            self._delay = min(2 * self._delay, MAX_RETRY_SECONDS)
            return
        self._delay = self.retry_seconds
        after = "; the guest waits until it works again" if self.retry_seconds else ""
        log.warning("chardev %s: %s: %s%s", self.id, self.description, reason.strerror, after)

    def _release(self) -> None:
        self._fds_closing()
        self._input_ended()
        if self._output >= 0:
            self._kept.keep(OUTPUT, -1)
            os.close(self._output)
            self._output = -1
        relay, self._output_relay = self._output_relay, None
        self._relays.end_relay(OUTPUT, relay)
