"""The base of both servers: a device on a unix socket, for one peer at a time."""

from __future__ import annotations

import abc
import logging
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, Generic, TypeVar

from vring import MemoryWatch
from vring_serial.callbacks import Listener, tell
from vring_serial.errors import LocalProtocolError, ResourceError, StateError
from vring_serial.keeping import Keeping
from vring_serial.lifetime import Starting
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.transport.door import (
    DESCRIPTORS_PER_QUEUE,
    HANDSHAKE_SECONDS,
    OTHER_DESCRIPTORS,
    Door,
)
from vring_serial.transport.lost_memory import make_watch
from vring_serial.transport.pieces import forget_pieces
from vring_serial.transport.session import ENDED, SESSION, Session, SessionContext
from vring_serial.unix_fds import stream_socket

_PEER = "peer"

SessionT = TypeVar("SessionT", bound=Session[Any])


class Server(Starting, abc.ABC, Generic[SessionT]):
    """Serves a device on the unix socket ``path``, to one peer after another.

    Args:
        path: of the socket.
        protocol: its name, for log lines.
        peer: what a peer is called in them.
        listen: make the socket; False: connect to a peer that listens.
        queues: number of queues that a peer sets up.
        connected: the stream connection of the only peer that there will be, taken over; nobody
            listens or connects then, and ``path`` is a name for log lines.
        keeping: where what a successor of this process needs is kept, and what a predecessor left
            is found; None: there is no successor.

    Attributes:
        on_peer: called with "connected", "resumed" (the peer of a predecessor) and "gone". One
            listener at a time: setting another one raises LocalProtocolError, None removes it.
        connects: how often a peer was served, one of a predecessor's included.
    """

    on_peer = Listener[Callable[[str], None]]()
    #: Matches the roles in which sessions keep descriptors.
    _session_roles: ClassVar[re.Pattern[str]]

    def __init__(
        self,
        path: str,
        *,
        protocol: str,
        peer: str,
        listen: bool = True,
        queues: int,
        connected: socket.socket | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        self.connects = 0
        self._path = path
        self._name = f"{protocol} {path}"
        self._peer = peer
        self._door = Door(
            path,
            name=self._name,
            peer=peer,
            listen=listen,
            only=connected is not None,
            on_connected=self._serve,
            on_silent=self._send_silent_away,
            descriptors=DESCRIPTORS_PER_QUEUE * queues + OTHER_DESCRIPTORS,
            keeping=keeping,
        )
        self._keeping = keeping
        self._connected = connected
        self._resumes = False  # the peer that the door admits now is a predecessor's
        self._session: SessionT | None = None
        self._watch: MemoryWatch | None = None
        # One for all sessions: a peer can come as often as it likes.
        self._log = RateLimitedLog(logging.getLogger(type(self).__module__), burst=60, seconds=20)
        self._started = False

    @property
    def has_peer(self) -> bool:
        """Whether a peer is connected."""
        return self._session is not None

    def disconnect(self, why: str) -> bool:
        """End the session of the connected peer; return whether there was one."""
        if self._session is None:
            return False
        self._session.send_away(why)
        return True

    @property
    def unclosed(self) -> int:
        """Descriptors that peers sent and that cannot be closed yet; see Closer."""
        return self._door.closer.waiting

    async def start(self) -> None:
        """Listen, or begin to connect.

        Raises:
            ResourceError: the socket exists or cannot be made; the message names it and the reason.
            LocalProtocolError: started already, or another front or server has the device.
        """
        if self._started:
            raise LocalProtocolError(f"{self._name} is started already")
        self._check()
        self._watch = make_watch(self._name)
        try:
            self._door.open(self._take_peer())  # one that listens already comes at once
            self._attach()
        except BaseException:
            self._door.close()
            self._watch = None
            raise
        self._started = True

    async def aclose(self) -> None:
        """Send the peer away, remove the socket and leave the device. Safe to call twice."""
        self._started = False
        self._door.close()
        if self._connected is not None:
            self._connected.close()
            self._connected = None
        session, self._session = self._session, None
        try:
            if session is not None:
                session.close()
        finally:
            self._watch = None
            self._detach()

    # --- what a protocol adds

    def _check(self) -> None:
        """Raise LocalProtocolError if the device cannot be attached now."""

    @abc.abstractmethod
    def _attach(self) -> None:
        """Take the device."""

    @abc.abstractmethod
    def _detach(self) -> None:
        """Leave the device if it was taken."""

    @abc.abstractmethod
    def _make_session(self, sock: socket.socket, context: SessionContext) -> SessionT:
        """Serve the peer at ``sock``."""

    def _take_peer(self) -> socket.socket | None:
        """Return the connection of the only peer, or of the one that a predecessor left."""
        if self._connected is not None:
            connected, self._connected = self._connected, None
            connected.setblocking(False)
            return connected
        if self._keeping is None:
            return None
        if has_ended(self._keeping):
            self._forget_session(self._keeping)
            return None
        fd = self._keeping.take(_PEER)
        if fd is None:
            return None
        self._resumes = True
        peer = stream_socket(fd, listening=False)
        if peer is None:
            text = "%s: what was kept of the %s is no connection; its session ends"
            self._log.warning(text, self._name, self._peer)
            peer, other = socket.socketpair()  # one that has gone ends it in order
            other.close()
        peer.setblocking(False)
        return peer

    def _forget_session(self, keeping: Keeping) -> None:
        """Drop what a predecessor had not dropped yet when it died at the end of a session."""
        forget_pieces(keeping, self._door.closer)
        for role in keeping.roles():
            if role == _PEER or self._session_roles.fullmatch(role):
                fd = keeping.take(role)
                self._door.closer.close([-1 if fd is None else fd])
                keeping.drop(role)

    # --- what the door tells

    def _serve(self, sock: socket.socket) -> None:
        assert self._watch is not None
        resumed, self._resumes = self._resumes, False
        if self._keeping is not None and not resumed:
            self._keeping.write(SESSION, b"")  # what there is, is of the one before
            forget_pieces(self._keeping, self._door.closer)
            self._keeping.keep(_PEER, sock.fileno())
        context = SessionContext(
            name=self._name,
            log=self._log,
            watch=self._watch,
            closer=self._door.closer,
            greeted=self._door.greeted,
            ending=self._ending,
            ended=self._ended,
            keeping=self._keeping,
            resumed=resumed,
        )
        self._session = self._make_session(sock, context)
        self.connects += 1
        self._tell("resumed" if resumed else "connected")

    def _send_silent_away(self) -> None:
        if self._session is not None:
            self._session.send_away(
                f"no first words in {HANDSHAKE_SECONDS:g} s, and another one waits"
            )

    def _ending(self) -> None:
        if self._keeping is not None:
            with suppress(ResourceError):  # then a successor warns of what it does not find
                self._keeping.write(SESSION, ENDED)

    def _ended(self) -> None:
        self._session = None
        if self._keeping is not None:
            self._keeping.drop(_PEER)
        self._door.gone()
        self._tell("gone")

    def _tell(self, what: str) -> None:
        fields = {"socket": self._path, "state": what}
        extra = {"event": self._peer, "fields": fields}
        self._log.log(logging.INFO, "%s: %s %s", self._name, self._peer, what, extra=extra)
        tell(self._log, f"{self._name}: on_peer", self.on_peer, what)


def has_ended(keeping: Keeping) -> bool:
    """Return whether a predecessor's last session has ended, or was about to."""
    try:
        return keeping.read(SESSION) == ENDED
    except StateError:  # damaged: whoever goes on with the session says so
        return False
