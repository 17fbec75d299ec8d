"""When the peer of a descriptor end leaves, with bytes unread or without.

This is the one account of it. A peer is in one of these states:

- present: both directions work.
- takes no more: a write failed (EPIPE), but the peer is connected and may send. The port writes no
  more to this end and reads on.
- leaving: the peer hung up, or a write failed, and bytes that it sent are unread. The end stays for
  the guest to read them, for as long as its kind of chardev says (its *patience*).
- gone: nothing is unread, or patience is over. The end closes.

Three parts notice a change. The pump's flow from the host (``vring/_flow.pyx``) reads end of file
or an error; while the guest has no buffers, a hang-up ends it only if nothing is unread. The flow
to the host, or the writer of a residue, fails. :class:`HangupWatch` looks while nobody reads: the
guest may keep its port closed for long, so end of file alone would be seen late or never. The first
two reach the port, which marks that direction of the end as over (``device/console/direction.py``)
and calls ``Chardev.peer_gone``; there the chardev decides which state follows.

The kernel reports a hang-up apart from readability. The watch is for that and for nothing else,
edge-triggered: bytes that wait unread never wake the event loop.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import math
import select
import termios
from collections.abc import Callable

# How often a peer that left unread bytes behind is looked at again, for the case that whoever read
# the last of them stopped before it saw the end of file.
RECHECK_SECONDS = 1.0

# For the guest to read what a peer sent before it left.
LAST_WORDS_SECONDS = 5.0

_ENTIRELY = select.POLLHUP | select.POLLERR


def _state(fd: int, events: int) -> int:
    """Which of ``events`` a descriptor has; hang-up and errors are among them always."""
    poller = select.poll()
    poller.register(fd, events)
    return sum(mask for _, mask in poller.poll(0))


def unread(fd: int) -> int:
    """How many bytes wait to be read; end of file and errors do not count as bytes."""
    # The poll comes first because it makes a terminal deliver what is still on its way.
    if not _state(fd, select.POLLIN) & select.POLLIN:
        return 0
    count = array.array("i", [0])
    try:
        fcntl.ioctl(fd, termios.FIONREAD, count)
    except OSError:
        return 0
    return count[0]


def is_leaving(fd: int) -> bool:
    """Whether a peer hung up, entirely or its sending side alone."""
    return bool(_state(fd, select.POLLRDHUP) & (select.POLLRDHUP | _ENTIRELY))


def _for_ever(_fd: int, _entirely: bool) -> float:
    return math.inf


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
        if reason is None or self._timer is not None or not unread(fd):
            return False
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(LAST_WORDS_SECONDS, self._close, reason)
        return True

    def cancel(self) -> None:
        """Stop waiting, as the end is closed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class HangupWatch:
    """Tells when the peer of a watched descriptor has gone and left no unread bytes.

    While unread bytes remain it waits, so that they can still be delivered, for as long as
    ``patience`` says. Uses one epoll descriptor.

    Args:
        on_hangup: called in the event loop with the descriptor, once for each :meth:`watch`.
        patience: for how many seconds since the hang-up unread bytes keep a descriptor; asked with
            it, and with whether its peer hung up entirely, now and again. For ever if left out.

    Raises:
        OSError: no descriptor is left.
    """

    def __init__(
        self,
        on_hangup: Callable[[int], None],
        patience: Callable[[int, bool], float] = _for_ever,
    ) -> None:
        self._on_hangup = on_hangup
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._watched: set[int] = set()
        self._condemned: set[int] = set()
        # Whether the peer hung up entirely, and when that was noticed, of those with unread bytes.
        self._draining: dict[int, tuple[bool, float]] = {}
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
            self._condemned.discard(fd)
            self._draining.pop(fd, None)
            self._epoll.unregister(fd)

    def condemn(self, fd: int) -> bool:
        """Take the peer for gone entirely, whatever the kernel says.

        Returns:
            True if bytes are unread: ``on_hangup`` follows, or was called if patience has an end
            already. False if there are none; it is not called then.
        """
        if not unread(fd):
            return False
        self._condemned.add(fd)
        self._check([fd])
        return True

    def look_again(self) -> None:
        """Ask again, in the next loop iteration, how long to wait."""
        self._loop.call_soon(self._recheck)

    def close(self) -> None:
        """Watch nothing any more. Safe to call twice."""
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
            if not unread(fd) or self._waited_enough(fd):
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
