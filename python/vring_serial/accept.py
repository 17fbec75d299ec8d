"""Accepting connections: one piece for everything of ours that listens.

A process that has no descriptor left cannot accept. That is said once, tried ever less often, and
tried at once when something of ours has closed one (:func:`descriptor_freed`). Listeners that admit
any number of clients stop earlier, so that doors for frontends (:func:`reserve`) find descriptors.
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

#: Seconds without accepting after it failed; twice as long each time, up to the most.
PAUSE = 0.5
PAUSE_MOST = 8.0

#: What says that one connection is lost, or is not there: the next one may come (accept(2)).
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
    """Keep ``count`` descriptors for ``holder``; 0 needs them no more.

    Acceptors that yield leave that many, but never more than three quarters of all, unused.
    """
    if count:
        _reserved[holder] = count
    else:
        _reserved.pop(holder, None)


def descriptor_freed() -> None:
    """A descriptor is being closed: whoever could not accept tries in the next turn of its loop."""
    for acceptor in list(_waiting):
        acceptor.retry()


class Acceptor:
    """Accepts connections on listening sockets, in the running loop.

    Args:
        accepted: gets each connected, non-blocking socket, which it owns. If it raises, the socket
            is closed, that is logged, and accepting goes on after a pause.
        name: of the listener, for log lines.
        peer: what one who connects is called in them.
        one_at_a_time: stop after each connection, until :meth:`resume`.
        yields: leave descriptors that are reserved for others.
        take: accepts one connection itself and does all that is to be done with it; ``accepted``
            is not called then.
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
        # Out of descriptors, every connection that one frees may be followed by a failure.
        self._said = RateLimitedLog(log, burst=6, seconds=60)

    def open(self, sockets: Sequence[socket.socket]) -> None:
        """Accept on these, which stay the caller's and are closed after :meth:`close`."""
        self._sockets = list(sockets)
        self.resume()

    def close(self) -> None:
        """Accept no more. Safe to call twice."""
        self.pause()
        self._sockets.clear()

    def pause(self) -> None:
        """Accept none until :meth:`resume`; those who connect wait in the backlog."""
        self._forget_retry()
        self._unwatch()

    def resume(self) -> None:
        """Accept from now on, or still."""
        self._forget_retry()
        for sock in self._sockets:
            self._loop.add_reader(sock.fileno(), self._ready, sock)

    def retry(self) -> None:
        """Try in the loop's next turn if accepting failed; does nothing otherwise."""
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
            self._said.log(logging.INFO, "%s: accepts a %s again", self._name, self._peer)

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
        if why != self._told:  # said once, until one is accepted
            self._told = str(why)
            self._said.log(
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
    """Raises OSError if a descriptor more would leave fewer than are reserved."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = sum(_reserved.values())
    if not wanted or most == resource.RLIM_INFINITY:
        return
    # The lowest number that is free is given out first: all below are in use.
    lowest = os.dup(listening.fileno())
    os.close(lowest)
    if lowest + min(wanted, most * 3 // 4) >= most:
        raise OSError(errno.EMFILE, "the descriptors that are left are kept for frontends")
