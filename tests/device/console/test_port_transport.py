"""Ports whose host ends are Python code."""

from __future__ import annotations

import asyncio
import logging
import random

import pytest

from tests.support.console import Recorder
from tests.support.waiting import DEADLINE, turns, until
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.chardev.ringbuf import RingbufChardev
from vring_serial.device.console import events as ev
from vring_serial.device.console.port import Port
from vring_serial.device.console.port_transport import BACKLOG_MAX
from vring_serial.proto.console import CONTROL_RECEIVEQ, ControlEvent


class Rig:
    def __init__(self, controller, guest, nr, protocols) -> None:
        self.controller = controller
        self.guest = guest
        self.nr = nr
        self.protocols = protocols

    @property
    def port(self) -> Port:
        return self.controller.ports[self.nr]

    @property
    def last(self) -> Recorder:
        return self.protocols[-1]

    async def open(self) -> Recorder:
        count = len(self.protocols)
        self.guest.open(self.nr)
        await self.guest.until(lambda: len(self.protocols) > count and self.last.calls == ["made"])
        return self.last


@pytest.fixture
async def rig(make_controller, make_guest):
    async def build(*, console=False, is_open=True, factory=Recorder, **options):
        controller = make_controller(max_ports=3)
        protocols = []

        def make():
            protocols.append(factory())
            return protocols[-1]

        nr = 0 if console else 1
        chardev = ProtocolChardev("python", make)
        controller.add_port(Port(nr, "" if console else "org.test", chardev, console=console))
        await controller.start()
        guest = make_guest(controller, **options)
        guest.boot()
        await guest.ready(nr)
        built = Rig(controller, guest, nr, protocols)
        if is_open and not console:
            await built.open()
        return built

    return build


async def test_asyncio_streams_work_on_a_port(make_controller, make_guest):
    async def upper(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line.upper())
            await writer.drain()
        writer.close()

    tasks: list[asyncio.Task[None]] = []

    def factory() -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader()

        def connected(reader, writer):
            tasks.append(asyncio.create_task(upper(reader, writer)))

        return asyncio.StreamReaderProtocol(reader, connected)

    controller = make_controller(max_ports=3)
    controller.add_port(Port(1, "org.upper", ProtocolChardev("upper", factory)))
    await controller.start()
    guest = make_guest(controller)
    guest.boot()
    await guest.ready(1)
    guest.open(1)
    text = b"a line that comes back\n"
    for number in range(200):
        guest.write(1, text)
        await guest.until(lambda n=number: guest.read(1) == text.upper() * (n + 1))
    guest.close_port(1)
    await guest.until(lambda: tasks[0].done())
    await tasks[0]


async def test_the_transport_says_what_it_stands_for(rig):
    built = await rig()
    transport = built.last.transport
    assert transport.get_extra_info("port") == 1
    assert transport.get_extra_info("name") == b"org.test"
    assert transport.get_extra_info("peername", "none") == "none"
    assert not transport.can_write_eof()
    with pytest.raises(TypeError, match="str"):
        transport.write("text")
    with pytest.raises(ValueError, match="high"):
        transport.set_write_buffer_limits(1, 2)


async def test_a_protocol_that_pauses_leaves_the_guest_its_buffers(rig):
    built = await rig(memory=32 << 20)
    guest, protocol = built.guest, built.last
    protocol.transport.pause_reading()
    sent = b""
    for number in range(50):
        guest.write(1, b"%8d" % number)
        sent += b"%8d" % number
    await guest.settle()
    assert len(guest.rings[5].buffers) == 50
    assert protocol.data == b""
    protocol.transport.resume_reading()
    await guest.until(lambda: guest.completed(1))
    assert protocol.data == sent


async def test_a_chain_larger_than_a_batch_comes_in_pieces_and_stops_where_the_protocol_pauses(rig):
    class Nibbler(Recorder):
        def data_received(self, data):
            super().data_received(data)
            self.calls.append(f"{len(data)}")
            self.transport.pause_reading()

    built = await rig(factory=Nibbler, memory=32 << 20)
    guest, protocol = built.guest, built.last
    data = random.Random(1).randbytes(1_000_000)
    guest.write(1, b"before")
    guest.send(5, data, split=70_001)
    guest.write(1, b"after")
    whole = b"before" + data + b"after"
    vm_stops = 0
    async with asyncio.timeout(DEADLINE):
        while len(protocol.data) < len(whole):
            await guest.settle(2)
            if vm_stops < 3 and len(protocol.data) > vm_stops * 300_000:
                # what is half delivered is neither lost nor delivered twice
                guest.pause()
                guest.resume()
                vm_stops += 1
            assert protocol.paused
            protocol.transport.resume_reading()
    assert protocol.data == whole
    assert max(int(call) for call in protocol.calls if call.isdigit()) <= 256 * 1024
    assert vm_stops == 3


