"""One connected agent channel on an asyncio transport: what both of its ends need, and the router.

Sending has an order: a message takes its turn behind the one that is being streamed, and nothing is
written while the transport asks to pause, so what waits in memory stays bounded either way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable
from typing import Protocol, cast

from vring_serial.agent.errors import AgentError, AgentGoneError, AgentTimeoutError
from vring_serial.proto.agent import (
    NEED_DATA,
    AgentConnection,
    AgentProtocolError,
    BodyEnded,
    BodyReceived,
    BodyStarted,
    Buffer,
    ChunkError,
    ChunkPort,
    ClientDisconnected,
    Event,
    Message,
    MessageError,
    MessageReceived,
    Side,
    StreamedMessage,
    TypedMessage,
    UnknownMessage,
)

QUEUE_MAX = 1024
"""Short messages that may wait for a peer that does not read; one more and the link is given up."""


class BodySink(Protocol):
    """Takes the payload of one streamed message."""

    def feed(self, data: Buffer) -> None:
        """The next bytes."""

    def end(self, complete: bool) -> None:
        """No more follows; ``complete`` says whether all came."""


class LinkOwner(Protocol):
    """What a link tells the one who uses it. All calls come from the event loop's thread."""

    def link_up(self, link: AgentLink) -> None:
        """The link can be written to."""

    def link_down(self, link: AgentLink, reason: Exception | None) -> None:
        """The link is closed. ``reason`` is None for an orderly end."""

    def link_message(
        self, link: AgentLink, port: int, message: TypedMessage | UnknownMessage
    ) -> None:
        """A whole message arrived."""

    def link_body(
        self, link: AgentLink, port: int, head: StreamedMessage, size: int
    ) -> BodySink | None:
        """A long message begins; None discards its payload."""

    def link_trouble(self, link: AgentLink, error: AgentProtocolError) -> None:
        """The peer sent a wrong message. After a ChunkError the link goes down."""


