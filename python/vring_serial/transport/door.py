"""Admit peers one at a time, through a socket that we listen on or that a peer listens on."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from vring_serial import accept
from vring_serial.accept import Acceptor
from vring_serial.keeping import Keeping
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.transport.closer import Closer
from vring_serial.unix_fds import stream_socket
from vring_serial.unix_socket import SocketPathError, UnixListener, encode_path

log = logging.getLogger(__name__)

#: Seconds between two attempts to connect.
RETRY_INTERVAL = 0.5
#: Seconds that a peer has for its first words while another one waits.
HANDSHAKE_SECONDS = 10.0
#: Seconds for a peer to set up its queues.
SETTLED_SECONDS = 30.0
#: Descriptors that a peer's queue needs: kick and call, and what the pump has of kick and host end.
DESCRIPTORS_PER_QUEUE = 4
#: Those that a peer needs beside: its socket, its memory, logs.
OTHER_DESCRIPTORS = 16

_LISTENER = "listener"


class Door:
    """Admits one peer after another; the next one waits in the backlog.

    Args:
        path: of the unix socket.
        name: for log lines.
        peer: what a peer is called in them.
        listen: make the socket and wait for peers; False: connect to a peer that listens, trying
            again until it does, and again when it has gone.
        only: admit the peer that :meth:`open` is given, and no other.
        on_connected: takes ownership of each peer's connected, non-blocking socket. The next peer
            is admitted after :meth:`gone`, or when ``on_connected`` raised.
        on_silent: called when :meth:`greeted` was not called in HANDSHAKE_SECONDS and another peer
            waits; must send the first one away. A peer that only waits for its user (a chardev of
            QEMU's that has no device yet) stays as long as nobody else comes. Where the peer
            listens nobody else can come.
        descriptors: number of descriptors that a peer needs; other listeners leave that many unused
            until SETTLED_SECONDS after a peer came.
        keeping: where the listening socket is kept for a successor of this process, or None.

    Attributes:
        closer: closes the descriptors of the peers. While there are too many that it cannot close,
            no peer comes.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str,
        peer: str,
        listen: bool = True,
        only: bool = False,
        on_connected: Callable[[socket.socket], None],
        on_silent: Callable[[], None],
        descriptors: int = 0,
        keeping: Keeping | None = None,
    ) -> None:
        self.closer = Closer()
        self._path = path
        self._name = name
        self._peer = peer
        self._only = only
        self._listens = listen and not only
        self._on_connected = on_connected
        self._on_silent = on_silent
        self._patience: asyncio.TimerHandle | None = None
        self._descriptors = descriptors
        self._settling: asyncio.TimerHandle | None = None
        self._listener: UnixListener | None = None
        self._acceptor: Acceptor | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._last_failure = ""
        self._log = RateLimitedLog(log, burst=20, seconds=60)
        self._open = False
        self._keeping = keeping

    def open(self, peer: socket.socket | None = None) -> None:
        """Listen, or begin to connect.

        Args:
            peer: the connection of a peer that a predecessor of this process admitted; taken over.

        Raises:
            SocketPathError: the socket exists or cannot be made.
            Exception: what ``on_connected`` raised for the only peer, which is closed.
        """
        if self._listens:
            self._listener = self._listen()
            log.info("%s: waiting for a %s", self._name, self._peer)
            self._acceptor = Acceptor(
                self._accepted, name=self._name, peer=self._peer, one_at_a_time=True
            )
            try:
                self._acceptor.open([self._listener.socket])
            except OSError as error:  # there is no room for one more to watch
                self.close()
                raise SocketPathError(self._path, error.strerror or str(error)) from None
        elif not self._only:
            encode_path(self._path)
        self._open = True
        self._reserve(self._descriptors)
        if peer is not None:
            self._admit(peer)
        elif not self._listens and not self._only:
            self._connect()

    def greeted(self) -> None:
        """Note that the peer has begun the protocol: the others wait until it has gone."""
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
            if self._listener is not None:
                asyncio.get_running_loop().remove_reader(self._listener.socket)

    def gone(self) -> None:
        """Note that the peer has gone: wait for the next one."""
        self.greeted()
        accept.descriptor_freed()
        if self._open:
            self._reserve(self._descriptors)
        self._next()

    def _next(self) -> None:
        if not self._open or self._only:
            return
        if self.closer.full:
            self._later(self._next, "descriptors that the last one sent cannot be closed")
        elif self._acceptor is not None:
            self._last_failure = ""
            self._acceptor.resume()
        else:
            # Not at once: a peer that closes every connection would keep the loop busy.
            self._connect_later("the last one has gone")

    def close(self) -> None:
        """Admit nobody more, and remove the socket that was made. Safe to call twice."""
        self._open = False
        self.greeted()
        self._reserve(0)
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _listen(self) -> UnixListener:
        inherited = None if self._keeping is None else self._keeping.take(_LISTENER)
        if inherited is not None:
            if (left := stream_socket(inherited, listening=True)) is not None:
                return UnixListener(self._path, inherited=left.detach())
            text = "%s: what was kept of its socket does not listen; it is made anew"
            self._log.warning(text, self._name)
        listener = UnixListener(self._path, descriptors=True)
        if self._keeping is not None:
            self._keeping.keep(_LISTENER, listener.socket.fileno())
        return listener

    def _admit(self, sock: socket.socket) -> None:
        """Admit a predecessor's peer; one that cannot be served makes room for the next."""
        if self._acceptor is not None:
            self._acceptor.pause()
        try:
            self._accepted(sock)
        except Exception as error:
            sock.close()
            if self._only:
                raise
            text = "%s: the session of the %s cannot go on: %s"
            self._log.warning(text, self._name, self._peer, f"{type(error).__name__}: {error}")
            self._next()

    def _accepted(self, sock: socket.socket) -> None:
        if self._listener is not None:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(HANDSHAKE_SECONDS, self._watch_for_another)
        try:
            self._on_connected(sock)
        except BaseException:
            self.greeted()
            raise
        self._settle()

    def _settle(self) -> None:
        """Release the reservation once the peer has had time to set up."""
        loop = asyncio.get_running_loop()
        self._settling = loop.call_later(SETTLED_SECONDS, accept.reserve, self, 0)

    def _reserve(self, count: int) -> None:
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None
        accept.reserve(self, count)

    def _watch_for_another(self) -> None:
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        loop.add_reader(self._listener.socket, self._another_waits, self._listener.socket)

    def _another_waits(self, listening: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(listening)
        self._on_silent()

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
        try:
            self._on_connected(sock)
        except Exception as error:
            sock.close()
            self._connect_later(f"{type(error).__name__}: {error}")
            return
        self._last_failure = ""
        self._settle()

    def _connect_later(self, why: str) -> None:
        self._later(self._connect, why)

    def _later(self, what: Callable[[], None], why: str) -> None:
        if why != self._last_failure:
            self._log.log(logging.INFO, "%s: no %s yet: %s", self._name, self._peer, why)
            self._last_failure = why
        loop = asyncio.get_running_loop()
        self._retry = loop.call_later(RETRY_INTERVAL, what)
