"""Noticing that a peer left while nobody reads from it.

A descriptor of an end may stay unread for as long as the guest keeps its port closed, so end of
file alone would be seen late or never. The kernel reports a hang-up apart from readability; this
watches for that and for nothing else, edge-triggered: bytes that wait unread never wake the event
loop.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import select
import termios
from collections.abc import Callable

# How often a peer that left unread bytes behind is looked at again, for the case that whoever read
# the last of them stopped before it saw the end of file.
RECHECK_SECONDS = 1.0

# For the guest to read what a peer sent before it left, when writing to that peer fails already.
LAST_WORDS_SECONDS = 5.0


def has_unread(fd: int) -> bool:
    """Whether bytes wait to be read; end of file and errors do not count as bytes."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    # The poll comes first because it makes a terminal deliver what is still on its way.
    if not any(mask & select.POLLIN for _, mask in poller.poll(0)):
        return False
    count = array.array("i", [0])
    try:
        fcntl.ioctl(fd, termios.FIONREAD, count)
    except OSError:
        return False
    return count[0] > 0


class LastWords:
    """Puts off the close of an end whose peer left unread bytes behind when a write to it failed.

    Args:
        close: called with the error when the time is over.
    """

    def __init__(self, close: Callable[[OSError], None]) -> None:
        self._close = close
        self._timer: asyncio.TimerHandle | None = None

    def remain(self, fd: int, reason: OSError | None) -> bool:
        """Whether to put it off: after an error, once, if ``fd`` has unread bytes."""
        if reason is None or self._timer is not None or not has_unread(fd):
            return False
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(LAST_WORDS_SECONDS, self._close, reason)
        return True

    def cancel(self) -> None:
        """The end is closed now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class HangupWatch:
    """Tells when the peer of a watched descriptor has gone and left no unread bytes.

    While unread bytes remain it waits, so that they can still be delivered. Uses one epoll
    descriptor.

    Args:
        on_hangup: called in the event loop with the descriptor, once for each :meth:`watch`.

    Raises:
        OSError: no descriptor is left.
    """

    def __init__(self, on_hangup: Callable[[int], None]) -> None:
        self._on_hangup = on_hangup
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._watched: set[int] = set()
        self._draining: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._epoll.fileno(), self._wake)

    def watch(self, fd: int) -> None:
        """Begin to watch; a descriptor that cannot hang up (a regular file) is left out."""
        try:
            # Hang-up and error are reported without being asked for.
            self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLET)
        except PermissionError:
            return
        self._watched.add(fd)

    def unwatch(self, fd: int) -> None:
        """Watch no longer, before the descriptor is closed; nothing if it is not watched."""
        if fd in self._watched:
            self._watched.discard(fd)
            self._draining.discard(fd)
            self._epoll.unregister(fd)

    def close(self) -> None:
        """Watch nothing any more. Safe to call twice."""
        if self._epoll.closed:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._watched.clear()

    def _wake(self) -> None:
        self._check([fd for fd, _ in self._epoll.poll(0)])

    def _recheck(self) -> None:
        self._timer = None
        self._check(list(self._draining))

    def _check(self, fds: list[int]) -> None:
        for fd in fds:
            if fd not in self._watched:  # an earlier callback of this round ended it
                continue
            if has_unread(fd):
                self._draining.add(fd)
            else:
                self.unwatch(fd)
                self._on_hangup(fd)
        if self._draining and self._timer is None and not self._epoll.closed:
            self._timer = self._loop.call_later(RECHECK_SECONDS, self._recheck)
