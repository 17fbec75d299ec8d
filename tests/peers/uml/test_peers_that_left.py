"""Clients that call and leave, in a loop, and a real kernel behind the port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket

import pytest

from tests.support.uml import boot_uml
from tests.support.waiting import DEADLINE, until
from vring_serial.chardev import hangup

pytestmark = pytest.mark.asyncio(loop_scope="module")

DIALS = 400
#: Clients that have business, with ten health checks from each to the next.
TURNS = 10


async def call_and_leave(path, request: bytes) -> None:
    """What a client with a short time-out does, or a health check."""

    def dial() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)  # as long as the backlog is full, connecting waits
            sock.connect(str(path))
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(request)

    await asyncio.to_thread(dial)


#: A program that has its port open, writes to it now and then, and never reads. That a client has
#: left shows when it writes.
TICKING = "(while :; do echo tick; sleep 0.01; done) <>/dev/vport0p1 >&0 2>/dev/null &"


async def test_a_program_that_does_not_read_keeps_nobody_out(uml, monkeypatch):
    """400 requests are more than the ring has room for; the next client who stays is served."""
    monkeypatch.setattr(hangup, "LAST_WORDS_SECONDS", 0.1)  # nobody reads them
    await uml.plug(1, "data")
    await uml.guest.run(TICKING)
    async with asyncio.timeout(180):
        for _ in range(DIALS):
            await call_and_leave(uml.bench.socket_path("data"), b"request of the dead\n")
        reader, writer = await uml.connect("data")
        assert await reader.readline() == b"tick\n"
    writer.close()
    await writer.wait_closed()


async def test_a_health_check_every_moment(uml):
    """It connects, says nothing and leaves; who has business with the guest gets a turn always."""
    await uml.plug(1, "data")
    await uml.guest.run(TICKING)
    checks = 0

    async def check() -> None:
        nonlocal checks
        while True:
            await call_and_leave(uml.bench.socket_path("data"), b"")
            checks += 1

    checking = asyncio.create_task(check())
    try:
        for _ in range(TURNS):
            before = checks
            async with asyncio.timeout(DEADLINE):
                reader, writer = await uml.connect("data")
                assert await reader.readline() == b"tick\n"
                writer.close()
                await writer.wait_closed()
                await until(lambda more=before + 10: checks >= more, unless=checking.done)
    finally:
        checking.cancel()
        await asyncio.wait([checking])


@pytest.mark.peer("qemu-ga")
async def test_the_guest_agent_answers_the_living_only(bench):
    """400 requests of clients that gave up, then the agent starts: it hears none of them."""
    name = "org.qemu.guest_agent.0"
    bench.add_port(1, name)
    await bench.serve()
    for number in range(DIALS):
        request = {"execute": "guest-sync", "arguments": {"id": number}}
        await call_and_leave(bench.socket_path(name), json.dumps(request).encode() + b"\n")
    reader, writer = await bench.connect(name)
    guest = await boot_uml(bench)
    await guest.run("mkdir -p /run/ga; qemu-ga -d -p /dev/vport0p1 -t /run/ga -f /run/ga/pid")
    request = {"execute": "guest-sync", "arguments": {"id": 4711}}
    writer.write(json.dumps(request).encode() + b"\n")
    async with asyncio.timeout(60):
        assert json.loads(await reader.readline()) == {"return": 4711}
        writer.close()
        await writer.wait_closed()
        for number in range(DIALS):
            request = {"execute": "guest-sync", "arguments": {"id": number}}
            await call_and_leave(bench.socket_path(name), json.dumps(request).encode() + b"\n")
        # What the agent answers to those is kept for nobody in particular; it answers on.
        reader, writer = await bench.connect(name)
        request = {"execute": "guest-sync", "arguments": {"id": 4712}}
        writer.write(json.dumps(request).encode() + b"\n")
        while json.loads(await reader.readline()) != {"return": 4712}:
            pass
    writer.close()
    await writer.wait_closed()
