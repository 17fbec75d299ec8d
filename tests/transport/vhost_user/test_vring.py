"""When a queue runs, and what may change while it does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.leaks import held
from tests.support.waiting import DEADLINE, turns, until
from vring_serial.proto.vhost_user import (
    U64,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    Request,
    SingleRegion,
    VringAddress,
    VringDescriptor,
    VringState,
)
from vring_serial.transport.vhost_user.backend import PROTOCOL_FEATURES, VhostUserBackend

FEATURES = 1 << 32 | 1 << 29 | 1 << 28
BIT_30 = 1 << 30
USER = 0x7F12_3456_0000
MEMORY_SIZE = 1 << 20
BUFFERS = 0x80000
OFFERED = int(PROTOCOL_FEATURES)


def starts(device: Any) -> list[tuple[object, ...]]:
    return [what for what in device.told if what[0] in ("start", "stop")]


# --- enabling -------------------------------------------------------------------------------------


async def test_the_size_may_come_last(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    kick, _ = frontend.eventfds(0)
    for kind, payload, fds in (
        (Request.SET_VRING_ADDR, frontend.ring(0), ()),
        (Request.SET_VRING_KICK, VringDescriptor(0), (kick,)),
        (Request.SET_VRING_ENABLE, VringState(0, 1), ()),
    ):
        assert await frontend.acked(kind, payload, fds) == 0
    assert not device.running
    assert await frontend.acked(Request.SET_VRING_NUM, VringState(0, 64)) == 0
    assert await frontend.echo(0, b"runs")


async def test_what_is_available_before_enabling_is_served_without_a_kick(
    frontend: Any, device: Any
) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0, enable=False)
    frontend.put(0, b"early")
    assert not device.running
    await frontend.enable(0)
    assert await frontend.used(0) == [5]
    assert frontend.echoed(b"early")


async def test_a_kick_before_enabling_is_not_lost(frontend: Any, device: Any) -> None:
    device.serves_on_start = False  # nothing but the kick makes it look
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0, enable=False)
    frontend.put(0, b"early")
    frontend.kick(0)
    await frontend.ask(Request.GET_FEATURES)
    assert not device.echoed
    await frontend.enable(0)
    assert await frontend.used(0) == [5]


async def test_disabling_and_enabling_goes_on_where_it_was(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    assert await frontend.echo(0, b"one")
    await frontend.enable(0, 0)
    frontend.put(0, b"two", 1)
    frontend.kick(0)
    await frontend.enable(0, 0)
    assert device.echoed == [b"one"]
    await frontend.enable(0)
    await frontend.enable(0)
    assert await frontend.used(0) == [3]
    assert frontend.echoed(b"two", 1)
    assert starts(device) == [("start", 0, 0), ("stop", 0, 1), ("start", 0, 1)]


@pytest.mark.parametrize("says_features", [True, False])
async def test_rings_start_enabled_for_frontends_without_protocol_features(
    says_features: bool, frontend: Any, device: Any
) -> None:
    if says_features:
        frontend.send(Request.SET_FEATURES, U64(FEATURES if says_features else 0))
    frontend.send(Request.SET_MEM_TABLE, MemoryTable((frontend.region,)), (frontend.memfd,))
    kick, call = frontend.eventfds(1)
    frontend.send(Request.SET_VRING_NUM, VringState(1, 64))
    frontend.send(Request.SET_VRING_BASE, VringState(1, 0))
    frontend.send(Request.SET_VRING_ADDR, frontend.ring(1))
    frontend.send(Request.SET_VRING_CALL, VringDescriptor(1), (call,))
    await frontend.ask(Request.GET_FEATURES)
    assert not device.running
    frontend.send(Request.SET_VRING_KICK, VringDescriptor(1), (kick,))
    await frontend.ask(Request.GET_FEATURES)
    assert 1 in device.running
    if says_features:
        assert await frontend.echo(1, b"at once")
    # Speaking of the bit later disables nothing that runs.
    frontend.send(Request.SET_FEATURES, U64((FEATURES if says_features else 0) | BIT_30))
    await frontend.ask(Request.GET_FEATURES)
    assert 1 in device.running
    assert await frontend.base(1) == int(says_features)
    assert not device.running


async def test_a_queue_that_new_memory_lacks_stops_no_other(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    await frontend.set_up(1)
    start = 0x20000  # queue 0 lies below it
    region = MemoryRegion(start, MEMORY_SIZE - start, USER + start, 4096 + start)
    table = MemoryTable((region,))
    assert await frontend.acked(Request.SET_MEM_TABLE, table, (frontend.memfd,)) == 1
    assert list(device.running) == [1]
    assert await frontend.echo(1, b"goes on")


async def test_features_said_again_leave_queues_alone(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    for _ in range(3):
        assert await frontend.acked(Request.SET_FEATURES, U64(FEATURES | BIT_30)) == 0
    assert await frontend.echo(0, b"x")
    assert starts(device) == [("start", 0, 0)]


async def test_queues_that_were_never_set_up_may_be_enabled_and_stopped(
    frontend: Any, device: Any
) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.enable(3)
    assert await frontend.base(3) == 0
    await frontend.enable(3, 0)
    assert not starts(device)


async def test_a_stopped_ring_waits_for_a_new_kick_descriptor(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    assert await frontend.echo(0, b"x")
    assert await frontend.base(0) == 1
    assert await frontend.base(0) == 1
    await frontend.enable(0)
    assert not device.running
    kick, call = frontend.kicks[0], frontend.calls[0]
    assert await frontend.acked(Request.SET_VRING_KICK, VringDescriptor(0), (kick,)) == 0
    assert await frontend.acked(Request.SET_VRING_CALL, VringDescriptor(0), (call,)) == 0
    assert await frontend.echo(0, b"y")
    assert starts(device)[-1] == ("start", 0, 1)


async def test_indices_go_on_from_the_base_and_wrap(frontend: Any) -> None:
    await frontend.negotiate(OFFERED)
    address = frontend.ring(0, base=65534)
    for ring in (address.available, address.used):
        frontend.memory.write(ring - USER + 2, (65534).to_bytes(2, "little"))
    kick, call = frontend.eventfds(0)
    for kind, payload, fds in (
        (Request.SET_VRING_NUM, VringState(0, 64), ()),
        (Request.SET_VRING_BASE, VringState(0, 65534), ()),
        (Request.SET_VRING_ADDR, address, ()),
        (Request.SET_VRING_CALL, VringDescriptor(0), (call,)),
        (Request.SET_VRING_KICK, VringDescriptor(0), (kick,)),
        (Request.SET_VRING_ENABLE, VringState(0, 1), ()),
    ):
        assert await frontend.acked(kind, payload, fds) == 0
    for text in (b"one", b"two", b"three"):
        assert await frontend.echo(0, text)
    assert await frontend.base(0) == 1


async def test_size_and_base_are_fixed_while_the_queue_runs(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    assert await frontend.acked(Request.SET_VRING_NUM, VringState(0, 128)) != 0
    assert await frontend.acked(Request.SET_VRING_BASE, VringState(0, 5)) != 0
    assert await frontend.echo(0, b"unharmed")


# --- addresses ------------------------------------------------------------------------------------

BAD_ADDRESSES = {
    "descriptors-misaligned": ({"descriptor": USER + 8}, "descriptor table at .* to 16 bytes"),
    "available-misaligned": ({"available": USER + 4097}, "available ring at .* to 2 bytes"),
    "used-misaligned": ({"used": USER + 8194}, "used ring at .* to 4 bytes"),
    "descriptors-outside": ({"descriptor": USER - 16}, "descriptor table .* not in guest memory"),
    "available-past-the-end": ({"available": USER + MEMORY_SIZE - 64}, "available ring .* not in"),
    "used-past-the-end": ({"used": USER + MEMORY_SIZE - 512}, "used ring .* not in guest memory"),
    "guest-instead-of-user-addresses": ({"descriptor": 0}, "user address 0x0, 1024 bytes: not in"),
    "wrapping": ({"used": 2**64 - 16}, "used ring at user address 0xfffffffffffffff0"),
}


@pytest.mark.parametrize("name", BAD_ADDRESSES)
@pytest.mark.parametrize("running", [False, True], ids=["stopped", "running"])
async def test_addresses_that_cannot_be(
    name: str, running: bool, frontend: Any, device: Any, caplog: pytest.LogCaptureFixture
) -> None:
    changes, why = BAD_ADDRESSES[name]
    parts = {"descriptor": USER, "available": USER + 4096, "used": USER + 8192}
    await frontend.negotiate(OFFERED)
    if running:
        await frontend.set_up(0)
    else:
        assert await frontend.acked(Request.SET_VRING_NUM, VringState(0, 64)) == 0
    bad = VringAddress(0, 0, **(parts | changes))
    assert await frontend.acked(Request.SET_VRING_ADDR, bad) != 0
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert re.search(f"refused SET_VRING_ADDR: queue 0: .*{why}", line), line
    if running:
        assert await frontend.echo(0, b"as it was")
    else:
        await frontend.set_up(0)
        assert await frontend.echo(0, b"set right")


async def test_addresses_are_checked_at_last_when_the_queue_is_to_run(frontend: Any) -> None:
    """Size and memory may come after the addresses; whoever makes it run gets the answer."""
    assert await frontend.acked(Request.SET_PROTOCOL_FEATURES, U64(OFFERED)) == 0
    assert await frontend.acked(Request.SET_FEATURES, U64(FEATURES | BIT_30)) == 0
    kick, _ = frontend.eventfds(0)
    bad = VringAddress(0, 0, USER, USER + 8, USER)
    assert await frontend.acked(Request.SET_VRING_ADDR, bad) == 0
    assert await frontend.acked(Request.SET_VRING_NUM, VringState(0, 64)) == 0
    assert await frontend.acked(Request.SET_VRING_KICK, VringDescriptor(0), (kick,)) == 0
    assert await frontend.acked(Request.SET_VRING_ENABLE, VringState(0, 1)) != 0
    table = MemoryTable((frontend.region,))
    assert await frontend.acked(Request.SET_MEM_TABLE, table, (frontend.memfd,)) == 0


async def test_a_ring_moves_while_it_runs(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    assert await frontend.echo(0, b"here")
    # The same ring at other user addresses: the memory is mapped there too.
    other = MemoryRegion(MEMORY_SIZE, MEMORY_SIZE, USER + (1 << 30), 4096)
    assert await frontend.acked(Request.ADD_MEM_REG, SingleRegion(other), (frontend.memfd,)) == 0
    there = 0x10000 + USER + (1 << 30)
    address = VringAddress(0, 0, there, there + 16 * 64 + 4 + 128 + 4, there + 16 * 64)
    assert await frontend.acked(Request.SET_VRING_ADDR, address) == 0
    assert await frontend.acked(Request.SET_VRING_ADDR, address) == 0
    assert await frontend.echo(0, b"there")
    assert starts(device)[-1] == ("start", 0, 1)


# --- memory ---------------------------------------------------------------------------------------


async def test_memory_is_exchanged_under_running_queues(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    for index in (0, 1):
        await frontend.set_up(index)
    assert await frontend.echo(0, b"before")
    frontend.put(1, b"meanwhile", 1)
    # The guest's memory moves in the guest, not in the frontend; the rings' addresses are the
    # frontend's, those in the descriptors are the guest's.
    moved = MemoryRegion(1 << 32, MEMORY_SIZE, USER, 4096)
    table = MemoryTable((frontend.region, moved))
    assert await frontend.acked(Request.SET_MEM_TABLE, table, (frontend.memfd,) * 2) == 0
    assert await frontend.used(1) == [9]
    assert frontend.echoed(b"meanwhile", 1)
    table = MemoryTable((moved,))
    assert await frontend.acked(Request.SET_MEM_TABLE, table, (frontend.memfd,)) == 0
    shifted = (1 << 32) + BUFFERS
    frontend.memory.write(BUFFERS, b"after")
    frontend.drivers[0].add([(shifted, 5)], [(shifted + 0x800, 5)])
    if frontend.drivers[0].publish():
        frontend.kick(0)
    assert await frontend.used(0) == [5]
    assert frontend.echoed(b"after")
    assert starts(device)[-2:] == [("start", 0, 1), ("start", 1, 1)]


async def test_a_table_that_cannot_be_mapped_leaves_the_old_one(frontend: Any) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    bad = MemoryTable((MemoryRegion(0, MEMORY_SIZE, USER, 8192),))
    assert await frontend.acked(Request.SET_MEM_TABLE, bad, (frontend.memfd,)) != 0
    assert await frontend.echo(0, b"unharmed")


async def test_a_ring_that_loses_its_memory_stops_until_it_has_a_place_again(
    frontend: Any, device: Any
) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    await frontend.set_up(1)
    assert await frontend.acked(Request.REM_MEM_REG, SingleRegion(frontend.region)) != 0
    assert not device.running
    frontend.put(0, b"in between")
    added = SingleRegion(frontend.region)
    assert await frontend.acked(Request.ADD_MEM_REG, added, (frontend.memfd,)) == 0
    assert await frontend.used(0) == [10]
    assert set(device.running) == {0, 1}


async def test_memory_slots(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    slots = await frontend.number(Request.GET_MAX_MEM_SLOTS)
    assert slots == 64
    size = 4096
    regions = [
        SingleRegion(MemoryRegion((1 << 32) + i * size, size, (1 << 33) + i * size, i * size))
        for i in range(slots)
    ]
    for region in regions[:-1]:
        assert await frontend.acked(Request.ADD_MEM_REG, region, (frontend.memfd,)) == 0
    assert await frontend.acked(Request.ADD_MEM_REG, regions[-1], (frontend.memfd,)) != 0
    assert await frontend.echo(0, b"with many")
    # A descriptor beside it is tolerated, and closed.
    before = held().descriptors
    for region in regions[:-1]:
        assert await frontend.acked(Request.REM_MEM_REG, region, (frontend.memfd,)) == 0
    assert held().descriptors == before
    assert await frontend.echo(0, b"with one")


# --- kicks and calls ------------------------------------------------------------------------------


async def test_queues_without_a_kick_descriptor_are_polled(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    kick = VringDescriptor(0, no_fd=True)
    await frontend.set_up(0, enable=False)
    assert await frontend.acked(Request.SET_VRING_KICK, kick) == 0
    await frontend.enable(0)
    for text in (b"one", b"two"):
        frontend.put(0, text)
        assert await frontend.used(0) == [3]
    assert await frontend.base(0) == 2


async def test_queues_without_a_call_descriptor_call_nobody(frontend: Any) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    call = VringDescriptor(0, no_fd=True)
    assert await frontend.acked(Request.SET_VRING_CALL, call) == 0
    assert await frontend.echo(0, b"x")
    with pytest.raises(BlockingIOError):
        os.eventfd_read(frontend.calls[0])


async def test_the_call_descriptor_changes_while_the_queue_runs(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    assert await frontend.echo(0, b"one")
    assert os.eventfd_read(frontend.calls[0]) == 1
    new = os.eventfd(0, os.EFD_NONBLOCK)
    assert await frontend.acked(Request.SET_VRING_CALL, VringDescriptor(0), (new,)) == 0
    # What the old one was told may have been lost, so the new one is told at once.
    assert os.eventfd_read(new) == 1
    assert await frontend.echo(0, b"two")
    assert os.eventfd_read(new) == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(frontend.calls[0])
    os.close(new)
    # The queue was never taken from the device for that.
    assert starts(device) == [("start", 0, 0)]


async def test_the_kick_descriptor_changes_while_the_queue_runs(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    assert await frontend.echo(0, b"one")
    os.close(frontend.kicks[0])
    kick = frontend.kicks[0] = os.eventfd(0, os.EFD_NONBLOCK)
    assert await frontend.acked(Request.SET_VRING_KICK, VringDescriptor(0), (kick,)) == 0
    assert await frontend.echo(0, b"two")
    assert starts(device)[-1] == ("start", 0, 1)


async def test_calls_over_socket_pairs_are_8_bytes_and_never_block(frontend: Any) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # Blocking on the frontend's side, and full.
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while theirs.send(bytes(8)):
                pass
        theirs.setblocking(True)
        fds = (theirs.fileno(),)
        assert await frontend.acked(Request.SET_VRING_CALL, VringDescriptor(0), fds) == 0
        assert await frontend.echo(0, b"not blocked")
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while ours.recv(1 << 20):
                pass
        assert await frontend.echo(0, b"called")
        assert ours.recv(100) == (1).to_bytes(8, "little")
        ours.close()
        assert await frontend.echo(0, b"nobody hears the call")


# --- in band --------------------------------------------------------------------------------------

INBAND = OFFERED | ProtocolFeature.INBAND_NOTIFICATIONS


async def test_in_band_notifications_are_not_offered_unasked(frontend: Any) -> None:
    assert await frontend.number(Request.GET_PROTOCOL_FEATURES) == OFFERED
    frontend.send(Request.SET_PROTOCOL_FEATURES, U64(INBAND))
    assert await frontend.is_sent_away()


class TestInBand:
    """Kicks and calls as messages."""

    @pytest.fixture
    def backend_options(self) -> dict[str, bool]:
        return {"inband_notifications": True}

    async def set_up(self, frontend: Any, index: int) -> None:
        """As User-Mode Linux does it: neither a kick nor a call descriptor."""
        for kind, payload in (
            (Request.SET_VRING_NUM, VringState(index, 64)),
            (Request.SET_VRING_BASE, VringState(index, 0)),
            (Request.SET_VRING_ADDR, frontend.ring(index)),
            (Request.SET_VRING_ENABLE, VringState(index, 1)),
        ):
            assert await frontend.acked(kind, payload) == 0

    async def test_kicks_and_calls_as_messages(self, frontend: Any, device: Any) -> None:
        assert await frontend.number(Request.GET_PROTOCOL_FEATURES) == INBAND
        await frontend.negotiate(INBAND)
        await frontend.open_channel()
        await self.set_up(frontend, 1)
        # The ring starts with the message.
        assert not device.running
        for text in (b"one", b"two", b"three"):
            frontend.put(1, text)
            assert await frontend.acked(Request.VRING_KICK, VringState(1)) == 0
            assert await frontend.used(1) == [len(text)]
            call = await frontend.asked()
            assert (call.name, call.need_reply) == ("VRING_CALL", True)
            assert call.decode() == VringState(1, 0)
            frontend.acknowledge(call.kind)
        assert await frontend.base(1) == 3
        await self.set_up(frontend, 1)
        frontend.put(1, b"again")
        assert await frontend.acked(Request.VRING_KICK, VringState(1)) == 0
        assert (await frontend.asked()).name == "VRING_CALL"

    async def test_calls_wait_for_the_acknowledgement_and_come_as_one(self, frontend: Any) -> None:
        await frontend.negotiate(INBAND)
        await frontend.open_channel()
        await self.set_up(frontend, 1)
        for slot in range(5):
            frontend.put(1, b"x", slot)
            assert await frontend.acked(Request.VRING_KICK, VringState(1)) == 0
            assert await frontend.used(1) == [1]
        await turns()
        first = await frontend.asked()
        frontend.channel.setblocking(False)
        with pytest.raises(BlockingIOError):
            frontend.channel.recv(100)
        frontend.acknowledge(first.kind)
        second = await frontend.asked()
        frontend.acknowledge(second.kind)
        await turns()
        with pytest.raises(BlockingIOError):
            frontend.channel.recv(100)

    async def test_descriptors_are_preferred_where_there_are_some(self, frontend: Any) -> None:
        """QEMU acknowledges the feature and yet uses eventfds."""
        await frontend.negotiate(INBAND)
        await frontend.open_channel()
        await frontend.set_up(0)
        assert await frontend.echo(0, b"by eventfd")
        assert os.eventfd_read(frontend.calls[0]) >= 1
        frontend.channel.setblocking(False)
        with pytest.raises(BlockingIOError):
            frontend.channel.recv(100)

    async def test_broken_rings_are_reported_in_band(self, frontend: Any) -> None:
        await frontend.negotiate(INBAND & ~ProtocolFeature.STATUS)
        await frontend.open_channel()
        await self.set_up(frontend, 2)
        frontend.memory.write(0x30000 + 16 * 64 + 2, b"\xff\xff")
        assert await frontend.acked(Request.VRING_KICK, VringState(2)) == 0
        error = await frontend.asked()
        assert (error.name, error.decode()) == ("VRING_ERR", VringState(2, 0))

    @pytest.mark.parametrize(
        "missing", [ProtocolFeature.BACKEND_REQ, ProtocolFeature.REPLY_ACK], ids=lambda f: f.name
    )
    async def test_what_they_need_has_to_be_negotiated_too(
        self, missing: ProtocolFeature, frontend: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        frontend.send(Request.SET_PROTOCOL_FEATURES, U64(INBAND & ~missing), need_reply=True)
        assert await frontend.is_sent_away()
        assert "INBAND_NOTIFICATIONS needs BACKEND_REQ and REPLY_ACK" in caplog.text

    async def test_a_session_leaves_no_descriptor(
        self, backend: VhostUserBackend, connect: Callable[[], Any]
    ) -> None:
        gone = asyncio.Event()
        backend.on_peer = lambda what: gone.set() if what == "gone" else None
        before = held().descriptors
        frontend = connect()
        await frontend.negotiate(INBAND)
        await frontend.open_channel()
        await self.set_up(frontend, 1)
        frontend.put(1, b"text")
        assert await frontend.acked(Request.VRING_KICK, VringState(1)) == 0
        assert await frontend.used(1) == [4]
        frontend.close()
        async with asyncio.timeout(DEADLINE):
            await gone.wait()
        # A socket in which something may be unread is closed in a thread.
        await until(lambda: held().descriptors == before)

    async def test_kicks_that_are_malformed(self, frontend: Any) -> None:
        await frontend.negotiate(INBAND)
        assert await frontend.acked(Request.VRING_KICK, VringState(4)) != 0
        assert await frontend.acked(Request.VRING_KICK, VringState(0)) == 0


async def test_a_call_descriptor_that_takes_nothing_hurts_nobody(frontend: Any) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unconnected:
        fds = (unconnected.fileno(),)
        assert await frontend.acked(Request.SET_VRING_CALL, VringDescriptor(0), fds) == 0
        assert await frontend.echo(0, b"served all the same")
