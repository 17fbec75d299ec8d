"""Frontends that make their kick and call descriptors block under the server."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.call_end import CallEnd
from tests.support.scripted_frontend import connect_to
from tests.support.waiting import turns, until
from vring_serial.device.queue_device import QueueDevice
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.vhost_user import Request, VringDescriptor
from vring_serial.transport.event_fds import check_event_descriptor
from vring_serial.transport.vhost_user.backend import VhostUserBackend

FULL = 2**64 - 2


pytestmark = pytest.mark.usefixtures("blocked_call_ends_the_run")


async def test_a_call_that_cannot_be_written(
    backend: VhostUserBackend, connect: Callable[[], Any]
) -> None:
    frontend = connect()
    await frontend.negotiate(await frontend.number(Request.GET_PROTOCOL_FEATURES))
    await frontend.set_up(0)
    os.set_blocking(frontend.calls[0], True)
    os.eventfd_write(frontend.calls[0], FULL)
    for _ in range(10):
        assert await frontend.echo(0, b"served all the same")
    # and one that is full when it comes, and is told what its predecessor was
    assert (
        await frontend.acked(Request.SET_VRING_CALL, VringDescriptor(0), (frontend.calls[0],)) == 0
    )
    assert await frontend.echo(0, b"served all the same")


async def test_an_error_descriptor_that_cannot_be_written(
    backend: VhostUserBackend, connect: Callable[[], Any]
) -> None:
    frontend = connect()
    await frontend.negotiate(await frontend.number(Request.GET_PROTOCOL_FEATURES))
    await frontend.set_up(0)
    blocked = os.eventfd(FULL & 0xFFFFFFFF)
    os.eventfd_write(blocked, FULL - (FULL & 0xFFFFFFFF))
    try:
        descriptor = VringDescriptor(0)
        assert await frontend.acked(Request.SET_VRING_ERR, descriptor, (blocked,)) == 0
        frontend.memory.write(0x10000 + 16 * 64 + 2, (999).to_bytes(2, "little"))  # available index
        frontend.kick(0)
        assert await frontend.acked(Request.SET_OWNER) == 0
    finally:
        os.close(blocked)


@pytest.fixture
async def pumped_frontend(pumped: Any, path: Path) -> AsyncIterator[Any]:
    backend = VhostUserBackend(pumped, str(path))
    await backend.start()
    frontend = connect_to(path)
    await frontend.negotiate(await frontend.number(Request.GET_PROTOCOL_FEATURES))
    await frontend.set_up(0)
    yield frontend
    frontend.close()
    await backend.aclose()


class CountingDevice(QueueDevice):
    """Completes chains unread, and counts how often it is asked to."""

    def __init__(self) -> None:
        super().__init__("counting", 42, num_queues=1)
        self.asked = 0

    def serve(self, index: int, running: RunningQueue) -> bool:
        self.asked += 1
        queue = running.queue
        while (chain := queue.pop()) is not None:
            if queue.push(chain):
                running.call()
        return queue.enable_notifications()


async def test_a_semaphore_as_kick_is_served_once(path: Path) -> None:
    """It stays readable for as long as the frontend likes."""
    device = CountingDevice()
    backend = VhostUserBackend(device, str(path))
    await backend.start()
    frontend = connect_to(path)
    await frontend.negotiate(await frontend.number(Request.GET_PROTOCOL_FEATURES))
    frontend.ring(0)
    await frontend.configure(0, 0)
    kick = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    assert await frontend.acked(Request.SET_VRING_KICK, VringDescriptor(0), (kick,)) == 0
    await frontend.enable(0)
    try:
        for _ in range(3):
            frontend.put(0, b"x")
            os.eventfd_write(kick, 1 << 40)
            await frontend.used(0)
            before = device.asked
            await turns(200)
            assert device.asked - before <= 1
    finally:
        os.close(kick)
        frontend.close()
        await backend.aclose()


async def set_call(frontend: Any, call: Any) -> None:
    assert await frontend.acked(Request.SET_VRING_CALL, VringDescriptor(0), (call.fd,)) == 0


def send_chain(frontend: Any) -> None:
    if frontend.put(0, b"x"):
        frontend.kick(0)


async def wait_all_used(driver: Any) -> None:
    await until(lambda: (driver.get_used(), driver.num_free == driver.size)[1])


async def test_calls_of_another_kind_than_before(
    pumped_frontend: Any, make_call: Callable[[str], Any]
) -> None:
    """Whatever it was when the ring began to run, a driver that sleeps on it is woken."""
    frontend = pumped_frontend
    for before, after in itertools.permutations(CallEnd.KINDS, 2):
        await frontend.enable(0, 0)
        await set_call(frontend, make_call(before))
        await frontend.enable(0)
        call = make_call(after)
        await set_call(frontend, call)
        call.wait()  # for what its predecessor was told
        for _ in range(3):
            send_chain(frontend)
            await asyncio.to_thread(call.wait)
            await wait_all_used(frontend.drivers[0])


async def test_kinds_of_calls_are_exchanged_under_traffic(
    pumped_frontend: Any, make_call: Callable[[str], Any]
) -> None:
    """By a frontend that fills them."""
    frontend = pumped_frontend
    calls = [make_call(kind) for kind in CallEnd.KINDS]
    for turn in range(40):
        for call in calls:
            await set_call(frontend, call)
            for _ in range(4):
                send_chain(frontend)
                call.fill()
                send_chain(frontend)
                await wait_all_used(frontend.drivers[0])
            call.empty()
            send_chain(frontend)
            await asyncio.to_thread(call.wait)
            if call is calls[turn % len(calls)]:
                await frontend.enable(0, 0)
                await frontend.enable(0)


def test_what_could_hold_us_up_is_refused() -> None:
    """A pipe's and a stream's reader can hold their locks while it is made to wait."""
    eventfd = os.eventfd(0)
    reader, writer = os.pipe()
    a, b = socket.socketpair()
    tcp = socket.socket()
    try:
        for writable in (False, True):
            check_event_descriptor(eventfd, writable=writable)
            for bad in (reader, writer, tcp.fileno()):
                with pytest.raises(RemoteProtocolError, match="not an eventfd"):
                    check_event_descriptor(bad, writable=writable)
        check_event_descriptor(a.fileno(), writable=True)
        with pytest.raises(RemoteProtocolError, match="not an eventfd"):
            check_event_descriptor(a.fileno(), writable=False)
        assert a.send(b"still open") == 10
    finally:
        for sock in (a, b, tcp):
            sock.close()
        for fd in (eventfd, reader, writer):
            os.close(fd)
