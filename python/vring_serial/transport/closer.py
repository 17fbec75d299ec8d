"""Close descriptors that peers sent, without waiting for what closing them may take."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

from vring_serial import unix_fds
from vring_serial.transport.event_fds import EVENTFD, describe

#: Descriptors of one socket's peers that may wait for being closed.
MOST = 64
#: What a peer may have sent and nobody has read: looked through when a socket is closed.
_UNREAD_PIECES = 64
_PIECE = 64 * 1024


class Closer:
    """Closes the descriptors of one socket's peers.

    Closing may wait for ever: for a FUSE file system whose server does not answer, for a TCP
    connection that lingers, and for either in the queue of a unix socket. So what is not known to
    be harmless is closed in a thread, which may be lost. One descriptor that never closes keeps the
    next ones of its peers, and nobody else's; and it keeps the process from ending altogether, even
    when it is killed, until the file system's server has gone.

    Attributes:
        waiting: descriptors that are not closed yet.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: deque[int] = deque()
        self._runs = False

    @property
    def waiting(self) -> int:
        return len(self._left)

    @property
    def full(self) -> bool:
        """Return whether so many wait that their peers may send no more."""
        return len(self._left) > MOST

    def close(self, fds: Iterable[int]) -> None:
        """Close descriptors; -1 stands for none.

        Raises:
            OSError: one was not open (EBADF): a mistake of the caller's.
        """
        harmless: list[int] = []
        doubtful: list[int] = []
        for fd in fds:
            (harmless if fd < 0 or closes_at_once(fd) else doubtful).append(fd)
        self._close_later(doubtful)
        unix_fds.close_all(harmless)

    def close_socket(self, sock: socket.socket) -> None:
        """Close a connected stream socket, with the descriptors that wait in it."""
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
            for _ in range(_UNREAD_PIECES):
                unread = unix_fds.receive(sock, _PIECE, 0)
                self.close(unread.fds)
                if not unread.data:
                    sock.close()
                    return
        self._close_later([sock.detach()])

    def _close_later(self, fds: list[int]) -> None:
        with self._lock:
            self._left.extend(fds)
            if self._left and not self._runs:
                thread = threading.Thread(target=self._close_all, name="closer", daemon=True)
                with suppress(RuntimeError):  # no more threads: tried again with the next ones
                    thread.start()
                    self._runs = True

    def _close_all(self) -> None:
        while True:
            with self._lock:
                if not self._left:
                    self._runs = False
                    return
                fd = self._left[0]
            with suppress(OSError):
                os.close(fd)
            self._left.popleft()


def closes_at_once(fd: int) -> bool:
    """Return whether it is an eventfd, a pipe or memory (or not open, which closing will report).

    Nothing that is asked here waits for anybody.
    """
    what = describe(fd)
    if what in ("", EVENTFD) or what.startswith("pipe:"):
        return True
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # only memfd, tmpfs and hugetlbfs have them
        return True
    return False
