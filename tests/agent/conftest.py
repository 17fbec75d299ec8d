"""A host's end and the embedded guest's agent on the two ends of one socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from vring_serial.agent import HostAgent
from vring_serial.guest.agent import GUEST_CAPABILITIES, GuestAgent
from vring_serial.proto.agent import (
    NEED_DATA,
    AgentConnection,
    AnnounceCapabilities,
    MessageReceived,
    Side,
)


class Pair:
    """Both agents, connected until ``disconnect`` and again with ``connect``."""

    def __init__(self, downloads=None):
        self.downloads = downloads
        self.host_events = []
        self.guest_events = []
        self.host = HostAgent(on_event=self.host_events.append, timeout=5)
        self.guest = GuestAgent(downloads=downloads, on_event=self.guest_events.append, timeout=5)
        self.running = None
        self.writer = None

    async def connect(self):
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        reader, self.writer = await asyncio.open_connection(sock=theirs)
        self.running = asyncio.ensure_future(self.guest.run(reader, self.writer))
        await loop.create_connection(self.host.protocol_factory, sock=ours)
        await self.host.wait_ready()
        await self.until(lambda: self.guest.host is not None)

    async def disconnect(self):
        """The guest closes the channel."""
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
        await self.until(lambda: self.host.capabilities is None)

    async def until(self, condition):
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.005)

    async def close(self):
        await self.host.close()
        if self.running is not None:
            await self.disconnect()


@pytest.fixture
async def pair():
    pair = Pair()
    yield pair
    async with asyncio.timeout(5):
        await pair.close()


@pytest.fixture
async def file_pair(tmp_path):
    """A pair, connected, whose guest takes files."""
    pair = Pair(tmp_path / "downloads")
    await pair.connect()
    yield pair
    async with asyncio.timeout(5):
        await pair.close()


class RawAgent:
    """The guest's end of a HostAgent's channel, for agents that behave in ways of their own."""

    def __init__(self, reader, writer):
        self.reader = reader
        self.writer = writer
        self.connection = AgentConnection(Side.GUEST)

    def send(self, message):
        self.writer.write(self.connection.send(message))

    async def receive(self, kind):
        """The next message of this class; those before it are dropped."""
        async with asyncio.timeout(5):
            while True:
                event = self.connection.next_event()
                if event is NEED_DATA:
                    data = await self.reader.read(65536)
                    assert data, "the host closed the channel"
                    self.connection.receive_data(data)
                elif isinstance(event, MessageReceived) and isinstance(event.message, kind):
                    return event.message

    async def greet(self, capabilities=GUEST_CAPABILITIES):
        """Announce, and wait for both messages of the host: its question and its answer."""
        self.send(AnnounceCapabilities(True, capabilities))
        assert (await self.receive(AnnounceCapabilities)).request
        assert not (await self.receive(AnnounceCapabilities)).request
        self.send(AnnounceCapabilities(False, capabilities))

    async def close(self):
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


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
        await agent.close()
        await host.close()
    await asyncio.sleep(0)
