"""Descriptors that tell: made here, or come from a peer and not believed."""

from __future__ import annotations

import os
import socket
import stat

from vring_serial.errors import ProtocolError


def make_eventfd() -> int:
    """A non-blocking eventfd that counts nothing yet."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def check_event_descriptor(fd: int, *, writable: bool) -> None:
    """Make sure that a peer's kick, call, error or interrupt descriptor cannot stop us.

    The peer has the descriptor too and may do with it what it likes, at any time: a pipe, and a
    socket that is read, have locks that it can hold. Eventfds have none, and sending to a unix
    socket (User-Mode Linux has those for calls) takes none. See vring.notify and vring.drain.

    Raises:
        ProtocolError: it is no eventfd, or, if it is to be written to, unix socket.
    """
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind == 0 and os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]":
        return
    if not writable:
        raise ProtocolError("its descriptor is not an eventfd")
    if kind == stat.S_IFSOCK:
        with socket.socket(fileno=os.dup(fd)) as sock:
            if sock.family == socket.AF_UNIX:
                return
    raise ProtocolError("its descriptor is not an eventfd or a unix socket")
