"""A host's end and the embedded guest's agent on the two ends of one socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

import pytest

from tests.support.waiting import turns, until
from vring_serial import HOST_CAPABILITIES, AgentRouter, HostAgent
from vring_serial.agent.channel.link import AgentLink
from vring_serial.agent.channel.streams import run_on_streams
from vring_serial.agent.guest import GUEST_CAPABILITIES, GuestAgent
from vring_serial.proto.agent import (
    AgentConnection,
    AnnounceCapabilities,
    ChunkPort,
    FileXferData,
    MessageReceived,
    Side,
)


class Pair:
    """Both agents, connected until ``disconnect`` and again with ``connect``."""

    def __init__(self, downloads=None):
        self.downloads = downloads
        self.host_events = []
        self.guest_events = []
        self.host = HostAgent(on_event=self.host_events.append, timeout=30)
        self.guest = GuestAgent(downloads=downloads, on_event=self.guest_events.append, timeout=30)
        self.running = None
        self.writer = None

    async def connect(self):
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        reader, self.writer = await asyncio.open_connection(sock=theirs)
        self.running = asyncio.ensure_future(self.guest.run(reader, self.writer))
        await loop.create_connection(self.host.protocol_factory, sock=ours)
        await self.host.wait_ready()
        await until(lambda: self.guest.host is not None)

    async def disconnect(self):
        """The guest closes the channel."""
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
        await until(lambda: self.host.capabilities is None)

    async def aclose(self):
        await self.host.aclose()
        if self.running is not None:
            await self.disconnect()


@pytest.fixture
async def pair():
    pair = Pair()
    yield pair
    async with asyncio.timeout(30):
        await pair.aclose()


@pytest.fixture
async def file_pair(tmp_path):
    """A pair, connected, whose guest takes files."""
    pair = Pair(tmp_path / "downloads")
    await pair.connect()
    yield pair
    async with asyncio.timeout(30):
        await pair.aclose()


class RawEnd:
    """One end of a channel that a test speaks message by message."""

    def __init__(self, reader, writer, side):
        self.reader = reader
        self.writer = writer
        self.connection = AgentConnection(side)

    def send(self, message, port=ChunkPort.CLIENT):
        self.writer.write(self.connection.send(message, port))

    async def receive(self, kind, port=ChunkPort.CLIENT):
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

    async def at_eof(self):
        """Wait until the other end has closed the channel."""
        async with asyncio.timeout(30):
            while await self.reader.read(65536):
                pass

    async def aclose(self):
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


class RawAgent(RawEnd):
    """The guest's end of a channel, for agents that behave in ways of their own."""

    def __init__(self, reader, writer):
        super().__init__(reader, writer, Side.GUEST)

    async def greet(self, capabilities=GUEST_CAPABILITIES):
        """Announce, and wait for both messages of the host: its question and its answer."""
        self.send(AnnounceCapabilities(True, capabilities))
        assert (await self.receive(AnnounceCapabilities)).request
        assert not (await self.receive(AnnounceCapabilities)).request
        self.send(AnnounceCapabilities(False, capabilities))


class RawClient(RawEnd):
    """A client's end of a channel of a router."""

    def __init__(self, reader, writer):
        super().__init__(reader, writer, Side.HOST)

    async def greet(self, capabilities=HOST_CAPABILITIES):
        """Announce, and return what the agent can do."""
        self.send(AnnounceCapabilities(True, capabilities))
        while True:
            announced = await self.receive(AnnounceCapabilities)
            if not announced.request:
                return announced.capabilities


@pytest.fixture
async def raw_agent():
    """Connects a RawAgent to a HostAgent."""
    opened = []

    async def connect(host):
        ours, theirs = socket.socketpair()
        agent = RawAgent(*await asyncio.open_connection(sock=theirs))
        opened.append((agent, host))
        loop = asyncio.get_running_loop()
        await loop.create_connection(host.protocol_factory, sock=ours)
        return agent

    yield connect
    for agent, host in opened:
        await agent.aclose()
        await host.aclose()
    await turns()


@pytest.fixture
async def raw_guest_host():
    """Connects a RawClient to a GuestAgent."""
    opened = []

    async def connect(guest):
        ours, theirs = socket.socketpair()
        host = RawClient(*await asyncio.open_connection(sock=theirs))
        opened.append((host, guest))
        loop = asyncio.get_running_loop()
        await loop.create_connection(guest.protocol_factory, sock=ours)
        return host

    yield connect
    for host, guest in opened:
        await host.aclose()
        await until(lambda guest=guest: guest.link is None)
        await guest.aclose()


class Client(HostAgent):
    """A client that keeps its events in ``seen``."""

    def __init__(self, **options):
        self.seen = []
        super().__init__(on_event=self.seen.append, **options)


class Tap:
    """Uses a link for the guest's agent, and may keep from it what comes.

    Attributes:
        seen: the port of every message that came whole, and the message; not the data of files.
        withholds: says of a message whether the agent is not told of it.
        take_body: takes long messages in place of the agent, if it is there.
    """

    def __init__(self, agent):
        self.agent = agent
        self.link_up = agent.link_up
        self.link_down = agent.link_down
        self.link_trouble = agent.link_trouble
        self.seen = []
        self.withholds = lambda message: False
        self.take_body = None

    def link_message(self, link, port, message):
        if not isinstance(message, FileXferData):
            self.seen.append((port, message))
        if not self.withholds(message):
            self.agent.link_message(link, port, message)

    def link_body(self, link, port, head, size):
        if self.take_body is not None:
            return self.take_body(head, size)
        return self.agent.link_body(link, port, head, size)

    def of(self, kind):
        """The messages of a class that came."""
        return [message for _, message in self.seen if isinstance(message, kind)]


class RouterBench:
    """A router with a guest agent on one side; clients are added on the other."""

    def __init__(self, downloads, **options):
        self.downloads = downloads
        self.router_events = []
        self.router = AgentRouter(on_event=self.router_events.append, **options)
        self.guest_events = []
        self.use_guest()
        self.clients = []
        self.running = None
        self.writer = None

    def use_guest(self, **options):
        self.guest = GuestAgent(
            downloads=self.downloads, timeout=30, on_event=self.guest_events.append, **options
        )
        self.tap = Tap(self.guest)

    async def start_guest(self):
        ours, theirs = socket.socketpair()
        reader, self.writer = await asyncio.open_connection(sock=theirs)
        self.running = asyncio.ensure_future(self._run_guest(reader, self.writer))
        loop = asyncio.get_running_loop()
        await loop.create_connection(self.router.protocol_factory, sock=ours)
        await until(lambda: self.router.capabilities is not None)

    async def _run_guest(self, reader, writer):
        try:
            await run_on_streams(AgentLink(Side.GUEST, self.tap), reader, writer)
        finally:
            await self.guest.aclose()

    async def start_guest_with(self, capabilities):
        """Another agent than the one before."""
        self.use_guest(capabilities=capabilities)
        await self.start_guest()

    async def stop_guest(self):
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
        await until(lambda: self.router.capabilities is None)

    async def client(self, **options):
        host = Client(timeout=30, **options)
        await self.router.connect(host.protocol_factory)
        self.clients.append(host)
        return host

    async def raw_client(self):
        """A client that the test speaks for."""
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        await loop.create_connection(self.router.client_factory, sock=ours)
        client = RawClient(*await asyncio.open_connection(sock=theirs))
        self.clients.append(client)
        return client

    async def aclose(self):
        for client in self.clients:
            await client.aclose()
        await self.router.aclose()
        await self.stop_guest()
        await until(lambda: not self.router.clients)


@pytest.fixture
async def make_bench(tmp_path):
    benches = []

    async def make(*, downloads=tmp_path / "downloads", **options):
        bench = RouterBench(downloads, **options)
        benches.append(bench)
        await bench.start_guest()
        return bench

    yield make
    async with asyncio.timeout(30):
        for bench in benches:
            await bench.aclose()


@pytest.fixture
def make_file(tmp_path):
    def make(name, size):
        path = tmp_path / name
        path.write_bytes(os.urandom(size))
        return path

    return make


@pytest.fixture
def raw_client_type():
    return RawClient
