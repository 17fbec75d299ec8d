"""A device built from the state of another one goes on where that stood, byte by byte."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import pytest

from tests.device.console.test_port import PairChardev, pattern, received
from tests.support.device_guest import Guest
from tests.support.waiting import turns, until
from vring_serial.chardev.base import Chardev
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.device.console.state import CONSOLE, ChainState
from vring_serial.proto.console import CONTROL_RECEIVEQ, ControlEvent, queues_of_port
from vring_serial.proto.control import PortState
from vring_serial.saving import StateFormat

StateT = TypeVar("StateT")


def copied(state: StateT) -> StateT:
    """What comes back of a state that was written down."""
    kind = StateFormat("test", 1, type(state))
    return kind.unpack(kind.pack(state))


class Collector(asyncio.Protocol):
    """Takes one piece of data, and then no more before it is told to."""

    def __init__(self) -> None:
        self.data = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.transport.pause_reading()


@pytest.fixture
async def boot(make_controller, make_guest):
    """A booted guest with one open port: ``await boot(chardev, nr)``."""

    async def build(chardev: Chardev, nr: int = 1, **options) -> Guest:
        controller = make_controller(max_ports=3)
        name = "org.test" if nr else ""
        controller.add_port(Port(nr, name, chardev, console=not nr))
        await controller.start()
        guest = make_guest(controller, **options)
        guest.boot()
        await guest.ready(nr)
        if nr:
            guest.open(nr)
            await guest.until(lambda: controller.ports[nr].guest_open)
        return guest

    return build


@pytest.fixture
async def successor(make_controller):
    """Gives the guest another device, made from the state of its own, which ends."""

    async def build(
        guest: Guest, chardev: Chardev, settled: Callable[[], None] = lambda: None
    ) -> Controller:
        old = guest.controller
        [(nr, port)] = old.ports.items()
        with old.settled():
            state, port_state = copied(old.state), copied(port.state)
            settled()
            guest.pause()
            # What is exact while the queues run is what stopping them leaves.
            assert state == old.state
            assert port_state == port.state
        for index, ring in guest.rings.items():
            ring.base = state.stopped_at[index]
        await old.aclose()
        new = make_controller(max_ports=3, state=state)
        new.add_port(Port(nr, port.name, chardev, console=port.console, state=port_state))
        await new.start()
        guest.controller = new
        guest.resume()
        return new

    return build


async def test_what_a_descriptor_took_in_part_is_written_whole(boot, successor):
    first, second = PairChardev("first"), PairChardev("second")
    guest = await boot(first)
    data = pattern(3 << 20)
    guest.send(queues_of_port(1)[1], data, split=1 << 20)
    before = bytearray()

    def read(length: int) -> None:
        before.extend(received(first.peer, length))

    def has_read(length: int) -> bool:
        read(4096)
        return len(before) >= length

    await guest.until(lambda: has_read(1 << 16))
    with guest.controller.settled():
        read(len(data))
        residue = guest.controller.ports[1].state.chain.residue
        assert before + residue == data
    # It goes on by itself, and elsewhere.
    await guest.until(lambda: has_read(1 << 20))
    await successor(guest, second, lambda: read(len(data)))
    assert len(before) < len(data)
    assert second.guest == [True]
    after = bytearray()

    def whole() -> bool:
        after.extend(received(second.peer))
        return len(before) + len(after) >= len(data)

    await guest.until(whole)
    assert before + after == data
    second.peer.send(b"hello")
    await guest.until(lambda: guest.read(1) == b"hello")


async def test_what_a_protocol_took_of_a_chain_is_not_delivered_again(boot, successor):
    protocols: list[Collector] = []

    def factory() -> Collector:
        protocols.append(Collector())
        return protocols[-1]

    guest = await boot(ProtocolChardev("first", factory))
    data = pattern(2 << 20)
    guest.send(queues_of_port(1)[1], data, split=1 << 20)
    await guest.until(lambda: protocols and protocols[0].data)
    await successor(guest, ProtocolChardev("second", factory))
    assert 0 < guest.controller.ports[1].state.chain.delivered < len(data)

    def delivered() -> bool:
        if len(protocols) > 1 and hasattr(protocols[1], "transport"):
            protocols[1].transport.resume_reading()
        return guest.completed(1)

    await guest.until(delivered)
    assert protocols[0].data + protocols[1].data == data
    assert guest.controller.ports[1].state.chain.delivered == 0


async def test_bytes_that_wait_for_either_side_of_a_console_go_on_waiting(boot, successor):
    protocols: list[Collector] = []

    def factory() -> Collector:
        protocols.append(Collector())
        return protocols[-1]

    guest = await boot(ProtocolChardev("first", factory), 0)
    await guest.until(lambda: protocols and hasattr(protocols[0], "transport"))
    guest.write(0, b"taken")
    await guest.until(lambda: protocols[0].data)
    guest.write(0, b"waiting")
    state = guest.controller.ports[0].state
    await guest.until(lambda: state.session.backlog == b"waiting")
    unread = pattern(100_000)
    protocols[0].transport.write(unread)  # the guest has buffers for 64 KiB
    taken = len(guest.read(0))
    assert taken > 0
    await successor(guest, ProtocolChardev("second", factory))
    await guest.until(lambda: len(protocols) > 1 and protocols[1].data)
    assert protocols[1].data == b"waiting"
    await guest.until(lambda: len(guest.read(0)) >= len(unread))
    assert guest.read(0) == unread


async def test_control_messages_that_wait_for_a_buffer_are_given_to_the_guest_later(
    make_controller, make_guest, successor
):
    controller = make_controller(max_ports=3)
    controller.add_port(Port(1, "org.test", PairChardev("first")))
    await controller.start()
    guest = make_guest(controller)
    guest.start()
    guest.control.start()
    guest.flush()
    await guest.settle()
    assert not guest.messages
    new = await successor(guest, PairChardev("second"))
    assert new.state.control.driver_ready
    guest.give_buffers(CONTROL_RECEIVEQ)
    await guest.ready(1)
    assert guest.messages[0].event == ControlEvent.PORT_ADD
    assert [m.event for m in guest.messages].count(ControlEvent.PORT_ADD) == 1


async def test_a_port_that_is_another_one_now_is_removed_and_added(boot, make_controller):
    guest = await boot(PairChardev())
    with guest.controller.settled():
        state = copied(guest.controller.state)
        guest.pause()
    for index, ring in guest.rings.items():
        ring.base = state.stopped_at[index]
    await guest.controller.aclose()
    new = make_controller(max_ports=3, state=state)
    new.add_port(Port(1, "another", PairChardev("new")))
    await new.start()
    guest.controller = new
    guest.messages.clear()
    guest.resume()
    await guest.until(lambda: len(guest.messages) >= 2)
    first, second = guest.messages[:2]
    assert (first.event, second.event) == (ControlEvent.PORT_REMOVE, ControlEvent.PORT_ADD)


async def test_settling_changes_nothing_that_the_guest_or_a_peer_sees(boot):
    chardev = PairChardev()
    guest = await boot(chardev)
    for number in range(50):
        guest.write(1, b"%d," % number)
        with guest.controller.settled():
            pass
        await turns(1)
    wanted = b"".join(b"%d," % number for number in range(50))
    got = bytearray()
    await guest.until(lambda: got.extend(received(chardev.peer)) or len(got) >= len(wanted))
    assert got == wanted
    assert chardev.guest == [True]
    assert guest.controller.ports[1].state.chain == ChainState()


async def test_a_device_in_service_takes_a_state_over(boot, make_controller):
    """Bytes that are owed wait for the first queue, and the driver hears of the other host end."""
    first, second = PairChardev("first"), PairChardev("second", connected=False)
    guest = await boot(first)
    data = pattern(3 << 20)
    guest.send(queues_of_port(1)[1], data, split=1 << 20)
    before = bytearray()
    await guest.until(lambda: before.extend(received(first.peer, 4096)) or len(before) > 1 << 16)
    new = make_controller(max_ports=3)
    new.add_port(Port(1, "org.test", second))
    await new.start()
    guest.pause()
    with guest.controller.settled():
        saved = guest.controller.save_state()
        positions = dict(guest.controller.state.stopped_at)
    before.extend(received(first.peer, len(data)))
    new.check_state(saved)()
    assert second.guest == [True]
    peer = second.connect()
    await turns(4)
    assert received(peer) == b""
    second.disconnect()
    peer.close()
    for index, ring in guest.rings.items():
        ring.base = positions[index]
    guest.controller = new
    del guest.messages[:]
    guest.resume()
    await guest.until(lambda: guest.messages and guest.messages[-1].value == 0)
    assert {m.event for m in guest.messages} == {ControlEvent.PORT_OPEN}
    second.connect()
    after = bytearray()
    await guest.until(lambda: after.extend(received(second.peer)) or len(before + after) >= 3 << 20)
    assert before + after == data


async def test_what_another_process_owed_goes_to_the_next_host_end(make_controller):
    old, chardev = make_controller(max_ports=3), PairChardev()
    old.add_port(Port(1, "org.test", PairChardev("old")))
    state = CONSOLE.unpack(old.save_state())
    state.controller.control.driver_ready = True
    state.controller.control.ports[1].state = PortState.OPEN
    state.ports[1].chain.residue = b"owed"
    new = make_controller(max_ports=3)
    new.add_port(Port(1, "org.test", chardev))
    await new.start()
    assert new.restore(CONSOLE.pack(state))
    got = bytearray()
    await until(lambda: got.extend(received(chardev.peer)) or got == b"owed")
    assert not new.ports[1].state.chain.residue
    assert not new.restore(CONSOLE.pack(state)), "it knows its driver now"
