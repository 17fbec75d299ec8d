"""File descriptors: sent and received over a unix stream socket, made and closed."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import resource
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Descriptors that the kernel lets one message have.
_SCM_MAX_FD = 253


@dataclass(frozen=True, slots=True)
class Received:
    """What one read brought.

    Attributes:
        data: the bytes; b"" means that the peer has gone.
        fds: descriptors that came with the last of them, close-on-exec, owned by the caller.
        truncated: the peer sent more descriptors than it may, or this process may not open as many
            and the kernel has closed those that are missing.
    """

    data: bytes
    fds: tuple[int, ...] = ()
    truncated: bool = False


def receive(sock: socket.socket, size: int, max_fds: int, *, peek: bool = False) -> Received:
    """Read up to ``size`` bytes, with the descriptors that came with them.

    Descriptors beyond ``max_fds`` are among those that are returned: the kernel would close what it
    had no room for, in this thread, and that may take for ever.

    With ``peek`` all of it stays in the socket as well; the descriptors are duplicates then.

    Raises:
        BlockingIOError: a non-blocking socket has nothing.
        OSError: the connection is broken.
    """
    room = socket.CMSG_SPACE(_SCM_MAX_FD * array.array("i").itemsize)
    # Not blocking by itself: who sent us the socket may have another opinion of it.
    how = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT | (socket.MSG_PEEK if peek else 0)
    data, ancillary, flags, _ = sock.recvmsg(size, room, how)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    truncated = bool(flags & socket.MSG_CTRUNC) or len(fds) > max_fds
    return Received(data, tuple(fds), truncated)


def stream_socket(fd: int, *, listening: bool) -> socket.socket | None:
    """Return a descriptor, which is taken over, as a socket; None if it is none of this kind."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        return None
    try:
        is_listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        is_listening = not listening
    if sock.type != socket.SOCK_STREAM or is_listening != listening:
        sock.close()
        return None
    return sock


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> int:
    """Send as much of ``data`` as fits, with descriptors beside its first byte.

    The descriptors stay the caller's.

    Returns:
        Bytes sent; the descriptors went with them if that is not 0.

    Raises:
        BlockingIOError: a non-blocking socket has no room.
        OSError: the connection is broken.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    return sock.sendmsg([data], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


#: A file, and how it was opened: two descriptors with the same do the same.
FileId = tuple[int, int, int]


def file_of(fd: int) -> FileId:
    """Return what tells the file of a descriptor from others. Raises OSError."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_PATH)


def make_eventfd() -> int:
    """Return a new eventfd: non-blocking, close-on-exec, its counter 0."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody wants; -1 stands for none.

    All of them, whatever becomes of one. What a peer's file says when it is closed is of no use
    to anybody (a file system of the peer's own may say anything).

    Raises:
        OSError: one was not open (EBADF): a mistake of the caller's.
    """
    failed: OSError | None = None
    for fd in fds:
        try:
            if fd >= 0:
                os.close(fd)
        except OSError as error:
            if error.errno == errno.EBADF:
                failed = failed or error
    if failed is not None:
        raise failed


def allow_descriptors() -> int:
    """Raise the limit of descriptors to the hard limit, and return it.

    Only select(2) needs the usual 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft
