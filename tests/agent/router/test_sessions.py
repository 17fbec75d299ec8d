"""A client's session with the router: what begins it anew, and what ends with it."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tests.support.agents import RawClient
from tests.support.waiting import until
from vring_serial import HOST_CAPABILITIES, AgentRouter
from vring_serial.agent.router import clipboards as clipboards_module
from vring_serial.proto.agent import (
    AGENT_AWAY,
    AnnounceCapabilities,
    ClipboardGrab,
    ClipboardRelease,
    ClipboardRequest,
    ClipboardType,
    Selection,
    UnknownMessage,
)

TEXT = ClipboardType.UTF8_TEXT


async def test_who_comes_without_an_agent_has_clipboards_as_well(make_bench):
    bench = await make_bench()
    await bench.stop_guest()
    clients = [await bench.raw_client() for _ in range(2)]
    for client in clients:
        assert AGENT_AWAY in (await client.receive(AnnounceCapabilities)).capabilities
        client.send(AnnounceCapabilities(False, HOST_CAPABILITIES))
    owner, other = clients
    owner.send(ClipboardGrab(Selection.CLIPBOARD, (TEXT,)))
    assert (await other.receive(ClipboardGrab)).types == (TEXT,)


async def test_an_agent_that_comes_back_begins_each_clients_session_anew(make_bench):
    """A client then owns what it grabs in the new session, and nothing else."""
    bench = await make_bench()
    owner = await bench.raw_client()
    await owner.greet()
    owner.send(ClipboardGrab(Selection.PRIMARY, (TEXT,)))
    other = await bench.raw_client()
    await other.greet()
    assert (await other.receive(ClipboardGrab)).selection == Selection.PRIMARY
    await bench.stop_guest()
    await owner.receive(AnnounceCapabilities)
    await bench.start_guest()
    assert (await owner.receive(AnnounceCapabilities)).request
    owner.send(AnnounceCapabilities(False, HOST_CAPABILITIES))
    owner.send(ClipboardGrab(Selection.SECONDARY, (TEXT,)))
    await other.receive(ClipboardRelease)
    late = await bench.raw_client()
    await late.greet()
    assert (await late.receive(ClipboardGrab)).selection == Selection.SECONDARY


async def test_a_client_that_leaves_no_longer_waits_for_an_answer(make_bench, monkeypatch):
    monkeypatch.setattr(clipboards_module, "ANSWER_TIMEOUT", 300)
    bench = await make_bench()
    owner, asker = await bench.raw_client(), await bench.raw_client()
    for client in (owner, asker):
        await client.greet()
    owner.send(ClipboardGrab(Selection.CLIPBOARD, (TEXT,)))
    await asker.receive(ClipboardGrab)
    before = asyncio.all_tasks()
    asker.send(ClipboardRequest(Selection.CLIPBOARD, TEXT))
    await owner.receive(ClipboardRequest)
    assert asyncio.all_tasks() - before
    await asker.aclose()
    await until(lambda: not asyncio.all_tasks() - before)


@pytest.fixture
async def connected(raw_agent):
    """A router, its agent and its one client, which the test speaks for."""
    router = AgentRouter()
    agent = await raw_agent(router)
    await agent.greet()
    ours, theirs = socket.socketpair()
    await asyncio.get_running_loop().create_connection(router.client_factory, sock=ours)
    client = RawClient(*await asyncio.open_connection(sock=theirs))
    await client.greet()
    yield router, agent, client
    await client.aclose()
    await router.aclose()


async def test_nothing_runs_for_a_client_once_the_router_is_closed(connected):
    router, agent, client = connected
    before = asyncio.all_tasks()
    for end in (agent, client):
        end.writer.transport.pause_reading()
    for _ in range(6):  # more than sockets and transports take
        agent.send(UnknownMessage(98, bytes(75_000)))
        client.send(UnknownMessage(99, bytes(75_000)))
    await until(lambda: len(asyncio.all_tasks() - before) == 2)
    await router.aclose()
    assert not asyncio.all_tasks() - before


async def test_no_answer_is_waited_for_once_the_router_is_closed(connected, monkeypatch):
    monkeypatch.setattr(clipboards_module, "ANSWER_TIMEOUT", 300)
    router, agent, client = connected
    agent.send(ClipboardGrab(Selection.CLIPBOARD, (TEXT,)))
    await client.receive(ClipboardGrab)
    before = asyncio.all_tasks()
    client.send(ClipboardRequest(Selection.CLIPBOARD, TEXT))
    await agent.receive(ClipboardRequest)
    assert asyncio.all_tasks() - before
    await router.aclose()
    assert not asyncio.all_tasks() - before
