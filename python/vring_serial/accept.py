"""Accept connections; every listener of the package uses this module.

A process without free descriptors cannot accept. :class:`Acceptor` logs this once, retries at
growing intervals, and retries immediately when the package closes a descriptor
(:func:`descriptor_freed`). Listeners that admit any number of clients stop earlier, so that
frontends (:func:`reserve`) always find free descriptors.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
from collections.abc import Callable, Sequence

from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger(__name__)

#: Seconds to wait after a failure; doubled each time, up to PAUSE_MOST.
PAUSE = 0.5
PAUSE_MOST = 8.0

#: Errors that concern a single connection; the next accept may succeed (accept(2)).
_PASSING = frozenset(
    (
        *(errno.EAGAIN, errno.EINTR, errno.ECONNABORTED, errno.EPROTO, errno.ENOPROTOOPT),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
        *(errno.ENONET, errno.EOPNOTSUPP),
    )
)

_waiting: set[Acceptor] = set()
_reserved: dict[object, int] = {}


def reserve(holder: object, count: int) -> None:
    """Reserve ``count`` descriptors for ``holder``; 0 releases them.

    Acceptors with ``yields`` leave the sum of all reservations unused, limited to three quarters
    of the process's descriptors.
    """
    if count:
        _reserved[holder] = count
    else:
        _reserved.pop(holder, None)


def reserved() -> int:
    """Return the sum of all reservations."""
    return sum(_reserved.values())


def descriptor_freed() -> None:
    """Make acceptors that failed retry in the next loop iteration: a descriptor gets closed."""
    for acceptor in list(_waiting):
        acceptor.retry()


class Acceptor:
    """Accepts connections on listening sockets, in the running loop.

    Args:
        accepted: takes ownership of each connected, non-blocking socket. If it raises, the socket
            is closed, the error is logged, and accepting continues after a pause.
        name: the listener's name in log lines.
        peer: what log lines call a connecting peer.
        one_at_a_time: stop after each connection, until :meth:`resume`.
        yields: leave reserved descriptors unused.
        take: accepts and handles one connection itself; replaces ``accepted``.
    """

    def __init__(
        self,
        accepted: Callable[[socket.socket], None] | None = None,
        *,
        name: str,
        peer: str,
        one_at_a_time: bool = False,
        yields: bool = False,
        take: Callable[[socket.socket], None] | None = None,
    ) -> None:
        self._accepted = accepted
        self._name = name
        self._peer = peer
        self._one_at_a_time = one_at_a_time
        self._yields = yields
        self._take = take or self._accept
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []
        self._retry: asyncio.Handle | None = None
        self._pause = 0.0  # that was last made; 0 after a success
        self._told = ""
        # While descriptors are scarce, each success may be followed by another failure.
        self._log = RateLimitedLog(log, burst=6, seconds=60)

    def open(self, sockets: Sequence[socket.socket]) -> None:
        """Accept on ``sockets``. The caller keeps them and closes them after :meth:`close`."""
        self._sockets = list(sockets)
        self.resume()

    def close(self) -> None:
        """Stop accepting. Safe to call twice."""
        self.pause()
        self._sockets.clear()

    def pause(self) -> None:
        """Stop accepting until :meth:`resume`; new connections wait in the backlog."""
        self._forget_retry()
        self._unwatch()

    def resume(self) -> None:
        """Accept connections, also if it did already."""
        self._forget_retry()
        for sock in self._sockets:
            self._loop.add_reader(sock.fileno(), self._ready, sock)

    def retry(self) -> None:
        """Retry in the next loop iteration if accepting failed; otherwise do nothing."""
        if self._retry is not None and not self._loop.is_closed():
            self._retry.cancel()
            self._retry = self._loop.call_soon_threadsafe(self.resume)

    def _ready(self, listening: socket.socket) -> None:
        try:
            if self._yields:
                _leave_reserve(listening)
            self._take(listening)
        except Exception as error:
            if not isinstance(error, OSError) or error.errno not in _PASSING:
                self._put_off(error)
            return
        self._pause = 0.0
        if self._told:
            self._told = ""
            self._log.log(logging.INFO, "%s: accepts a %s again", self._name, self._peer)

    def _accept(self, listening: socket.socket) -> None:
        sock, _ = listening.accept()
        sock.setblocking(False)
        if self._one_at_a_time:
            self._unwatch()
        assert self._accepted is not None
        try:
            self._accepted(sock)
        except BaseException:
            sock.close()
            raise

    def _put_off(self, error: Exception) -> None:
        expected = isinstance(error, OSError)
        why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        if why != self._told:  # log it once until the next success
            self._told = str(why)
            self._log.log(
                logging.WARNING if expected else logging.ERROR,
                "%s: cannot accept a %s: %s",
                *(self._name, self._peer, why),
                exc_info=None if expected else error,
            )
        self._unwatch()
        self._pause = min(2 * self._pause, PAUSE_MOST) or PAUSE
        self._forget_retry()
        self._retry = self._loop.call_later(self._pause, self.resume)
        _waiting.add(self)

    def _forget_retry(self) -> None:
        _waiting.discard(self)
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _unwatch(self) -> None:
        for sock in self._sockets:
            self._loop.remove_reader(sock.fileno())


def _leave_reserve(listening: socket.socket) -> None:
    """Raise OSError if one more descriptor would cut into the reserve."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = reserved()
    if not wanted or most == resource.RLIM_INFINITY:
        return
    # The kernel hands out the lowest free number, so all numbers below it are in use.
    lowest = os.dup(listening.fileno())
    os.close(lowest)
    if lowest + min(wanted, most * 3 // 4) >= most:
        raise OSError(errno.EMFILE, "the descriptors that are left are kept for frontends")
