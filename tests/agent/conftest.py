"""Agents that are connected, and what speaks for one."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from tests.support.agents import Pair, RawAgent, RawClient, RouterBench
from tests.support.waiting import turns, until


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
