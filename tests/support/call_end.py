"""Call descriptors as hostile peers have them."""

from __future__ import annotations

import os
import select
import socket
from contextlib import suppress

from tests.support.waiting import DEADLINE


class CallEnd:
    """A call descriptor, blocking as a hostile peer has it, and the driver's end of it.

    Attributes:
        fd: what the device is given.
    """

    #: An eventfd, and the kinds of unix sockets.
    KINDS = ("eventfd", "SOCK_STREAM", "SOCK_DGRAM", "SOCK_SEQPACKET")

    def __init__(self, kind: str) -> None:
        self._ends: tuple[socket.socket, socket.socket] | None = None
        if kind == "eventfd":
            self.fd = self._heard = os.eventfd(0)
        else:
            self._ends = socket.socketpair(socket.AF_UNIX, getattr(socket, kind))
            self._ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # soon full
            self.fd, self._heard = (end.fileno() for end in self._ends)

    def wait(self, timeout: float = DEADLINE) -> None:
        """Sleep until the device calls, as a driver does."""
        assert select.select([self._heard], [], [], timeout)[0], "no call"
        self.empty()

    def fill(self) -> None:
        """Leave no room, or that for a few calls."""
        if self._ends is None:
            self.empty()
            os.eventfd_write(self.fd, 2**64 - 16)  # a write of more could wait for room itself
            return
        with suppress(BlockingIOError):
            while True:
                self._ends[0].send(bytes(2048), socket.MSG_DONTWAIT)

    def empty(self) -> None:
        """Take all calls, and what filled it."""
        if self._ends is not None:
            self.received()
            return
        with suppress(BlockingIOError):
            os.preadv(self.fd, [bytearray(8)], -1, os.RWF_NOWAIT)

    def received(self) -> bytes:
        """All that waits in a socket."""
        assert self._ends is not None
        data = b""
        with suppress(BlockingIOError):
            while True:
                data += self._ends[1].recv(1 << 16, socket.MSG_DONTWAIT)
        return data

    def close(self) -> None:
        if self._ends is None:
            os.close(self.fd)
        else:
            for end in self._ends:
                end.close()
