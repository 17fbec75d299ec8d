"""A vhost-user socket in the event loop: messages in, bytes with descriptors out."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence

from vring_serial import unix_fds
from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.vhost_user import MAX_FDS, Message, VhostUserParser

#: Bytes per read; a console's messages are far smaller.
READ_SIZE = 4096


class Channel:
    """Owns a non-blocking unix stream socket.

    Args:
        sock: belongs to the channel from now on.
        parser: takes the stream apart.
        on_message: takes each message and the descriptors in it; may raise RemoteProtocolError.
        on_lost: told once that the peer closed (None, or the OSError) or broke the protocol
            (RemoteProtocolError); the channel is not closed by then. Not told after :meth:`close`.
    """

    def __init__(
        self,
        sock: socket.socket,
        parser: VhostUserParser,
        on_message: Callable[[Message], None],
        on_lost: Callable[[Exception | None], None],
    ) -> None:
        self._sock = sock
        self._parser = parser
        self._on_message = on_message
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._writable: asyncio.Future[None] | None = None
        self._loop.add_reader(sock, self._readable)

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send all of ``data``, the descriptors with its first byte. Raises OSError."""
        rest = data
        while rest:
            rest, fds = rest[await self.send_some(rest, fds) :], ()

    async def send_some(self, data: bytes, fds: Sequence[int] = ()) -> int:
        """Send a part of ``data``, and all descriptors with it; returns how many bytes.

        Nothing is sent if the caller is cancelled. Raises OSError.
        """
        while True:
            try:
                return unix_fds.send(self._sock, data, fds)
            except BlockingIOError:
                await self._wait_writable()

    def send_now(self, data: bytes) -> None:
        """Send a short message. A peer that left no room for it does not read: it is lost."""
        try:
            if self._sock.send(data) == len(data):
                return
            self._lose(RemoteProtocolError("the peer does not read its replies"))
        except BlockingIOError:
            self._lose(RemoteProtocolError("the peer does not read its replies"))
        except OSError as error:
            self._lose(error)

    async def _wait_writable(self) -> None:
        self._writable = self._loop.create_future()
        self._loop.add_writer(self._sock, self._set_writable)
        try:
            await self._writable
        finally:
            self._writable = None
            if self._open:
                self._loop.remove_writer(self._sock)

    def _set_writable(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    def _readable(self) -> None:
        try:
            received = unix_fds.receive(self._sock, READ_SIZE, MAX_FDS)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            return
        if not received.data:
            self._lose(None)
            return
        try:
            self._parser.receive_data(received.data, received.fds)
            if received.truncated:
                raise RemoteProtocolError(
                    "more descriptors than a message may carry, or than fit here"
                )
            while self._open and (message := self._parser.next_message()) is not None:
                self._on_message(message)
        except RemoteProtocolError as error:
            self._lose(error)

    def _lose(self, error: Exception | None) -> None:
        if self._open:
            self._loop.remove_reader(self._sock)
            self._on_lost(error)

    def close(self) -> None:
        """Close the socket and whatever descriptors came with it. Safe to call twice."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        if self._writable is not None and not self._writable.done():
            self._writable.set_exception(BrokenPipeError("the connection was closed"))
        self._sock.close()
        unix_fds.close_all(self._parser.take_fds())
