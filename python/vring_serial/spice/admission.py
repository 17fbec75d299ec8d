"""Connections that have not authenticated yet: how many there are, and for how long."""

from __future__ import annotations

import asyncio
import logging
import os
import socket

from vring_serial import accept
from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger("vring_serial.spice")

#: Connections that may be unauthenticated at once; one more, and the oldest is shut down.
UNAUTHENTICATED_MAX = 32
#: Seconds until a connection has to be authenticated. A client sends its password by itself.
HANDSHAKE_SECONDS = 10.0


class Admission:
    """Knows the connections that libspice-server has not admitted, and shuts idle ones down.

    The library owns their descriptors and closes them when it reads the end of the stream.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadlines: dict[int, asyncio.TimerHandle] = {}  # the oldest first
        self._said = RateLimitedLog(log, burst=5, seconds=60)

    def came(self, fd: int) -> None:
        """A connection was accepted on this descriptor."""
        self.left(fd)
        while len(self._deadlines) >= UNAUTHENTICATED_MAX:
            oldest = next(iter(self._deadlines))
            self._shut_down(oldest, f"{UNAUTHENTICATED_MAX} others wait for it too")
        why = f"{HANDSHAKE_SECONDS:g} s are over"
        self._deadlines[fd] = self._loop.call_later(HANDSHAKE_SECONDS, self._shut_down, fd, why)

    def admitted(self, fd: int) -> None:
        """The client on it has authenticated."""
        if (deadline := self._deadlines.pop(fd, None)) is not None:
            deadline.cancel()

    def left(self, fd: int) -> None:
        """The library has closed the descriptor, or is about to."""
        self.admitted(fd)
        accept.descriptor_freed()

    def close(self) -> list[int]:
        """Wait for none of them; returns the descriptors of those that were not admitted."""
        for deadline in self._deadlines.values():
            deadline.cancel()
        left = list(self._deadlines)
        self._deadlines.clear()
        return left

    def _shut_down(self, fd: int, why: str) -> None:
        self.admitted(fd)
        self._said.log(
            logging.INFO, "SPICE: a client that did not authenticate is cut off: %s", why
        )
        try:
            with socket.socket(fileno=os.dup(fd)) as copy:
                copy.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            log.debug("SPICE: shutdown: %s", error.strerror)
