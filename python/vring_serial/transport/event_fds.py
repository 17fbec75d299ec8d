"""Check the event descriptors of peers, which are not to be trusted."""

from __future__ import annotations

import os
import socket

from vring_serial.errors import RemoteProtocolError, StateError

#: What :func:`describe` says of an eventfd.
EVENTFD = "anon_inode:[eventfd]"


def describe(fd: int) -> str:
    """Return the path, or the kernel's name for what has none; "" if ``fd`` is not open.

    Does not ask a file system, as fstat does: it may be the peer's, and never answer.
    """
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


def check_event_descriptor(fd: int, *, writable: bool) -> None:
    """Make sure that a peer's kick, call, error or interrupt descriptor cannot stop us.

    The peer has the descriptor too and may do with it what it likes, at any time: a pipe, and a
    socket that is read, have locks that it can hold. Eventfds have none, and sending to a unix
    socket (User-Mode Linux has those for calls) takes none. See vring.notify and vring.drain.

    Raises:
        RemoteProtocolError: it is no eventfd, or, if it is to be written to, unix socket.
    """
    what = describe(fd)
    if what == EVENTFD:
        return
    if not writable:
        raise RemoteProtocolError("its descriptor is not an eventfd")
    if what.startswith("socket:"):
        with socket.socket(fileno=os.dup(fd)) as sock:
            if sock.family == socket.AF_UNIX:
                return
    raise RemoteProtocolError("its descriptor is not an eventfd or a unix socket")


def check_kept(fd: int, role: str, *, writable: bool) -> None:
    """Do the same for what a predecessor of this process left in a role. Raises StateError."""
    try:
        check_event_descriptor(fd, writable=writable)
    except RemoteProtocolError as error:
        raise StateError(f"{role}: {error}") from None
