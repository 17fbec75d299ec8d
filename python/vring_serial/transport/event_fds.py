"""Descriptors that tell: made here, or come from a peer and not believed."""

from __future__ import annotations

import fcntl
import os
import stat

from vring_serial.errors import ProtocolError


def make_eventfd() -> int:
    """A non-blocking eventfd that counts nothing yet."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def check_event_descriptor(fd: int, *, writable: bool) -> None:
    """Make a peer's kick, call, error or interrupt descriptor fit to be waited for or written to.

    Raises:
        ProtocolError: it is no eventfd, pipe or socket, or is not open in that direction.
    """
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    eventfd = kind == 0 and os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    if not (eventfd or kind in (stat.S_IFIFO, stat.S_IFSOCK)):
        raise ProtocolError("its descriptor is not an eventfd, a pipe or a socket")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_ACCMODE not in (os.O_RDWR, os.O_WRONLY if writable else os.O_RDONLY):
        raise ProtocolError(f"its descriptor is not {'writable' if writable else 'readable'}")
    # A blocking one would stop the data plane when the peer does not read what it is told.
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)
