"""Where peers come in, one at a time: a socket that we listen on, or that a peer listens on."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from vring_serial.unix_socket import UnixListener, encode_path

log = logging.getLogger(__name__)

#: Seconds between two attempts to connect.
RETRY_INTERVAL = 0.5
#: Seconds without accepting after the system refused a descriptor for a connection; twice as long
#: each time, up to the most.
ACCEPT_PAUSE = 1.0
ACCEPT_PAUSE_MOST = 8.0


class Door:
    """Lets one peer in after another; the next one waits in the backlog.

    Args:
        path: of the unix socket.
        name: for log lines.
        peer: what a peer is called in them.
        listen: make the socket and wait for peers; False: connect to a peer that listens, trying
            again until it does, and again when it has gone.
        came: gets each peer's connected, non-blocking socket, which it owns. The next peer comes
            after :meth:`gone`.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str,
        peer: str,
        listen: bool = True,
        came: Callable[[socket.socket], None],
    ) -> None:
        self._path = path
        self._name = name
        self._peer = peer
        self._listens = listen
        self._came = came
        self._listener: UnixListener | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._last_failure = ""
        self._accept_pause = 0.0  # that was last made; 0 after a success
        self._open = False

    def open(self) -> None:
        """Listen, or begin to connect.

        Raises:
            SocketPathError: the socket exists or cannot be made.
        """
        if self._listens:
            self._listener = UnixListener(self._path)
            log.info("%s: waiting for a %s", self._name, self._peer)
        else:
            encode_path(self._path)
        self._open = True
        self._next()

    def gone(self) -> None:
        """The peer has gone: wait for the next one."""
        if not self._open:
            return
        if self._listens:
            self._next()
        else:
            # Not at once: a peer that closes every connection would keep the loop busy.
            self._connect_later("the last one has gone")

    def close(self) -> None:
        """Let nobody in, and remove the socket that was made. Safe to call twice."""
        self._open = False
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.socket)
            self._listener.close()
            self._listener = None

    def _next(self) -> None:
        if self._listener is not None:
            loop = asyncio.get_running_loop()
            loop.add_reader(self._listener.socket, self._accept, self._listener)
        else:
            self._connect()

    def _accept(self, listener: UnixListener) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock, _ = listener.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if not self._accept_pause:  # said once, until one is accepted
                log.warning("%s: cannot accept a %s: %s", self._name, self._peer, error.strerror)
            self._accept_pause = min(2 * self._accept_pause, ACCEPT_PAUSE_MOST) or ACCEPT_PAUSE
            loop.remove_reader(listener.socket)
            self._retry = loop.call_later(self._accept_pause, self._next)
            return
        self._accept_pause = 0.0
        loop.remove_reader(listener.socket)
        sock.setblocking(False)
        self._came(sock)

    def _connect(self) -> None:
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            self._connect_later(error.strerror or str(error))
            return
        try:
            # A unix socket connects at once or not at all.
            sock.connect(self._path)
        except OSError as error:
            sock.close()
            self._connect_later(error.strerror or str(error))
            return
        self._last_failure = ""
        self._came(sock)

    def _connect_later(self, why: str) -> None:
        if why != self._last_failure:
            log.info("%s: no %s yet: %s", self._name, self._peer, why)
            self._last_failure = why
        loop = asyncio.get_running_loop()
        self._retry = loop.call_later(RETRY_INTERVAL, self._connect)