@pytest.mark.parametrize("console", [True, False])
async def test_a_half_delivered_chain_of_a_driver_that_is_gone_is_not_missed(
    rig, make_guest, console
):
    came = asyncio.Event()

    class Announcer(Recorder):
        def data_received(self, data):
            super().data_received(data)
            came.set()

    built = await rig(memory=32 << 20, console=console, factory=Announcer)
    built.guest.send(1 if console else 5, bytes(5_000_000), split=500_000)
    await came.wait()  # and no turn of the loop more
    assert len(built.last.data) < 5_000_000  # more than one turn's work
    built.guest.close()
    built.controller.reset()
    fresh = make_guest(built.controller)
    fresh.boot()
    await fresh.ready(built.nr)
    if not console:
        built.guest = fresh
        await built.open()
    fresh.write(built.nr, b"from the beginning")
    await fresh.until(
        lambda: built.last.data.endswith(
            b"\0from the beginning" if console else b"from the beginning"
        )
    )


async def test_what_is_discarded_is_not_missing_from_what_comes_after(rig):
    class Leaver(Recorder):
        def data_received(self, data):
            super().data_received(data)
            if len(data) > 1000:
                self.transport.abort()

    built = await rig(console=True, factory=Leaver, memory=16 << 20)
    guest, first = built.guest, built.last
    guest.send(1, bytes(5_000_000), split=500_000)  # in pieces, of which it takes some
    await guest.until(lambda: "lost" in first.calls and guest.completed(0))
    assert len(first.data) < 5_000_000
    built.port.chardev.connect()
    await guest.until(lambda: built.last is not first and built.last.calls == ["made"])
    guest.write(0, b"login: ")
    await guest.until(lambda: guest.completed(0))
    assert built.last.data == b"login: "


async def test_the_write_buffer_has_marks_and_the_guests_buffers_drain_it(rig):
    built = await rig()
    guest, protocol = built.guest, built.last
    transport = protocol.transport
    assert transport.get_write_buffer_limits() == (16384, 65536)
    data = random.Random(2).randbytes(16 * 4096 + 65536)
    transport.write(data[:100])
    transport.write(bytearray(data[100:200]))
    transport.write(memoryview(data)[200:])
    # one write filled one buffer each, or a part of one
    assert 65536 < transport.get_write_buffer_size() < len(data)
    assert protocol.calls == ["made", "pause"]
    await guest.until(lambda: len(guest.read(1)) == len(data))
    assert guest.received[1] == data
    assert protocol.calls == ["made", "pause", "resume"]
    assert transport.get_write_buffer_size() == 0


async def test_what_is_written_while_the_vm_is_paused_arrives_when_it_goes_on(rig):
    built = await rig()
    built.guest.pause()
    built.last.transport.write(b"welcome back")
    await turns(1)
    built.guest.resume()
    await built.guest.until(lambda: built.guest.read(1) == b"welcome back")


async def test_every_opening_by_the_guest_is_a_connection(rig):
    built = await rig()
    guest = built.guest
    for number in range(3):
        protocol = built.last
        guest.write(1, b"session %d" % number)
        guest.close_port(1)
        await guest.until(lambda p=protocol: "lost" in p.calls)
        assert protocol.calls == ["made", "eof", "lost"]
        assert protocol.data == b"session %d" % number
        assert protocol.error is None
        await built.open()
        assert built.last is not protocol


async def test_a_session_ends_only_after_what_was_written_in_it(rig):
    built = await rig()
    guest, first = built.guest, built.last
    first.transport.pause_reading()
    guest.write(1, b"first ")
    guest.write(1, b"session")
    guest.close_port(1)
    await guest.until(lambda: not built.port.guest_open)
    # the next one begins before the first is read
    guest.open(1)
    await guest.until(lambda: built.port.guest_open)
    guest.write(1, b"second session")
    await guest.settle()
    assert first.calls == ["made"]
    assert len(built.protocols) == 1
    first.transport.write(b"an answer to the first, who is gone")
    await guest.settle()
    assert guest.read(1) == b""
    first.transport.resume_reading()
    await guest.until(lambda: guest.completed(1))
    assert first.data == b"first session"
    assert first.calls == ["made", "eof", "lost"]
    await guest.until(lambda: len(built.protocols) == 2 and built.last.data)
    assert built.last.data == b"second session"


