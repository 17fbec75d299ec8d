"""How the peer of a descriptor end leaves, with or without unread bytes.

A peer is in one of these states:

- present: both directions work.
- takes no more: a write failed (EPIPE), but the peer is connected and may send. The port stops
  writing to this end and keeps reading.
- leaving: the peer hung up, or a write failed, and bytes that it sent are unread. The end stays
  open for the guest to read them, for a time that depends on the kind of chardev (its *patience*).
- gone: nothing is unread, or the time is over. The end closes.

Three parts detect a change. The pump's flow from the host (``vring/_flow.pyx``) reads end of file
or an error; while the guest has no buffers, a hang-up ends it only if nothing is unread. The flow
to the host, or the writer of a residue, fails. :class:`HangupWatch` watches while nobody reads: a
guest may keep its port closed for long, so that end of file would be read late or never. The first
two reach the port, which marks that direction of the end as over (``device/console/direction.py``)
and calls ``Chardev.peer_gone``; there the chardev decides which state follows.

The kernel reports a hang-up separately from readability. The watch waits only for hang-ups,
edge-triggered: unread bytes never wake the event loop.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import math
import select
import termios
from collections.abc import Callable

# Interval at which a peer that left unread bytes is checked again, in case the reader of the last
# bytes stopped before it read the end of file.
RECHECK_SECONDS = 1.0

# Time for the guest to read what a peer sent before it left.
LAST_WORDS_SECONDS = 5.0

_ENTIRELY = select.POLLHUP | select.POLLERR


def _state(fd: int, events: int) -> int:
    """Return which of ``events`` a descriptor has, and always hang-up and errors."""
    poller = select.poll()
    poller.register(fd, events)
    return sum(mask for _, mask in poller.poll(0))


def unread(fd: int) -> int:
    """Return the number of bytes to read; end of file and errors do not count as bytes."""
    # The poll comes first because it makes a terminal deliver bytes in transit.
    if not _state(fd, select.POLLIN) & select.POLLIN:
        return 0
    count = array.array("i", [0])
    try:
        fcntl.ioctl(fd, termios.FIONREAD, count)
    except OSError:
        return 0
    return count[0]


def is_leaving(fd: int) -> bool:
    """Return whether a peer hung up, or shut down its sending side."""
    return bool(_state(fd, select.POLLRDHUP) & (select.POLLRDHUP | _ENTIRELY))


def _for_ever(_fd: int, _entirely: bool) -> float:
    return math.inf


class LastWords:
    """A delay before an end is closed whose peer left unread bytes when a write to it failed.

    Args:
        close: called with the error when the time is over.
        left: return how many bytes of a descriptor are unread.
    """

    def __init__(
        self, close: Callable[[OSError], None], left: Callable[[int], int] = unread
    ) -> None:
        self._close = close
        self._left = left
        self._timer: asyncio.TimerHandle | None = None

    def remain(self, fd: int, reason: OSError | None) -> bool:
        """Return whether the close is delayed: once, after an error, if ``fd`` has unread bytes."""
        if reason is None or self._timer is not None or not self._left(fd):
            return False
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(LAST_WORDS_SECONDS, self._close, reason)
        return True

    def cancel(self) -> None:
        """Stop waiting, since the end is closed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class HangupWatch:
    """A watch that reports when the peer of a descriptor is gone and has left no unread bytes.

    While unread bytes remain it waits for ``patience`` seconds, so that they can still be
    delivered. It needs one epoll descriptor.

    Args:
        on_hangup: called in the event loop with the descriptor, once for each :meth:`watch`.
        patience: called repeatedly with the descriptor and whether its peer hung up entirely;
            returns for how many seconds after the hang-up unread bytes keep the descriptor.
            Default: for ever.
        left: return how many bytes of a descriptor are unread.

    Raises:
        OSError: no descriptor is available.
    """

    def __init__(
        self,
        on_hangup: Callable[[int], None],
        patience: Callable[[int, bool], float] = _for_ever,
        left: Callable[[int], int] = unread,
    ) -> None:
        self._on_hangup = on_hangup
        self._left = left
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._watched: set[int] = set()
        self._condemned: set[int] = set()
        # For peers with unread bytes: whether they hung up entirely, and when that was detected.
        self._draining: dict[int, tuple[bool, float]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._epoll.fileno(), self._wake)

    def watch(self, fd: int) -> None:
        """Start to watch a descriptor; one that cannot hang up (a regular file) is ignored."""
        try:
            # Hang-up and error are always reported.
            self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLET)
        except PermissionError:
            return
        self._watched.add(fd)

    def unwatch(self, fd: int) -> None:
        """Stop watching, before the descriptor is closed; does nothing if it is not watched."""
        if fd in self._watched:
            self._watched.discard(fd)
            self._condemned.discard(fd)
            self._draining.pop(fd, None)
            self._epoll.unregister(fd)

    def condemn(self, fd: int) -> bool:
        """Treat the peer as hung up entirely, whatever the kernel reports.

        Returns:
            True if bytes are unread: ``on_hangup`` will be called, or was called if the time is
            over. False if there are none; then it is not called.
        """
        if not self._left(fd):
            return False
        self._condemned.add(fd)
        self._check([fd])
        return True

    def look_again(self) -> None:
        """Call ``patience`` again, in the next loop iteration."""
        self._loop.call_soon(self._recheck)

    def close(self) -> None:
        """Stop watching everything. May be called twice."""
        if self._epoll.closed:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._watched.clear()
        self._condemned.clear()
        self._draining.clear()

    def _wake(self) -> None:
        self._check([fd for fd, _ in self._epoll.poll(0)])

    def _time_is_up(self) -> None:
        self._timer = None
        self._recheck()

    def _recheck(self) -> None:
        self._check(list(self._draining))

    def _check(self, fds: list[int]) -> None:
        for fd in fds:
            if fd not in self._watched:  # an earlier callback of this round ended it
                continue
            if not self._left(fd) or self._waited_enough(fd):
                self.unwatch(fd)
                self._on_hangup(fd)
        if self._draining and self._timer is None and not self._epoll.closed:
            self._timer = self._loop.call_later(RECHECK_SECONDS, self._time_is_up)

    def _waited_enough(self, fd: int) -> bool:
        entirely = fd in self._condemned or bool(_state(fd, 0) & _ENTIRELY)
        now = self._loop.time()
        before, since = self._draining.get(fd, (entirely, now))
        if before != entirely:
            since = now
        self._draining[fd] = (entirely, since)
        return now - since >= self._patience(fd, entirely)
