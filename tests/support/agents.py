"""Both ends of an agent's channel, and a router with many of one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tests.support.waiting import until
from vring_serial import HOST_CAPABILITIES, AgentRouter, HostAgent
from vring_serial.agent.channel.link import AgentLink, BodySink
from vring_serial.agent.channel.streams import run_on_streams
from vring_serial.agent.events import AgentEvent
from vring_serial.agent.guest import GUEST_CAPABILITIES, GuestAgent, GuestAgentEvent
from vring_serial.proto.agent import (
    AgentConnection,
    AnnounceCapabilities,
    Capabilities,
    ChunkPort,
    FileXferData,
    Message,
    MessageReceived,
    Side,
)

MessageT = TypeVar("MessageT")


async def _end_of_guest(
    running: asyncio.Future[None] | None, writer: asyncio.StreamWriter | None
) -> None:
    """End the agent on the guest's end of a channel, and close that."""
    assert running is not None
    assert writer is not None
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


class Pair:
    """Both agents, connected until ``disconnect`` and again with ``connect``."""

    def __init__(self, downloads: Path | None = None) -> None:
        self.downloads = downloads
        self.host_events: list[AgentEvent] = []
        self.guest_events: list[GuestAgentEvent] = []
        self.host = HostAgent(on_event=self.host_events.append, timeout=30)
        self.guest = GuestAgent(downloads=downloads, on_event=self.guest_events.append, timeout=30)
        self.running: asyncio.Future[None] | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def connect(self) -> None:
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        reader, self.writer = await asyncio.open_connection(sock=theirs)
        self.running = asyncio.ensure_future(self.guest.run(reader, self.writer))
        await loop.create_connection(self.host.protocol_factory, sock=ours)
        await self.host.wait_ready()
        await until(lambda: self.guest.host is not None)

    async def disconnect(self) -> None:
        """The guest closes the channel."""
        await _end_of_guest(self.running, self.writer)
        await until(lambda: self.host.capabilities is None)

    async def aclose(self) -> None:
        await self.host.aclose()
        if self.running is not None:
            await self.disconnect()


class RawEnd:
    """One end of a channel that a test speaks message by message."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, side: Side
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.connection = AgentConnection(side)

    def send(self, message: Message, port: ChunkPort = ChunkPort.CLIENT) -> None:
        self.writer.write(self.connection.send(message, port))

    async def receive(self, kind: type[MessageT], port: ChunkPort = ChunkPort.CLIENT) -> MessageT:
        """The next message of this class on this port; those before it are dropped."""
        async with asyncio.timeout(30):
            while True:
                event = self.connection.next_event()
                if event is None:
                    data = await self.reader.read(65536)
                    assert data, "the other end closed the channel"
                    self.connection.receive_data(data)
                elif (
                    isinstance(event, MessageReceived)
                    and isinstance(event.message, kind)
                    and event.port == port
                ):
                    return event.message

    async def at_eof(self) -> None:
        """Wait until the other end has closed the channel."""
        async with asyncio.timeout(30):
            while await self.reader.read(65536):
                pass

    async def aclose(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


class RawAgent(RawEnd):
    """The guest's end of a channel, for agents that behave in ways of their own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer, Side.GUEST)

    async def greet(self, capabilities: Capabilities = GUEST_CAPABILITIES) -> None:
        """Announce, and wait for both messages of the host: its question and its answer."""
        self.send(AnnounceCapabilities(True, capabilities))
        assert (await self.receive(AnnounceCapabilities)).request
        assert not (await self.receive(AnnounceCapabilities)).request
        self.send(AnnounceCapabilities(False, capabilities))