async def test_what_a_closed_guest_left_is_delivered_to_the_first_who_comes(rig):
    built = await rig()
    guest, chardev = built.guest, built.port.chardev
    chardev.disconnect()
    guest.write(1, b"a note for later")
    guest.close_port(1)
    await guest.until(lambda: not built.port.guest_open)
    await guest.settle()
    assert not guest.completed(1)
    chardev.connect()
    await guest.until(lambda: len(built.protocols) == 2 and "lost" in built.last.calls)
    assert built.last.data == b"a note for later"
    assert built.last.calls == ["made", "eof", "lost"]
    await guest.settle()
    assert len(built.protocols) == 2


async def test_it_is_delivered_when_the_vm_goes_on_if_somebody_came_while_it_was_paused(rig):
    built = await rig()
    guest, chardev = built.guest, built.port.chardev
    chardev.disconnect()
    guest.write(1, b"a note for later")
    guest.close_port(1)
    await guest.until(lambda: not built.port.guest_open)
    guest.pause()
    chardev.connect()
    guest.resume()
    await guest.until(lambda: len(built.protocols) == 2 and "lost" in built.last.calls)
    assert built.last.data == b"a note for later"
    assert built.last.calls == ["made", "eof", "lost"]


async def test_a_protocol_that_closes_is_flushed_and_the_guest_sees_it(rig):
    built = await rig()
    guest, protocol = built.guest, built.last
    data = bytes(range(256)) * 1000
    protocol.transport.write(data)
    protocol.transport.close()
    protocol.transport.write(b"too late")
    assert protocol.transport.is_closing()
    guest.write(1, b"nobody listens")
    await guest.until(lambda: len(guest.read(1)) == len(data))
    await guest.until(lambda: not guest.control.ports[1].host_open)
    assert guest.received[1] == data
    assert protocol.calls[-1] == "lost"
    assert protocol.data == b""
    assert not guest.completed(1)
    # what nobody has read is not the beginning of what the next program in the guest says
    guest.close_port(1)
    await guest.until(lambda: guest.control.ports[1].host_open)
    await guest.until(lambda: built.last.calls == ["made", "eof", "lost"])
    assert built.last.data == b"nobody listens"
    await built.open()
    guest.write(1, b"hello")
    await guest.until(lambda: built.last.data == b"hello")


async def test_a_protocol_that_closes_with_nothing_written_is_lost_at_once(rig):
    built = await rig()
    guest, protocol = built.guest, built.last
    protocol.transport.close()
    await guest.until(lambda: protocol.calls[-1] == "lost")
    await guest.until(lambda: not guest.control.ports[1].host_open)


async def test_abort_drops_what_is_written(rig):
    built = await rig()
    guest, protocol = built.guest, built.last
    protocol.transport.write(bytes(1_000_000))
    protocol.transport.abort()
    await guest.until(lambda: protocol.calls[-1] == "lost")
    assert len(guest.read(1)) < 1_000_000


async def test_a_protocol_that_raises_loses_its_connection_and_nothing_else(rig, caplog):
    built = await rig()
    guest, protocol = built.guest, built.last
    protocol.fail = True
    with caplog.at_level(logging.ERROR, "asyncio"):
        guest.write(1, b"boom")
        await guest.until(lambda: protocol.calls[-1] == "lost")
    assert isinstance(protocol.error, RuntimeError)
    assert "the protocol of a port failed" in caplog.text
    guest.close_port(1)
    await guest.until(lambda: guest.control.ports[1].host_open)
    await built.open()
    guest.write(1, b"fine")
    await guest.until(lambda: built.last.data == b"fine")


async def test_a_factory_that_raises_leaves_the_port_closed_to_the_bytes(rig, caplog):
    def refuse():
        raise RuntimeError("not today")

    with caplog.at_level(logging.ERROR, "asyncio"):
        built = await rig(factory=refuse, is_open=False)
        built.guest.open(1)
        await built.guest.until(lambda: built.port.guest_open)
    assert "no protocol for its host end" in caplog.text
    built.guest.write(1, b"hello")
    await built.guest.settle()
    assert not built.guest.completed(1)
    # it is asked again when the guest opens the port again
    built.protocols.clear()
    caplog.clear()
    with caplog.at_level(logging.ERROR, "asyncio"):
        built.guest.close_port(1)
        built.guest.open(1)
        await built.guest.until(lambda: caplog.records)


async def test_a_factory_may_close_its_own_end(rig):
    built = None

    def close_and_make():
        built.port.chardev.disconnect()
        return Recorder()

    built = await rig(factory=close_and_make, is_open=False)
    built.guest.open(1)
    await built.guest.until(lambda: len(built.protocols) == 1)
    await built.guest.until(lambda: not built.guest.control.ports[1].host_open)
    assert built.last.calls == []
    assert not built.port.host_open


