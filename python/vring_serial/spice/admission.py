"""Limit the number and the age of SPICE connections that have not authenticated."""

from __future__ import annotations

import asyncio
import logging
import os
import socket

from vring_serial import accept
from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger("vring_serial.spice")

#: Unauthenticated connections at a time; one more shuts down the oldest.
UNAUTHENTICATED_MAX = 32
#: Seconds for a connection to authenticate. Clients send the password without asking a user.
HANDSHAKE_SECONDS = 10.0


class Admission:
    """Tracks connections that libspice-server has not authenticated, and shuts idle ones down.

    The library owns the descriptors and closes them when it reads end of file.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadlines: dict[int, asyncio.TimerHandle] = {}  # the oldest first
        self._log = RateLimitedLog(log, burst=5, seconds=60)

    @property
    def waiting(self) -> int:
        """Connections that have not authenticated."""
        return len(self._deadlines)

    def came(self, fd: int) -> None:
        """Track a new connection."""
        self.left(fd)
        while len(self._deadlines) >= UNAUTHENTICATED_MAX:
            oldest = next(iter(self._deadlines))
            self._shut_down(oldest, f"{UNAUTHENTICATED_MAX} others wait for it too")
        why = f"{HANDSHAKE_SECONDS:g} s are over"
        self._deadlines[fd] = self._loop.call_later(HANDSHAKE_SECONDS, self._shut_down, fd, why)

    def admitted(self, fd: int) -> None:
        """Stop tracking a connection: its client has authenticated."""
        if (deadline := self._deadlines.pop(fd, None)) is not None:
            deadline.cancel()

    def left(self, fd: int) -> None:
        """Stop tracking a connection whose descriptor the library closes."""
        self.admitted(fd)
        accept.descriptor_freed()

    def close(self) -> list[int]:
        """Stop tracking all connections; return those that have not authenticated."""
        for deadline in self._deadlines.values():
            deadline.cancel()
        left = list(self._deadlines)
        self._deadlines.clear()
        return left

    def _shut_down(self, fd: int, why: str) -> None:
        self.admitted(fd)
        self._log.log(logging.INFO, "SPICE: a client that did not authenticate is cut off: %s", why)
        try:
            with socket.socket(fileno=os.dup(fd)) as copy:
                copy.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            log.debug("SPICE: shutdown: %s", error.strerror)
