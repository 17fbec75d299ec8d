"""Closing what a worker gave the keeper, which may not wait for it and may have no thread.

A close can take for ever: for a file system whose server does not answer, for a TCP connection that
lingers, for either in the queue of a unix socket. Such a file system is even asked at each close,
while others still have the file open.
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import select
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

from vring._aside import close_aside
from vring._files import check_file_system
from vring.errors import MemoryMapError
from vring_serial.transport.closer import closes_at_once
from vring_serial.transport.event_fds import describe
from vring_serial.unix_fds import close_all

#: Milliseconds in which a close has usually ended long ago.
_USUAL = 20
#: Helpers of one worker that do not end: it stores what cannot be closed, and is ended.
MOST = 16


def may_be_kept(fd: int) -> bool:
    """Return whether nobody ever waits who closes one of several duplicates of it."""
    if closes_at_once(fd):
        return True
    try:
        check_file_system(fd, "")
    except MemoryMapError:
        return False
    return True


@dataclass(slots=True)
class _Helper:
    """A process that closes descriptors of this one.

    Attributes:
        pid: its id.
        fds: what it closes, in this order.
        begun: of how many of them the closing has begun, 4 bytes: those numbers are free again.
    """

    pid: int
    fds: list[int]
    begun: mmap.mmap

    @property
    def queued(self) -> list[int]:
        return self.fds[int.from_bytes(self.begun[:4], "little") :]


class Aside:
    """Closes one worker's descriptors, those that could take long in helper processes.

    A helper shares the descriptors of this process, and so it closes them for it.
    """

    def __init__(self) -> None:
        self._helpers: list[_Helper] = []
        self._unclosed: list[int] = []  # there was no process for them
        _all.add(self)

    @property
    def overdue(self) -> int:
        """How many helpers have not ended."""
        self._reap()
        return len(self._helpers)

    @property
    def pids(self) -> list[int]:
        """Process ids of the helpers, which are this object's to wait for."""
        return [helper.pid for helper in self._helpers]

    @property
    def queued(self) -> list[int]:
        """Descriptors that are still open and to be closed."""
        return [fd for helper in self._helpers for fd in helper.queued] + self._unclosed

    def close(self, fds: Iterable[int]) -> None:
        """Close descriptors, which are this object's from now on."""
        at_once: list[int] = []
        later, self._unclosed = self._unclosed, []
        for fd in fds:
            if closes_at_once(fd):
                at_once.append(fd)
            elif describe(fd).startswith("/"):
                self._help([fd])  # a fork would inherit it, if it were queued behind others
            else:
                later.append(fd)
        close_all(at_once)
        if later:
            self._help(later)
        self._reap()

    def _help(self, fds: list[int]) -> None:
        begun = mmap.mmap(-1, 4)
        try:
            with memoryview(begun).cast("I") as number:
                pid = close_aside(fds, number)
        except OSError:
            begun.close()
            self._unclosed += fds
            return
        self._helpers.append(_Helper(pid, fds, begun))
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                poll.poll(_USUAL)
            finally:
                os.close(pidfd)

    def _reap(self) -> None:
        for helper in list(self._helpers):
            if os.waitpid(helper.pid, os.WNOHANG)[0]:
                helper.begun.close()
                self._helpers.remove(helper)


_all: weakref.WeakSet[Aside] = weakref.WeakSet()


@atexit.register
def _leave_nothing_open() -> None:
    """Close all but what helpers have: they share what is open, and would keep it so."""
    if not any(aside.overdue for aside in _all):
        return
    theirs = {fd for aside in _all for fd in aside.queued}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in theirs:
            with contextlib.suppress(OSError):
                os.close(int(name))
