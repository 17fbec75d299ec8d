"""Two VMs in one service: whatever becomes of one's worker, the other's bytes go on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from contextlib import asynccontextmanager

import pytest

from tests.support.keeper import kept, socket_ports
from tests.support.scripted_frontend import connect_to
from tests.support.waiting import until
from vring_serial import EmbeddedGuest
from vring_serial.proto.vhost_user import MemoryRegion, MemoryTable, ProtocolFeature, Request
from vring_serial.service.keeper import KILL_SECONDS, STOP_SECONDS

FILE = """
[vm.harmed]
vhost-user = "a"
chardev.a = { backend = "socket", path = "ac", server = true, wait = false }
port = [{ chardev = "a", nr = 1, name = "org.example.data1" }]
"""
FEATURES = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK
TIB = 1 << 40


@asynccontextmanager
async def opened(port, client):
    """Both ends of a port: the host's streams, and the guest's."""
    reader, writer = await asyncio.open_unix_connection(client)
    await port.wait_host()
    from_host, to_host = await port.open()
    try:
        yield reader, writer, from_host, to_host
    finally:
        to_host.close()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


class Traffic:
    """Bytes through a VM's port, back and forth, checked.

    Attributes:
        turns: how many went both ways.
    """

    def __init__(self, socket, client):
        self.turns = 0
        self._guest = EmbeddedGuest(socket, memory=32 << 20)
        self._client = client

    async def run(self):
        async with self._guest:
            port = await self._guest.wait_port(nr=1)
            async with opened(port, self._client) as (reader, writer, from_host, to_host):
                while True:
                    data = os.urandom(10_000)
                    writer.write(data)
                    assert await from_host.readexactly(len(data)) == data
                    to_host.write(data)
                    assert await reader.readexactly(len(data)) == data
                    self.turns += 1


@pytest.fixture
def frontend(service):
    """A frontend of the VM ``harmed`` that follows a script."""
    frontend = connect_to("a")
    yield frontend
    frontend.close()


@asynccontextmanager
async def traffic(socket, client):
    """Traffic for the length of a block, in which it may end."""
    moving = Traffic(socket, client)
    task = asyncio.create_task(moving.run())
    await until(lambda: moving.turns > 3, unless=task.done)
    try:
        yield moving
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def goes_on(moving):
    turns = moving.turns
    await until(lambda: moving.turns > turns + 20)


@pytest.fixture
async def service(tmp_path, monkeypatch):
    """A keeper; its VM ``harmed``, whose worker is the older child, and one beside it, served."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").write_text(FILE)
    async with kept(tmp_path, *socket_ports([1]), "--config", "config") as keeper:
        await keeper.logged("serving;", 2)
        yield keeper


async def ends_soon(keeper, status):
    begun = time.monotonic()
    assert await keeper.stop() == status
    assert time.monotonic() - begun < STOP_SECONDS + KILL_SECONDS + 3


async def test_one_is_stopped(service):
    async with traffic("a", "ac"), traffic("v", "c1") as well:
        os.kill(service.children[0], signal.SIGSTOP)
        await goes_on(well)
        await service.kill_of(service.children[1])
        await goes_on(well)
    await ends_soon(service, 1)


async def test_one_dies_again_and_again_with_the_same_state(service):
    async with traffic("v", "c1") as well:
        others = service.children[1]
        async with EmbeddedGuest("a", memory=32 << 20) as guest:
            async with opened(await guest.wait_port(nr=1), "ac") as (reader, *_):
                for _ in range(12):  # what was under way at the first deaths changes what is left
                    await service.kill_of(next(pid for pid in service.children if pid != others))
                    if "begins anew" in service.log:
                        break
                assert await reader.read() == b""
            await service.logged("harmed: its worker ended by SIGKILL, 5 times in 10 s")
        await goes_on(well)
        assert others in service.children
        async with traffic("a", "ac") as again:
            await goes_on(again)
            await goes_on(well)
    await ends_soon(service, 0)


async def test_one_has_what_cannot_be_closed_and_cannot_be_killed(service, frontend, request):
    files = request.getfixturevalue("hostile_files")  # no child of ours must inherit them
    await frontend.negotiate(int(FEATURES))
    table = MemoryTable((MemoryRegion(4 << 20, 4096, 4 << 20, 0),))
    assert await frontend.acked(Request.SET_MEM_TABLE, table, (files.fuse,)) != 0
    async with traffic("v", "c1") as well:
        await goes_on(well)
        await service.kill_of(service.children[1])
        await goes_on(well)
    await ends_soon(service, 1)
    assert "harmed: process" in service.log
    assert "cannot be killed, and is left" in service.log
    assert not files.gone
    files.end()


async def test_one_has_a_table_of_terabytes(service, frontend):
    memory = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(memory, 4 * TIB)
    await frontend.negotiate(int(FEATURES))
    table = MemoryTable((MemoryRegion(0, 4 * TIB, 0, 0),))
    await frontend.acked(Request.SET_MEM_TABLE, table, (memory,))
    async with traffic("v", "c1") as well:
        await goes_on(well)
        harmed, others = service.children
        await service.kill_of(harmed)
        await goes_on(well)
        await service.kill_of(others)
        await goes_on(well)
    os.close(memory)
    await ends_soon(service, 0)