async def test_a_driver_that_goes_takes_its_connection_along(rig):
    built = await rig()
    protocol = built.last
    built.guest.close()
    built.controller.reset()
    await turns(1)
    assert protocol.calls == ["made", "lost"]


async def test_a_consoles_protocol_is_connected_without_the_guest_and_never_throttles(rig):
    built = await rig(console=True, memory=64 << 20)
    events = []
    built.controller.on_event = events.append
    guest, protocol = built.guest, built.last
    protocol.transport.pause_reading()
    total = 0
    while total < BACKLOG_MAX + 500_000:
        guest.write(0, bytes(32768))
        total += 32768
        await guest.until(lambda: guest.completed(0))
    await guest.until(lambda: any(isinstance(event, ev.OutputDropped) for event in events))
    protocol.transport.resume_reading()
    await guest.until(lambda: len(protocol.data) == BACKLOG_MAX)
    guest.write(0, b"login: ")
    await guest.until(lambda: protocol.data.endswith(b"login: "))
    assert len([event for event in events if isinstance(event, ev.OutputDropped)]) == 1
    guest.say(0, ControlEvent.PORT_OPEN, 0)
    await guest.settle()
    assert protocol.calls == ["made"]
    # closing its end is no reason to let the guest wait
    protocol.transport.write(bytes(2_000_000))
    protocol.transport.close()
    guest.write(0, b"anybody?")
    await until(lambda: guest.completed(0))


async def test_a_ring_buffer_keeps_the_newest(make_controller, make_guest):
    controller = make_controller(max_ports=3)
    ringbuf = RingbufChardev("ring")
    controller.add_port(Port(1, "org.ring", ringbuf))
    await controller.start()
    guest = make_guest(controller)
    guest.boot()
    await guest.ready(1)
    guest.open(1)
    for number in range(300):
        guest.write(1, b"%06d\n" % number)
        await guest.until(lambda: guest.completed(1))
    assert ringbuf.read().endswith(b"000299\n")


@pytest.mark.parametrize("seed", range(4))
async def test_no_byte_is_lost_or_doubled_whatever_stops_and_starts(rig, seed):
    rng = random.Random(seed)
    built = await rig(memory=64 << 20, index=65400, size=16)
    guest, protocol = built.guest, built.last
    sent, back = bytearray(), bytearray()
    for _ in range(150):
        match rng.randrange(6):
            case 0:
                guest.pause()
                await turns(1)
                guest.resume()
            case 1:
                if protocol.transport.is_reading():
                    protocol.transport.pause_reading()
                else:
                    protocol.transport.resume_reading()
            case 2:
                data = rng.randbytes(rng.randrange(1, 30_000))
                protocol.transport.write(data)
                back += data
            case 3:
                guest.read(1)
            case _:
                # some are larger than a batch
                data = rng.randbytes(rng.choice([rng.randrange(1, 50_000), 600_000]))
                guest.collect(5)
                if guest.rings[5].driver.num_free > len(data) // 60_000 + 1:
                    guest.send(5, data, split=60_000)
                    sent += data
        guest.step()
        if rng.randrange(2):
            await turns(1)
    if not protocol.transport.is_reading():
        protocol.transport.resume_reading()
    await guest.until(lambda: guest.completed(1) and len(guest.read(1)) == len(back))
    assert protocol.data == sent
    assert guest.received[1] == back


async def test_a_guest_that_floods_leaves_the_loop_its_turns(rig):
    """One turn is bounded: other work goes on while a port is busy all the time."""
    built = await rig(memory=32 << 20)
    guest, protocol = built.guest, built.last
    addresses = [guest.allocate(4096) for _ in range(60)]
    ring = guest.rings[5]
    for _ in range(200):
        guest.collect(5)
        while ring.driver.num_free > 4:
            address = addresses[ring.driver.num_free % 60]
            ring.buffers[ring.driver.add([(address, 4096)], [])] = (address, 0)
        guest.publish(5)
        await turns(1)
    await guest.until(lambda: guest.completed(1))
    assert len(protocol.data) % 4096 == 0
    assert len(protocol.data) > 4096 * 1000
    assert CONTROL_RECEIVEQ in guest.rings


async def test_a_session_that_is_still_ending_does_not_outlive_its_driver(rig):
    built = await rig()
    guest, first = built.guest, built.last
    first.transport.pause_reading()
    guest.write(1, b"never read")
    guest.close_port(1)
    await guest.until(lambda: not built.port.guest_open)
    await guest.settle()
    built.controller.reset()
    await guest.until(lambda: "lost" in first.calls)
    assert first.calls == ["made", "lost"]
    assert first.data == b""
