"""One connected agent channel on an asyncio transport: what both of its ends need, and the router.

Sending has an order: a message takes its turn behind the one that is being streamed, and nothing is
written while the transport asks to pause, so what waits in memory stays bounded either way. A peer
that leaves many messages unread is not read until it has taken some of them.
"""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import AsyncIterable, Awaitable, Hashable
from typing import Protocol, cast

from vring_serial.agent.channel.outbox import Maker, Outbox
from vring_serial.agent.errors import AgentError, AgentGoneError, AgentTimeoutError
from vring_serial.proto.agent import (
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

CROWDED = 512
"""Short messages that wait for a peer before it is no longer read."""
CROWDED_BYTES = 256 << 10
"""Bytes of them that have the same effect."""
CROWDED_TIMEOUT = 10.0
"""Seconds for which so many may wait for a peer that reads nothing before the link is given up."""
QUEUE_MAX = 16384
"""Short messages that may wait whatever happens; one more and the link is given up. A router puts
as many into the agent's queue when all of its clients leave with all of their transfers open."""
QUEUE_BYTES = 8 << 20
TURN_SECONDS = 0.005
"""How long the messages of one peer are worked on before the event loop has its turn."""


class BodySink(Protocol):
    """Takes the payload of one streamed message."""

    def feed(self, data: Buffer) -> None:
        """Take the next bytes."""

    def end(self, complete: bool) -> None:
        """End: no more follows; ``complete`` says whether all came."""


class LinkOwner(Protocol):
    """What a link tells the one who uses it. All calls come from the event loop's thread."""

    def link_up(self, link: AgentLink) -> None:
        """Begin to use the link: it can be written to."""

    def link_down(self, link: AgentLink, reason: Exception | None) -> None:
        """Forget the link, which is closed. ``reason`` is None for an orderly end."""

    def link_message(
        self, link: AgentLink, port: int, message: TypedMessage | UnknownMessage
    ) -> None:
        """Act on a whole message."""

    def link_body(
        self, link: AgentLink, port: int, head: StreamedMessage, size: int
    ) -> BodySink | None:
        """Return what takes the payload of a long message that begins; None discards it."""

    def link_trouble(self, link: AgentLink, error: AgentProtocolError) -> None:
        """Report a wrong message of the peer's. After a ChunkError the link goes down."""


class AgentLink(asyncio.Protocol):
    """One connection of an agent channel.

    Args:
        side: which end of the channel we are.
        owner: told of everything that happens.
        stall_timeout: seconds for which a peer may leave what was sent unread before the link is
            given up; None for ever, which suits a guest that may be paused.
        is_patient: CROWDED short messages may wait for ever for a peer that reads nothing.
    """

    def __init__(
        self,
        side: Side,
        owner: LinkOwner,
        *,
        stall_timeout: float | None = None,
        is_patient: bool = False,
    ) -> None:
        self.connection = AgentConnection(side)
        self._stall_timeout = stall_timeout
        self._stall_timer: asyncio.TimerHandle | None = None
        self._is_patient = is_patient
        self._crowded_timer: asyncio.TimerHandle | None = None
        self._crowded: list[AgentLink] | None = None
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._written = 0
        self._sinks: dict[int, BodySink | None] = {}
        self._queues = {port: Outbox() for port in ChunkPort}
        self._turns = {port: asyncio.Lock() for port in ChunkPort}
        self._streaming: set[int] = set()
        self._working: set[asyncio.Timeout] = set()
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
        self._cancel_stall()
        reason = self._reason or exc
        if reason is None and not self._closing and self.connection.inside_message:
            reason = AgentGoneError("the agent channel closed in the middle of a message")
        for port in list(self._sinks):
            self._end_sink(port, complete=False)
        for queue in self._queues.values():
            queue.clear()
        self._relieve()
        self._wake()
        for scope in self._working:
            scope.reschedule(asyncio.get_running_loop().time())
        self._owner.link_down(self, reason)

    def pause_writing(self) -> None:
        self._paused = True
        if self._stall_timeout is not None and self._stall_timer is None:
            loop = asyncio.get_running_loop()
            self._stall_timer = loop.call_later(self._stall_timeout, self._stalled)

    def resume_writing(self) -> None:
        self._paused = False
        self._cancel_stall()
        self._flush()
        if not self._paused:
            self._wake()

    def _stalled(self) -> None:
        self._stall_timer = None
        self.fail(AgentTimeoutError(f"nothing was read for {self._stall_timeout:g} s"))

    def _cancel_stall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def data_received(self, data: bytes) -> None:
        self.connection.receive_data(data)
        self._take_events()

    def _take_events(self) -> None:
        """Work on what was received until it is used up, the reading is held, or others wait."""
        end = time.monotonic() + TURN_SECONDS
        while self.is_open and not self._readers_waiting:
            try:
                event = self.connection.next_event()
            except MessageError as error:
                self._owner.link_trouble(self, error)
                continue
            except ChunkError as error:
                self._owner.link_trouble(self, error)
                self.fail(error)
                return
            if event is None:
                return
            self._dispatch(event)
            if time.monotonic() > end:
                self.hold_reading()
                asyncio.get_running_loop().call_soon(self.release_reading)

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

    @property
    def has_hung_up(self) -> bool:
        """Whether the peer has left, which is not noticed otherwise while the reading is held."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        if sock is None or sock.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(sock.fileno(), 0)
        return bool(poll.poll(0))

    @property
    def taken(self) -> int:
        """Bytes that have left for the peer so far."""
        waiting = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return self._written - waiting

    @property
    def waiting(self) -> int:
        """Short messages that wait for their turn, or for the peer to read."""
        return sum(len(queue) for queue in self._queues.values())

    def post(self, message: Message, port: ChunkPort = ChunkPort.CLIENT) -> None:
        """Send a short message as soon as its turn comes; nothing happens on a closed link."""
        if not self.is_open:
            return
        queue = self._queues[port]
        if port not in self._streaming and not self._paused and not queue:
            self._write(self.connection.send(message, port))
        else:
            queue.put(message)
            self._check_queues()

    def post_latest(self, key: Hashable, make: Maker, port: ChunkPort = ChunkPort.CLIENT) -> None:
        """Send what ``make`` gives (None: nothing) when its turn comes.

        However often this is called for a key until then, one message goes out.
        """
        if not self.is_open:
            return
        self._queues[port].put_latest(key, make)
        self._flush()

    def _check_queues(self) -> None:
        count = self.waiting
        size = sum(queue.bytes for queue in self._queues.values())
        if count > QUEUE_MAX or size > QUEUE_BYTES:
            self._give_up(count)
        elif self._crowded is None and (count >= CROWDED or size >= CROWDED_BYTES):
            self._crowded = []
            self.hold_while_crowded(self)
            self._watch_crowd()
        elif self._crowded is not None and count < CROWDED // 2 and size < CROWDED_BYTES // 2:
            self._relieve()

    def _watch_crowd(self) -> None:
        if not self._is_patient:
            loop = asyncio.get_running_loop()
            check = loop.call_later(CROWDED_TIMEOUT, self._check_crowd, self.taken)
            self._crowded_timer = check

    def _check_crowd(self, taken_before: int) -> None:
        if self.taken > taken_before:
            self._watch_crowd()
        else:
            self._give_up(self.waiting)

    def _give_up(self, count: int) -> None:
        self.fail(AgentError(f"the other end left {count} messages unread"))

    def hold_while_crowded(self, source: AgentLink) -> None:
        """If many messages wait here, do not read ``source`` until there are fewer."""
        if self._crowded is not None and source not in self._crowded:
            self._crowded.append(source)
            source.hold_reading()

    def _relieve(self) -> None:
        if self._crowded_timer is not None:
            self._crowded_timer.cancel()
            self._crowded_timer = None
        sources, self._crowded = self._crowded, None
        for source in sources or ():
            source.release_reading()

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

        Messages for the other port go between the pieces. The source is cancelled if the link
        closes. If the source fails, ends early or the task is cancelled, the message cannot be
        completed truthfully: the host then says that its client disconnected, which makes the agent
        drop the half message, and reports the link as up again; the guest closes the link, and so
        does the host if it was a message of the server's.
        Raises AgentGoneError, AgentError if the source has more or fewer bytes than ``size``, and
        whatever the source raises.
        """
        async with self._turns[port]:
            await self._writable()
            self._streaming.add(port)
            self._write(self.connection.start_body(head, size, port))
            try:
                await self._while_open(self._send_pieces(size, source, port))
            except BaseException:
                if self.connection.body_left(port):
                    self._drop_body(port)
                raise
            finally:
                self._streaming.discard(port)
                self._flush()

    async def _send_pieces(self, size: int, source: AsyncIterable[Buffer], port: ChunkPort) -> None:
        async for piece in source:
            await self._writable()
            if len(piece) > self.connection.body_left(port):
                raise AgentError(f"the source has more than the {size} bytes announced")
            self._write(self.connection.send_body(piece, port))
        if self.connection.body_left(port):
            raise AgentError(f"the source has fewer than the {size} bytes announced")

    async def _while_open(self, work: Awaitable[None]) -> None:
        """Do ``work``; it is cancelled when the link closes. Raises AgentGoneError then."""
        scope = asyncio.timeout(None)
        self._working.add(scope)
        try:
            async with scope:
                await work
        except TimeoutError:
            if not scope.expired():
                raise
            raise self._gone() from None
        finally:
            self._working.discard(scope)

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
            self._written += len(data)
            self._transport.write(data)

    def _flush(self) -> None:
        for port in ChunkPort:
            queue = self._queues[port]
            while queue and not self._paused and port not in self._streaming and self.is_open:
                message = queue.take()
                if message is not None:
                    self._write(self.connection.send(message, port))
        self._check_queues()

    async def _writable(self) -> None:
        while self._paused and self._transport is not None:
            if self._resumed is None:
                self._resumed = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._resumed)
        if not self.is_open:
            raise self._gone()

    def _gone(self) -> AgentGoneError:
        return AgentGoneError(str(self._reason) if self._reason else "the agent channel closed")

    def _wake(self) -> None:
        if self._resumed is not None:
            self._resumed.set_result(None)
            self._resumed = None

    # --- the way in, and the end

    @property
    def is_held(self) -> bool:
        """Whether nothing is taken from the peer: what it sends waits in the transport."""
        return self._readers_waiting > 0

    def hold_reading(self) -> None:
        """Take no more messages from the peer until ``release_reading``; holds add up."""
        self._readers_waiting += 1
        if self._readers_waiting == 1 and self._transport is not None:
            self._transport.pause_reading()

    def release_reading(self) -> None:
        """Undo one ``hold_reading``."""
        self._readers_waiting -= 1
        if not self._readers_waiting and self.is_open:
            asyncio.get_running_loop().call_soon(self._go_on_reading)

    def _go_on_reading(self) -> None:
        """Take what was received while the reading was held, then read on."""
        self._take_events()
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
            self._flush()
            self._transport.close()