class RawClient(RawEnd):
    """A client's end of a channel of a router."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer, Side.HOST)

    async def greet(self, capabilities: Capabilities = HOST_CAPABILITIES) -> Capabilities:
        """Announce, and return what the agent can do."""
        self.send(AnnounceCapabilities(True, capabilities))
        while True:
            announced = await self.receive(AnnounceCapabilities)
            if not announced.request:
                return announced.capabilities


class Client(HostAgent):
    """A client that keeps its events in ``seen``."""

    def __init__(self, **options: Any) -> None:
        self.seen: list[AgentEvent] = []
        super().__init__(on_event=self.seen.append, **options)


class Tap:
    """Uses a link for the guest's agent, and may keep from it what comes.

    Attributes:
        seen: the port of every message that came whole, and the message; not the data of files.
        withholds: says of a message whether the agent is not told of it.
        take_body: takes long messages in place of the agent, if it is there.
    """

    def __init__(self, agent: GuestAgent) -> None:
        self.agent = agent
        self.link_up = agent.link_up
        self.link_down = agent.link_down
        self.link_trouble = agent.link_trouble
        self.seen: list[tuple[int, object]] = []
        self.withholds: Callable[[object], bool] = lambda message: False
        self.take_body: Callable[[bytes, int], BodySink | None] | None = None

    def link_message(self, link: AgentLink, port: int, message: Any) -> None:
        if not isinstance(message, FileXferData):
            self.seen.append((port, message))
        if not self.withholds(message):
            self.agent.link_message(link, port, message)

    def link_body(self, link: AgentLink, port: int, head: Any, size: int) -> Any:
        if self.take_body is not None:
            return self.take_body(head, size)
        return self.agent.link_body(link, port, head, size)

    def of(self, kind: type[MessageT]) -> list[MessageT]:
        """The messages of a class that came."""
        return [message for _, message in self.seen if isinstance(message, kind)]


class RouterBench:
    """A router with a guest agent on one side; clients are added on the other."""

    def __init__(self, downloads: Path | None, **options: Any) -> None:
        self.downloads = downloads
        self.router_events: list[AgentEvent] = []
        self.router = AgentRouter(on_event=self.router_events.append, **options)
        self.guest_events: list[GuestAgentEvent] = []
        self.use_guest()
        self.clients: list[Client | RawClient] = []
        self.running: asyncio.Future[None] | None = None
        self.writer: asyncio.StreamWriter | None = None

    def use_guest(self, **options: Any) -> None:
        self.guest = GuestAgent(
            downloads=self.downloads, timeout=30, on_event=self.guest_events.append, **options
        )
        self.tap = Tap(self.guest)

    async def start_guest(self) -> None:
        ours, theirs = socket.socketpair()
        reader, self.writer = await asyncio.open_connection(sock=theirs)
        self.running = asyncio.ensure_future(self._run_guest(reader, self.writer))
        loop = asyncio.get_running_loop()
        await loop.create_connection(self.router.protocol_factory, sock=ours)
        await until(lambda: self.router.capabilities is not None)

    async def _run_guest(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await run_on_streams(AgentLink(Side.GUEST, self.tap), reader, writer)
        finally:
            await self.guest.aclose()

    async def start_guest_with(self, capabilities: Capabilities) -> None:
        """Another agent than the one before."""
        self.use_guest(capabilities=capabilities)
        await self.start_guest()

    async def stop_guest(self) -> None:
        await _end_of_guest(self.running, self.writer)
        await until(lambda: self.router.capabilities is None)

    async def client(self, **options: Any) -> Client:
        host = Client(timeout=30, **options)
        await self.router.connect(host.protocol_factory)
        self.clients.append(host)
        return host

    async def raw_client(self) -> RawClient:
        """A client that the test speaks for."""
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        await loop.create_connection(self.router.client_factory, sock=ours)
        client = RawClient(*await asyncio.open_connection(sock=theirs))
        self.clients.append(client)
        return client

    async def aclose(self) -> None:
        for client in self.clients:
            await client.aclose()
        await self.router.aclose()
        await self.stop_guest()
        await until(lambda: not self.router.clients)
