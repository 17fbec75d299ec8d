"""Whatever the other end sends, in whatever order: no end of the channel raises, hangs or leaks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.leaks import held
from tests.support.waiting import turns
from vring_serial import HOST_CAPABILITIES, AgentRouter, HostAgent
from vring_serial.agent.guest import GuestAgent
from vring_serial.agent.router.client import RouterClient
from vring_serial.proto.agent import (
    AGENT_AWAY,
    FILES_FROM_GUEST,
    AgentConnection,
    AnnounceCapabilities,
    AudioVolumeSync,
    Capabilities,
    ChunkPort,
    ClientDisconnected,
    Clipboard,
    ClipboardGrab,
    ClipboardRelease,
    ClipboardRequest,
    DisplayConfig,
    FileInfo,
    FileXferData,
    FileXferStart,
    FileXferStatus,
    MaxClipboard,
    Monitor,
    MonitorsConfig,
    Reply,
    Side,
    UnknownMessage,
)

small = st.integers(0, 3)
number = st.one_of(small, small.map(lambda n: n + (1 << 31)))
selection = st.integers(0, 2)
data = st.one_of(st.binary(max_size=40), st.just(bytes(200_000)))
messages = st.one_of(
    st.builds(
        AnnounceCapabilities,
        st.booleans(),
        st.sampled_from(
            [
                HOST_CAPABILITIES,
                HOST_CAPABILITIES.with_(FILES_FROM_GUEST),
                HOST_CAPABILITIES.with_(AGENT_AWAY),
                Capabilities((0,)),
            ]
        ),
    ),
    st.builds(ClipboardGrab, selection, st.lists(small, max_size=3).map(tuple), small),
    st.builds(ClipboardRequest, selection, small),
    st.builds(ClipboardRelease, selection),
    st.builds(Clipboard, selection, small, data),
    st.builds(
        FileXferStart,
        number,
        st.one_of(
            st.binary(max_size=20),
            st.builds(FileInfo, st.text(max_size=5), small.map(lambda n: n * 20)).map(
                FileInfo.pack
            ),
        ),
    ),
    st.builds(FileXferData, number, data),
    st.builds(FileXferStatus, number, st.integers(0, 9), st.binary(max_size=9)),
    st.builds(MonitorsConfig, st.lists(st.builds(Monitor, small, small), max_size=3).map(tuple)),
    st.builds(Reply, small, small),
    st.builds(MaxClipboard, st.integers(-2, 2)),
    st.builds(DisplayConfig, small),
    st.builds(AudioVolumeSync, st.booleans(), st.booleans(), st.just((1, 2))),
    st.just(ClientDisconnected()),
    st.builds(UnknownMessage, st.integers(17, 20), data),
    st.sampled_from([struct.pack("<II", 1, 28) + struct.pack("<IIQI", 1, 6, 0, 8) + bytes(8)]),
)
sent = st.lists(st.tuples(messages, st.sampled_from(ChunkPort)), max_size=12)


def encode(side, messages):
    other = {Side.HOST: Side.GUEST, Side.GUEST: Side.HOST}
    connection = AgentConnection(side)
    parts = []
    for message, port in messages:
        if isinstance(message, bytes):
            parts.append(message)
        else:
            parts.append(connection.send(message, port))
            if isinstance(message, AnnounceCapabilities):  # the peer will use that layout as well
                connection.receive_data(AgentConnection(other[side]).send(message))
                connection.next_event()
    return b"".join(parts)


async def read_until_silent(reader):
    """Read until nothing comes in many turns of the loop, or nothing ever will."""
    reading = None
    while reading is None or (reading.done() and reading.result()):
        reading = asyncio.ensure_future(reader.read(1 << 20))
        await turns()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def exchange(factory, wire):
    """Send to a protocol over a real socket, and read until it has taken and said everything."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)
    await asyncio.get_running_loop().create_connection(factory, sock=ours)
    with contextlib.suppress(ConnectionError):
        writer.write(wire)
        await writer.drain()
        await read_until_silent(reader)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    await turns()


def run_without_failures(work):
    """Run a coroutine; whatever a protocol or a task raised meanwhile fails the test."""
    failures = []

    async def run():
        handler = lambda _, context: failures.append(context)  # noqa: E731
        asyncio.get_running_loop().set_exception_handler(handler)
        await work

    asyncio.run(run())
    assert not failures


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL)


few = settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@few
@given(sent)
def test_host(tmp_path, messages):
    async def run():
        host = HostAgent(capabilities=HOST_CAPABILITIES.with_(FILES_FROM_GUEST), timeout=0.01)
        await exchange(host.protocol_factory, encode(Side.GUEST, messages))
        await host.aclose()
        assert host.capabilities is None

    run_without_failures(run())


@few
@given(sent)
def test_guest(tmp_path, messages):
    async def run():
        guest = GuestAgent(downloads=tmp_path / "in", timeout=0.01)
        guest.set_clipboard("text")
        guest.copy_files([tmp_path / "none"], 1)
        await exchange(guest.protocol_factory, encode(Side.HOST, messages))
        await guest.aclose()
        assert guest.host is None
        assert not {name for name in held().descriptors.values() if str(tmp_path) in name}

    run_without_failures(run())


@few
@given(sent, sent, sent)
def test_router(tmp_path, from_agent, from_client, from_server):
    async def run():
        router = AgentRouter()
        await asyncio.gather(
            exchange(router.protocol_factory, encode(Side.GUEST, from_agent)),
            exchange(router.client_factory, encode(Side.HOST, from_client)),
            exchange(
                lambda: RouterClient(router, is_server=True).link, encode(Side.HOST, from_server)
            ),
        )
        await router.aclose()
        assert not router.clients
        assert (router.load.transfers, router.load.guest_transfers) == (0, 0)

    run_without_failures(run())
