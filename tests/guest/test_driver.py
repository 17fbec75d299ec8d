"""The driver against a scripted device: Linux's messages in its order, and what devices break."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator

import pytest

from tests.support.leaks import held
from tests.support.scripted_backend import ScriptedDevice
from tests.support.waiting import turns, until
from vring_serial.guest.errors import (
    BackendClosedError,
    BackendError,
    BackendRefusedError,
    BackendTimeoutError,
    PortBusyError,
    PortRemovedError,
)
from vring_serial.guest.guest import EmbeddedGuest
from vring_serial.proto import vhost_user as vu
from vring_serial.proto.console import NO_PORT, ConsoleFeature, ControlEvent

DEVICE_READY, PORT_ADD, PORT_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = (
    ControlEvent
)
PORT1_RX, PORT1_TX = 4, 5


@pytest.fixture
async def guest(scripted) -> AsyncIterator[EmbeddedGuest]:
    async with EmbeddedGuest(scripted.path, queue_size=64, timeout=1) as guest:
        yield guest


@pytest.fixture
async def device(scripted, guest: EmbeddedGuest):
    """The device after DEVICE_READY."""
    device = ScriptedDevice(scripted.backend)
    assert await device.next_control() == (NO_PORT, DEVICE_READY, 1)
    return device


@pytest.fixture
async def port(device, guest: EmbeddedGuest):
    """Port 1, its host end open."""
    device.control(1, PORT_ADD)
    assert await device.next_control() == (1, PORT_READY, 1)
    device.control(1, PORT_NAME, payload=b"one")
    device.control(1, PORT_OPEN)
    port = await guest.wait_port(name="one", timeout=5)
    await port.wait_host()
    return port


async def test_the_life_of_a_port_in_linuxs_messages(device, guest: EmbeddedGuest) -> None:
    device.control(1, PORT_ADD)
    # Its receive queue is full before PORT_READY.
    assert await device.next_control() == (1, PORT_READY, 1)
    assert device.queues[PORT1_RX].available() == 64
    assert device.queues[8].available() == 0
    device.control(1, PORT_NAME, payload=b"com.redhat.spice.0\0")
    port = await guest.wait_port(name="com.redhat.spice.0", timeout=5)
    assert (port.nr, port.is_console, port.host_connected) == (1, False, False)
    reader, writer = await port.open()
    assert await device.next_control() == (1, PORT_OPEN, 1)
    device.control(1, PORT_OPEN)
    await port.wait_host()
    device.send(PORT1_RX, b"from the host")
    assert await reader.read(100) == b"from the host"
    writer.write(b"from the guest")
    assert await device.receive(PORT1_TX) == b"from the guest"
    writer.close()
    await writer.wait_closed()
    assert await device.next_control() == (1, PORT_OPEN, 0)
    device.control(1, PORT_ADD)  # again: Linux answers, and keeps the name
    assert await device.next_control() == (1, PORT_READY, 1)
    device.control(1, PORT_NAME, payload=b"other")
    device.control(1, PORT_REMOVE)
    await port.wait_removed()
    assert port.name == "com.redhat.spice.0"
    assert 1 not in guest.ports
    with pytest.raises(PortRemovedError, match="removed"):
        await port.open()


async def test_a_console_opens_itself_and_follows_its_size(device, guest: EmbeddedGuest) -> None:
    device.control(0, PORT_ADD)
    assert await device.next_control() == (0, PORT_READY, 1)
    device.control(0, CONSOLE_PORT)
    assert await device.next_control() == (0, PORT_OPEN, 1)
    device.control(0, RESIZE, 0, (80).to_bytes(2, "little") + (25).to_bytes(2, "little"))
    console = await guest.wait_port(0)
    await until(lambda: console.size == (80, 25))
    assert console.is_console
    device.send(0, b"login: ")
    reader, writer = await console.open()
    assert await reader.read(100) == b"login: "
    writer.write(b"root\n")  # whether or not the host end is open
    assert await device.receive(1) == b"root\n"
    writer.close()
    await writer.wait_closed()
    reader, writer = await console.open()
    device.control(0, PORT_ADD)  # had the console said PORT_OPEN(0) or (1), it would come first
    assert await device.next_control() == (0, PORT_READY, 1)
    writer.transport.abort()


async def test_writers_block_while_the_host_end_is_closed(device, port) -> None:
    _, writer = await port.open()
    assert await device.next_control() == (1, PORT_OPEN, 1)
    device.control(1, PORT_OPEN, 0)
    await port.wait_host(False)
    writer.write(b"held")
    draining = asyncio.ensure_future(writer.drain())
    await turns()
    assert not draining.done()
    assert device.queues[PORT1_TX].available() == 0
    device.control(1, PORT_OPEN)
    await asyncio.wait_for(draining, 5)
    assert await device.receive(PORT1_TX) == b"held"
    writer.transport.abort()


async def test_nothing_is_written_before_the_device_has_heard_of_the_opening(device, port) -> None:
    _, writer = await port.open()
    writer.write(b"early")
    draining = asyncio.ensure_future(writer.drain())
    await turns()
    assert device.queues[PORT1_TX].available() == 0
    assert not draining.done()
    assert await device.next_control() == (1, PORT_OPEN, 1)
    assert await device.receive(PORT1_TX) == b"early"
    await draining
    writer.close()
    await writer.wait_closed()


async def test_a_new_opener_does_not_get_what_was_for_the_last_one(device, port) -> None:
    _, writer = await port.open()
    assert await device.next_control() == (1, PORT_OPEN, 1)
    device.send(PORT1_RX, b"for the first")
    writer.transport.abort()
    reader, writer = await port.open()
    assert await device.next_control() == (1, PORT_OPEN, 0)
    assert await device.next_control() == (1, PORT_OPEN, 1)
    device.send(PORT1_RX, b"for the second")
    assert await reader.read(100) == b"for the second"
    writer.transport.abort()


async def test_what_the_device_sends_the_last_opener_late_is_not_for_the_next(device, port) -> None:
    """Before it has heard that the port was closed, and what waits in the ring at an opening."""
    _, writer = await port.open()
    assert await device.next_control() == (1, PORT_OPEN, 1)
    writer.close()
    await writer.wait_closed()
    reader, writer = await port.open()
    device.send(PORT1_RX, b"it has not heard")
    await turns()
    device.send(PORT1_RX, b"nor now")
    assert await device.next_control() == (1, PORT_OPEN, 0)
    assert await device.next_control() == (1, PORT_OPEN, 1)
    device.send(PORT1_RX, b"to the second")
    assert await reader.readexactly(13) == b"to the second"
    writer.close()
    await writer.wait_closed()
    assert await device.next_control() == (1, PORT_OPEN, 0)
    await turns()
    device.send(PORT1_RX, b"nobody has looked at it")
    reader, writer = await port.open()
    assert await device.next_control() == (1, PORT_OPEN, 1)
    device.send(PORT1_RX, b"to the third")
    assert await reader.readexactly(12) == b"to the third"
    writer.transport.abort()


async def test_a_port_that_is_closed_again_before_the_device_heard_of_the_opening(
    device, port
) -> None:
    _, writer = await port.open()
    assert await device.next_control() == (1, PORT_OPEN, 1)
    for _ in range(3):
        writer.close()
        await writer.wait_closed()
        reader, writer = await port.open()
    assert await device.next_control() == (1, PORT_OPEN, 0)
    assert await device.next_control() == (1, PORT_OPEN, 1)
    device.send(PORT1_RX, b"here")
    assert await reader.readexactly(4) == b"here"
    writer.write(b"there")
    assert await device.receive(PORT1_TX) == b"there"
    writer.transport.abort()


async def test_drain_returns_when_all_is_in_the_ring(device, port) -> None:
    _, writer = await port.open()
    assert await device.next_control() == (1, PORT_OPEN, 1)
    data = bytes(range(256)) * 16384  # 4 MiB: twice what the transmit buffers hold
    writer.write(data)
    draining = asyncio.ensure_future(writer.drain())
    got = bytearray()
    while not draining.done():
        got += await device.receive(PORT1_TX)
    assert len(got) >= len(data) - (64 * 32768)
    chunk = await device.receive(PORT1_TX)
    assert len(chunk) == 32768
    got += chunk
    while len(got) < len(data):
        got += await device.receive(PORT1_TX)
    assert bytes(got) == data
    writer.close()
    await writer.wait_closed()


async def test_close_waits_until_the_device_has_used_everything(device, port) -> None:
    _, writer = await port.open()
    assert await device.next_control() == (1, PORT_OPEN, 1)
    writer.write(b"last words")
    writer.close()
    await turns()
    assert device.queues[3].available() == 0  # no PORT_OPEN(0) yet
    assert await device.receive(PORT1_TX) == b"last words"
    await writer.wait_closed()
    assert await device.next_control() == (1, PORT_OPEN, 0)


async def test_close_while_the_host_end_is_closed_drops_what_is_not_in_the_ring(
    device, port
) -> None:
    _, writer = await port.open()
    assert await device.next_control() == (1, PORT_OPEN, 1)
    device.control(1, PORT_OPEN, 0)
    await port.wait_host(False)
    writer.write(b"nobody hears this")
    writer.close()
    await writer.wait_closed()
    assert await device.next_control() == (1, PORT_OPEN, 0)
    assert device.queues[PORT1_TX].available() == 0


async def test_end_of_file_comes_after_the_data_and_the_opening_goes_on(device, port) -> None:
    reader, _ = await port.open()
    assert await device.next_control() == (1, PORT_OPEN, 1)
    device.send(PORT1_RX, b"first")
    device.control(1, PORT_OPEN, 0)
    assert await reader.read() == b"first"
    second, writer = await port.open()
    reading = asyncio.ensure_future(second.read())
    await turns()
    assert not reading.done(), "no end of file before the host end was there again"
    device.control(1, PORT_OPEN, 1)
    device.send(PORT1_RX, b"second")
    device.control(1, PORT_OPEN, 0)
    assert await reading == b"second"
    device.control(1, PORT_ADD)
    assert await device.next_control() == (1, PORT_READY, 1)  # and no PORT_OPEN in between
    writer.close()
    await writer.wait_closed()


async def test_a_host_end_that_flaps_before_a_slow_reader_loses_nothing(device, port) -> None:
    reader, writer = await port.open(limit=16)
    assert await device.next_control() == (1, PORT_OPEN, 1)
    device.send(PORT1_RX, b"x" * 100)
    await until(lambda: not writer.transport.is_reading())
    for turn in range(3):
        device.send(PORT1_RX, b"turn %d" % turn)
        device.control(1, PORT_OPEN, 0)
        await port.wait_host(False)
        device.control(1, PORT_OPEN, 1)
        await port.wait_host(True)
    assert await reader.read() == b"x" * 100 + b"turn 0"
    for turn in range(1, 3):
        reader, writer = await port.open()
        assert await reader.read() == b"turn %d" % turn
    assert device.queues[PORT1_RX].available() == 64
    writer.transport.abort()


async def test_one_opener_at_a_time(device, port) -> None:
    _, writer = await port.open()
    with pytest.raises(PortBusyError, match="port 1 is open already"):
        await port.open()
    writer.close()
    await writer.wait_closed()
    _, writer = await port.open()
    writer.transport.abort()


async def test_what_arrives_at_a_closed_port_is_discarded(device, port) -> None:
    device.send(PORT1_RX, b"too early")
    await until(lambda: device.queues[PORT1_RX].available() == 64)
    reader, writer = await port.open()
    device.send(PORT1_RX, b"in time")
    assert await reader.read(100) == b"in time"
    writer.transport.abort()


async def test_a_reader_that_does_not_read_stops_the_device(device, port) -> None:
    reader, writer = await port.open(limit=1024)
    device.send(PORT1_RX, b"a" * 4096)
    await until(lambda: not writer.transport.is_reading())
    for _ in range(64):
        device.send(PORT1_RX, b"b" * 4096)
    await turns()
    assert device.queues[PORT1_RX].available() == 0
    assert await reader.readexactly(65 * 4096) == b"a" * 4096 + b"b" * 64 * 4096
    await until(lambda: device.queues[PORT1_RX].available() == 64)
    writer.transport.abort()


async def test_removal_ends_readers_and_writers_and_the_number_can_come_back(
    device, port, guest: EmbeddedGuest
) -> None:
    reader, writer = await port.open()
    assert await device.next_control() == (1, PORT_OPEN, 1)
    reading = asyncio.ensure_future(reader.read(1))
    await turns(1)
    device.control(1, PORT_REMOVE)
    with pytest.raises(PortRemovedError, match="port 1: the device removed it"):
        await reading
    with pytest.raises(PortRemovedError):
        await writer.wait_closed()
    device.control(1, PORT_ADD)
    assert await device.next_control() == (1, PORT_READY, 1)
    assert device.queues[PORT1_RX].available() == 64
    again = await guest.wait_port(1)
    assert again is not port
    assert again.name == ""
    reader, writer = await again.open()
    device.control(1, PORT_OPEN)
    device.send(PORT1_RX, b"back")
    assert await reader.read(10) == b"back"
    writer.transport.abort()


async def test_messages_that_make_no_sense_are_ignored(device, port, guest: EmbeddedGuest) -> None:
    device.send(2, b"short")
    device.control(7, PORT_OPEN)  # no such port
    device.control(1, PORT_READY)  # not a device's message
    device.control(1, 99)
    device.control(9999, PORT_ADD)  # beyond max_nr_ports
    device.control(NO_PORT, PORT_ADD)
    device.control(1, RESIZE, 0, b"\1")
    device.control(1, PORT_ADD)
    assert await device.next_control() == (1, PORT_READY, 1)
    assert set(guest.ports) == {1}


async def test_a_device_that_talks_nonsense_does_not_fill_the_log(
    device, guest: EmbeddedGuest, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(60):
        device.control(9, PORT_OPEN)
    device.control(1, PORT_ADD)
    assert await device.next_control() == (1, PORT_READY, 1)
    assert len(caplog.records) == 21


async def test_a_new_configuration_and_a_device_that_asks_for_a_reset(scripted) -> None:
    def prepare(backend) -> None:
        backend.features &= ~int(ConsoleFeature.MULTIPORT)
        backend.protocol_features |= vu.ProtocolFeature.STATUS

    scripted.prepare = prepare
    async with EmbeddedGuest(scripted.path, timeout=1) as guest:
        backend = scripted.backend
        with socket.socket(fileno=os.dup(backend.fds["SET_BACKEND_REQ_FD"][0])) as channel:
            console = await guest.wait_port(0)
            backend.config = (132).to_bytes(2, "little") + (43).to_bytes(2, "little") + bytes(8)
            asked = backend.requests.count("GET_CONFIG")
            channel.sendall(vu.request(vu.BackendRequest.CONFIG_CHANGE_MSG) * 50)
            await until(lambda: console.size == (132, 43))
            assert backend.requests.count("GET_CONFIG") - asked <= 3
            backend.status |= 64
            channel.sendall(vu.request(vu.BackendRequest.CONFIG_CHANGE_MSG))
            assert "asks for a reset" in str(await guest.wait_lost())


async def test_many_control_messages_need_few_buffers(device, guest: EmbeddedGuest) -> None:
    for nr in range(4):
        device.control(nr, PORT_ADD)
        device.control(nr, PORT_NAME, payload=b"%d" % nr)
    assert [await device.next_control() for _ in range(4)] == [
        (nr, PORT_READY, 1) for nr in range(4)
    ]
    await guest.wait_port(name="3")


async def test_a_device_that_takes_no_control_message_times_out(scripted) -> None:
    async with EmbeddedGuest(scripted.path, timeout=0.1) as guest:
        error = await asyncio.wait_for(guest.wait_lost(), 5)
        assert isinstance(error, BackendTimeoutError)
        assert "did not take a message in 0.1 s" in str(error)


async def test_a_used_head_that_was_never_available(device, port, guest: EmbeddedGuest) -> None:
    reader, _ = await port.open()
    queue = device.queues[PORT1_RX]
    chain = queue.pop()
    queue.push(chain, 1)
    queue.memory.write(device.addresses[PORT1_RX].used + 4, (63).to_bytes(4, "little"))
    first_used = queue.memory.read(device.addresses[PORT1_RX].used, 4)
    queue.memory.write(device.addresses[PORT1_RX].used, first_used[:2] + b"\xff\x7f")
    device.call(PORT1_RX)
    with pytest.raises(BackendError, match="queue 4"):
        await asyncio.wait_for(reader.read(1), 5)
    assert isinstance(guest.lost, BackendError)
    with pytest.raises(BackendError):
        await guest.wait_port(2)


async def test_more_bytes_than_the_buffer_has(device, port, guest: EmbeddedGuest) -> None:
    reader, _ = await port.open()
    queue = device.queues[PORT1_RX]
    queue.push(queue.pop(), 1)
    queue.memory.write(device.addresses[PORT1_RX].used + 8, (4097).to_bytes(4, "little"))
    device.call(PORT1_RX)
    with pytest.raises(BackendError, match="4097 bytes written into a buffer of 4096"):
        await asyncio.wait_for(reader.read(1), 5)


async def test_a_backend_that_dies_ends_every_port(
    scripted, device, port, guest: EmbeddedGuest
) -> None:
    reader, writer = await port.open()
    reading = asyncio.ensure_future(reader.read(1))
    await turns(1)
    scripted.backend.close()
    with pytest.raises(BackendClosedError, match="closed the connection"):
        await asyncio.wait_for(reading, 5)
    writer.write(b"into the void")
    assert writer.is_closing()
    assert isinstance(await guest.wait_lost(), BackendClosedError)


async def test_stop_leaves_in_order(scripted, device, port, guest: EmbeddedGuest) -> None:
    _, writer = await port.open()
    before = len(scripted.backend.requests)
    await guest.aclose()
    requests = scripted.backend.requests[before:]
    assert requests == ["SET_VRING_ENABLE"] * 10 + ["GET_VRING_BASE"] * 10
    stopped = [p.index for p in scripted.backend.payloads[before + 10 :]]
    assert stopped == list(range(9, -1, -1))
    with pytest.raises(PortRemovedError, match="guest was stopped"):
        await writer.wait_closed()
    await guest.aclose()


# --- what may be missing


async def test_without_multiport_port_0_is_a_console(scripted) -> None:
    scripted.prepare = lambda backend: setattr(backend, "features", 1 << 32 | 1 << 30)
    async with EmbeddedGuest(scripted.path, timeout=1) as guest:
        device = ScriptedDevice(scripted.backend)
        assert set(device.queues) == {0, 1}
        console = await guest.wait_port(0)
        assert console.is_console
        reader, writer = await console.open()
        device.send(0, b"hello")
        assert await reader.read(10) == b"hello"
        writer.write(b"world")
        assert await device.receive(1) == b"world"
        writer.transport.abort()


async def test_without_config_there_is_no_multiport(scripted) -> None:
    def prepare(backend) -> None:
        backend.protocol_features &= ~vu.ProtocolFeature.CONFIG

    scripted.prepare = prepare
    async with EmbeddedGuest(scripted.path, timeout=1) as guest:
        assert not guest.features & ConsoleFeature.MULTIPORT
        assert guest.ports[0].is_console


async def test_fewer_queues_than_ports(scripted) -> None:
    scripted.prepare = lambda backend: setattr(backend, "queues", 6)
    async with EmbeddedGuest(scripted.path, timeout=1) as guest:
        device = ScriptedDevice(scripted.backend)
        assert await device.next_control() == (NO_PORT, DEVICE_READY, 1)
        assert set(device.queues) == set(range(6))
        device.control(2, PORT_ADD)
        assert await device.next_control() == (2, PORT_READY, 0)
        device.control(1, PORT_ADD)
        assert await device.next_control() == (1, PORT_READY, 1)
        assert set(guest.ports) == {1}


async def test_a_port_without_memory_is_not_ready(scripted) -> None:
    async with EmbeddedGuest(scripted.path, timeout=1, memory=3 << 20) as guest:
        device = ScriptedDevice(scripted.backend)
        await device.next_control()
        device.control(1, PORT_ADD)
        assert await device.next_control() == (1, PORT_READY, 1)
        device.control(2, PORT_ADD)
        assert await device.next_control() == (2, PORT_READY, 0)
        assert set(guest.ports) == {1}


@pytest.mark.parametrize(
    ("attribute", "value", "why"),
    [
        ("features", 1 << 30, "VERSION_1"),
        ("queues", 2, "a console needs 4"),
        ("config", bytes(8), "max_nr_ports is 0"),
        ("config", b"\xff" * 8, "max_nr_ports is 4294967295"),
        ("refuse", {vu.Request.SET_MEM_TABLE}, "refused SET_MEM_TABLE"),
        ("refuse", {vu.Request.SET_VRING_ADDR}, "refused SET_VRING_ADDR"),
    ],
)
async def test_a_start_that_fails_leaves_nothing_behind(
    scripted, attribute: str, value: object, why: str
) -> None:
    before = held().descriptors
    scripted.prepare = lambda backend: setattr(backend, attribute, value)
    guest = EmbeddedGuest(scripted.path, timeout=1)
    with pytest.raises(BackendError, match=why):
        await guest.start()
    await until(lambda: scripted.backend.lost.done())
    scripted.backend.close()
    assert held().descriptors == before


async def test_a_device_that_does_not_take_the_features(scripted) -> None:
    def prepare(backend) -> None:
        backend.protocol_features |= vu.ProtocolFeature.STATUS
        backend.script[vu.Request.GET_STATUS] = vu.reply(vu.Request.GET_STATUS, vu.U64(3))

    scripted.prepare = prepare
    with pytest.raises(BackendRefusedError, match="does not accept SIZE MULTIPORT"):
        await EmbeddedGuest(scripted.path, timeout=1).start()
