"""The backend channel: what a backend asks of its frontend ("Back-end communication")."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable

from vring import Drained, drain
from vring_serial import unix_fds
from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.vhost_user import (
    U64,
    BackendRequest,
    Empty,
    Payload,
    VhostUserParser,
    VringState,
    request,
)
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.transport.closer import Closer

_debug = logging.getLogger(__name__).debug

_READ_SIZE = 4096


class BackendChannel:
    """Sends requests, each kind and queue at most once in waiting, and reads the acknowledgements.

    Args:
        fd: what SET_BACKEND_REQ_FD brought; taken over, but not on failure.
        acks: REPLY_ACK is negotiated: one request at a time, each acknowledged.
        name: for log lines.
        closer: closes ``fd``.
        log: gets log lines; one for all channels, of which a frontend can make any number.
        resumed: a predecessor had the channel, and may be owed an acknowledgement.

    Raises:
        RemoteProtocolError: ``fd`` is not a connected unix stream socket.
    """

    def __init__(
        self,
        fd: int,
        *,
        acks: bool,
        name: str,
        log: RateLimitedLog,
        closer: Closer,
        resumed: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._acks = acks
        self._name = name
        self._closer = closer
        self._parser = VhostUserParser(BackendRequest, replies=True)
        # A dict for its order: what is asked twice before it could be sent is sent once.
        self._waiting: dict[tuple[BackendRequest, Payload], None] = {}
        self._unacknowledged = False
        self._may_be_owed = resumed and acks
        self._log = log
        self._rest = b""
        self._sock = _stream_socket(fd)
        self._loop.add_reader(self._sock, self._readable)

    @property
    def closed(self) -> bool:
        """Return whether the channel has ended, by either side; its socket is closed."""
        return self._sock.fileno() < 0

    def config_changed(self) -> None:
        """Send CONFIG_CHANGE_MSG."""
        self._ask(BackendRequest.CONFIG_CHANGE_MSG, Empty())

    def vring_error(self, index: int) -> None:
        """Send VRING_ERR: the queue broke (in-band notifications)."""
        self._ask(BackendRequest.VRING_ERR, VringState(index))

    def vring_call(self, index: int) -> None:
        """Send VRING_CALL: buffers of the queue were used (in-band notifications)."""
        self._ask(BackendRequest.VRING_CALL, VringState(index))

    def close(self) -> None:
        """Close every descriptor. Safe to call twice."""
        if self._forget():
            self._closer.close_socket(self._sock)

    def leave(self) -> None:
        """Close, but not for another descriptor of the same socket."""
        if self._forget():
            self._closer.close([self._sock.detach()])

    def _forget(self) -> bool:
        """Use the socket no more; return whether it is open."""
        self._waiting.clear()
        if self.closed:
            return False
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        return True

    def _ask(self, kind: BackendRequest, payload: Payload) -> None:
        if not self.closed:
            self._waiting[kind, payload] = None
            self._send()

    def _send(self) -> None:
        try:
            while self._rest or (self._waiting and not self._unacknowledged):
                if not self._rest:
                    kind, payload = next(iter(self._waiting))
                    del self._waiting[kind, payload]
                    self._rest = request(kind, payload, need_reply=self._acks)
                    self._unacknowledged = self._acks
                self._rest = self._rest[unix_fds.send(self._sock, self._rest) :]
        except BlockingIOError:
            self._loop.add_writer(self._sock, self._send)
            return
        except OSError as error:
            self._fail(f"{error.strerror or error}")
            return
        self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        try:
            received = unix_fds.receive(self._sock, _READ_SIZE, 0)
            self._closer.close(received.fds)
            if not received.data:
                # As a rule the frontend itself is going.
                _debug("%s: the frontend closed its backend channel", self._name)
                self.close()
                return
            self._parser.receive_data(received.data)
            while (message := self._parser.next_message()) is not None:
                self._acknowledged(message.decode_reply(U64).value, message.name)
        except BlockingIOError:
            return
        except (OSError, RemoteProtocolError) as error:
            self._fail(f"{error}")
            return
        self._send()

    def _acknowledged(self, status: int, name: str) -> None:
        if not self._unacknowledged and self._may_be_owed:
            self._may_be_owed = False
            return
        if not self._unacknowledged:
            raise RemoteProtocolError(f"reply to {name}, which was not asked")
        self._unacknowledged = False
        if status:
            self._log.warning("%s: the frontend refused %s: status %d", self._name, name, status)

    def _fail(self, why: str) -> None:
        self._log.log(logging.INFO, "%s: backend channel: %s", self._name, why)
        self.close()


class CallRelay:
    """Turns calls that the device writes to descriptors into calls of a function.

    Args:
        called: gets the queue's index, in the loop's thread; calls that come fast come as one.
    """

    def __init__(self, called: Callable[[int], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._called = called
        self._fds: dict[int, int] = {}

    def descriptor(self, index: int) -> int:
        """Return a new descriptor for the queue's calls, owned by the caller."""
        if index not in self._fds:
            fd = self._fds[index] = unix_fds.make_eventfd()
            self._loop.add_reader(fd, self._readable, index, fd)
        return os.dup(self._fds[index])

    def close(self) -> None:
        """Close every descriptor. Safe to call twice."""
        for fd in self._fds.values():
            self._loop.remove_reader(fd)
            os.close(fd)
        self._fds.clear()

    def _readable(self, index: int, fd: int) -> None:
        if drain(fd) is Drained.READ:
            self._called(index)


def _stream_socket(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        raise RemoteProtocolError("its descriptor is not a socket") from None
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise RemoteProtocolError("its descriptor is not a unix stream socket")
    sock.setblocking(False)
    return sock