class AgentLink(asyncio.Protocol):
    """One connection of an agent channel.

    Args:
        side: which end of the channel we are.
        owner: told of everything that happens.
        stall_timeout: seconds for which a peer may leave what was sent unread before the link is
            given up; None for ever, which suits a guest that may be paused.
    """

    def __init__(self, side: Side, owner: LinkOwner, *, stall_timeout: float | None = None) -> None:
        self.connection = AgentConnection(side)
        self._stall_timeout = stall_timeout
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._sinks: dict[int, BodySink | None] = {}
        self._queues: dict[int, deque[Message]] = {port: deque() for port in ChunkPort}
        self._turns = {port: asyncio.Lock() for port in ChunkPort}
        self._streaming: set[int] = set()
        self._paused = False
        self._resumed: asyncio.Future[None] | None = None
        self._readers_waiting = 0
        self._reason: Exception | None = None
        self._closing = False

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._owner.link_up(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        reason = self._reason or exc
        if reason is None and not self._closing and self.connection.inside_message:
            reason = AgentGoneError("the agent channel closed in the middle of a message")
        for port in list(self._sinks):
            self._end_sink(port, complete=False)
        for queue in self._queues.values():
            queue.clear()
        self._wake()
        self._owner.link_down(self, reason)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()
        if not self._paused:
            self._wake()

    def data_received(self, data: bytes) -> None:
        connection = self.connection
        connection.receive_data(data)
        while self.is_open:
            try:
                event = connection.next_event()
            except MessageError as error:
                self._owner.link_trouble(self, error)
                continue
            except ChunkError as error:
                self._owner.link_trouble(self, error)
                self.fail(error)
                return
            if event is NEED_DATA:
                return
            self._dispatch(event)

    def _dispatch(self, event: Event) -> None:
        if isinstance(event, MessageReceived):
            self._owner.link_message(self, event.port, event.message)
        elif isinstance(event, BodyStarted):
            self._sinks[event.port] = self._owner.link_body(
                self, event.port, event.head, event.size
            )
        elif isinstance(event, BodyReceived):
            sink = self._sinks.get(event.port)
            if sink is not None:
                sink.feed(event.data)
        elif isinstance(event, BodyEnded):
            self._end_sink(event.port, event.complete)

    def _end_sink(self, port: int, complete: bool) -> None:
        sink = self._sinks.pop(port, None)
        if sink is not None:
            sink.end(complete)

    # --- the way out

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def post(self, message: Message, port: ChunkPort = ChunkPort.CLIENT) -> None:
        """Send a short message as soon as its turn comes; nothing happens on a closed link."""
        if not self.is_open:
            return
        queue = self._queues[port]
        if port not in self._streaming and not self._paused and not queue:
            self._write(self.connection.send(message, port))
        elif len(queue) < QUEUE_MAX:
            queue.append(message)
        else:
            self.fail(AgentError(f"the other end left {QUEUE_MAX} messages unread"))

    async def send(self, message: Message, port: ChunkPort = ChunkPort.CLIENT) -> None:
        """Send a message when the peer takes it. Raises AgentGoneError if the link closes first."""
        async with self._turns[port]:
            await self._writable()
            self._write(self.connection.send(message, port))

    async def send_body(
        self,
        head: StreamedMessage,
        size: int,
        source: AsyncIterable[Buffer],
        port: ChunkPort = ChunkPort.CLIENT,
    ) -> None:
        """Send a message whose payload of ``size`` bytes comes from ``source`` piece by piece.

        Messages for the other port go between the pieces. If the source fails, ends early or the
        task is cancelled, the message cannot be completed truthfully: the host then says that its
        client disconnected, which makes the agent drop the half message, and reports the link as up
        again; the guest closes the link, and so does the host if it was a message of the server's.
        Raises AgentGoneError, AgentError if the source has more or fewer bytes than ``size``, and
        whatever the source raises.
        """
        async with self._turns[port]:
            await self._writable()
            self._streaming.add(port)
            self._write(self.connection.start_body(head, size, port))
            try:
                async for piece in source:
                    await self._writable()
                    if len(piece) > self.connection.body_left(port):
                        raise AgentError(f"the source has more than the {size} bytes announced")
                    self._write(self.connection.send_body(piece, port))
                if self.connection.body_left(port):
                    raise AgentError(f"the source has fewer than the {size} bytes announced")
            except BaseException:
                if self.connection.body_left(port):
                    self._drop_body(port)
                raise
            finally:
                self._streaming.discard(port)
                self._flush()

    def _drop_body(self, port: ChunkPort) -> None:
        if not self.is_open:
            return
        if self.connection.side is Side.GUEST or self.connection.body_left(ChunkPort.SERVER):
            self.fail(AgentError("a message could not be completed"))
            return
        self._queues[port].clear()
        self._streaming.discard(port)
        self._write(self.connection.send(ClientDisconnected(), ChunkPort.SERVER))
        self._owner.link_up(self)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _flush(self) -> None:
        for port in ChunkPort:
            queue = self._queues[port]
            while queue and not self._paused and port not in self._streaming and self.is_open:
                self._write(self.connection.send(queue.popleft(), port))

    async def _writable(self) -> None:
        while self._paused and self._transport is not None:
            if self._resumed is None:
                self._resumed = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(self._stall_timeout):
                    await asyncio.shield(self._resumed)
            except TimeoutError:
                self.fail(AgentTimeoutError(f"nothing was read for {self._stall_timeout:g} s"))
        if not self.is_open:
            raise AgentGoneError(str(self._reason) if self._reason else "the agent channel closed")

    def _wake(self) -> None:
        if self._resumed is not None:
            self._resumed.set_result(None)
            self._resumed = None

    # --- the way in, and the end

    def hold_reading(self) -> None:
        """Take no more from the peer until ``release_reading``; holds add up."""
        self._readers_waiting += 1
        if self._readers_waiting == 1 and self._transport is not None:
            self._transport.pause_reading()

    def release_reading(self) -> None:
        """Undo one ``hold_reading``."""
        self._readers_waiting -= 1
        if not self._readers_waiting and self.is_open:
            assert self._transport is not None
            self._transport.resume_reading()

    def fail(self, reason: Exception) -> None:
        """Reset the channel because of ``reason``: drop what is in flight and close."""
        self._reason = self._reason or reason
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Close after what was written has gone out."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()
