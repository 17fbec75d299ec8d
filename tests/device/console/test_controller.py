"""The device against a driver over real rings: control messages, hot-plug, configuration."""

from __future__ import annotations

import asyncio
import logging
import os
import random

import pytest

from tests.support.console import events_of, python_port, sink_of
from tests.support.pump import pump_turn
from tests.support.waiting import turns, until
from vring import RingError
from vring_serial.device.base import VirtioDevice
from vring_serial.device.console import events as ev
from vring_serial.device.console.config_space import DEFAULT_FEATURES
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.events import Side
from vring_serial.device.console.port import Port
from vring_serial.errors import LocalProtocolError
from vring_serial.proto.console import (
    CONTROL_RECEIVEQ,
    CONTROL_TRANSMITQ,
    NO_PORT,
    ConsoleFeature,
    ControlEvent,
    ControlMessage,
)
from vring_serial.proto.virtio import Feature, Status

E = ControlEvent


def test_the_controller_is_a_virtio_device():
    device: VirtioDevice = Controller()  # mypy's to judge; here that the attributes are there
    for name in (*VirtioDevice.__annotations__, "status", "num_queues", "config_size"):
        assert hasattr(device, name)
    assert device.device_id == 3
    assert device.num_queues == 64
    assert Controller(features=Feature.VERSION_1).num_queues == 2


async def test_linux_boots_and_finds_its_ports(make_controller, make_guest):
    controller = make_controller()
    events = events_of(controller)
    controller.add_port(python_port(0, console=True))
    controller.add_port(python_port(1, "org.test.one"))
    controller.add_port(python_port(2, "org.test.two", connected=False))
    await controller.start()
    guest = make_guest(controller)
    guest.boot()
    await guest.until(lambda: len(guest.messages) >= 8)
    await guest.settle()
    assert [(m.id, m.event, m.payload) for m in guest.messages] == [
        (0, E.PORT_ADD, b""),
        (1, E.PORT_ADD, b""),
        (2, E.PORT_ADD, b""),
        (0, E.CONSOLE_PORT, b""),
        (0, E.PORT_OPEN, b""),
        (1, E.PORT_NAME, b"org.test.one"),
        (1, E.PORT_OPEN, b""),
        (2, E.PORT_NAME, b"org.test.two"),
    ]
    assert controller.ports[0].guest_open
    assert not controller.ports[1].guest_open
    guest.open(1)
    await guest.until(lambda: controller.ports[1].guest_open)
    guest.close_port(1)
    await guest.until(lambda: not controller.ports[1].guest_open)
    seen = [e for e in events if isinstance(e, (ev.DriverReady, ev.PortOpened, ev.PortClosed))]
    assert seen == [
        ev.PortOpened(Side.HOST, 0),
        ev.PortOpened(Side.HOST, 1),
        ev.DriverReady(),
        ev.PortOpened(Side.GUEST, 0),
        ev.PortOpened(Side.GUEST, 1),
        ev.PortClosed(Side.GUEST, 1),
    ]


async def test_messages_wait_for_buffers_and_none_is_lost(make_controller, make_guest):
    controller = make_controller(max_ports=4)
    for nr in range(4):
        controller.add_port(python_port(nr, f"org.test.{nr}"))
    await controller.start()
    guest = make_guest(controller)
    guest.start()
    guest.control.start()
    guest.flush()
    await guest.settle(5)
    assert guest.messages == []
    for count in range(1, 20):
        guest.give_buffers(CONTROL_RECEIVEQ, 1)
        await guest.until(lambda count=count: guest.messages or count)
        await guest.settle(2)
    # one buffer at a time, each given back by the driver at once
    assert {(m.id, m.event) for m in guest.messages} == {
        (nr, event) for nr in range(4) for event in (E.PORT_ADD, E.PORT_NAME, E.PORT_OPEN)
    }
    assert len(guest.messages) == 12


async def test_a_flood_of_port_ready_without_buffers_is_answered_and_grows_nothing(
    make_controller, make_guest
):
    controller = make_controller(max_ports=2)
    controller.add_port(python_port(1, "org.test"))
    await controller.start()
    guest = make_guest(controller)
    guest.start()
    for _ in range(500):
        guest.say(1, E.PORT_READY)
        guest.say(1, E.PORT_OPEN, 0)
        if guest.rings[CONTROL_TRANSMITQ].driver.num_free < 4:
            await guest.until(
                lambda: (
                    not guest.collect(CONTROL_TRANSMITQ)
                    and not guest.rings[CONTROL_TRANSMITQ].buffers
                )
            )
    await guest.until(lambda: not guest.rings[CONTROL_TRANSMITQ].buffers)
    guest.give_buffers(CONTROL_RECEIVEQ, 60)
    await guest.until(lambda: guest.messages)
    await guest.settle()
    assert [(m.id, m.event) for m in guest.messages] == [(1, E.PORT_NAME), (1, E.PORT_OPEN)]


@pytest.mark.parametrize("index", [0, 65530])
async def test_control_out_is_completed_at_once_whatever_it_says(
    make_controller, make_guest, index, caplog
):
    caplog.set_level(logging.WARNING)
    controller = make_controller()
    events = events_of(controller)
    controller.add_port(python_port(1, "org.test"))
    guest = make_guest(controller, index=index)
    guest.start()
    transmitq = guest.rings[CONTROL_TRANSMITQ]
    wrong = [
        b"\1",
        ControlMessage(9, E.PORT_OPEN, 1).pack(),
        ControlMessage(0xFFFF0000, E.PORT_READY, 1).pack(),
        ControlMessage(1, E.PORT_REMOVE, 1).pack(),
        ControlMessage(1, 999, 1).pack(),
        bytes(100_000),
    ]
    for message in wrong * 5:
        guest.send(CONTROL_TRANSMITQ, message, split=60_000)
        await guest.until(lambda: not transmitq.buffers)
    refused = [e.why for e in events if isinstance(e, ev.MessageRefused)]
    assert len(refused) == 30
    for why, part in zip(
        refused,
        [
            "1 bytes",
            "PORT_OPEN(id 0x9",
            "no such port",
            "not an event",
            "event 999",
            "100000 bytes",
        ],
        strict=False,
    ):
        assert part in why
    # a log that a guest cannot fill
    lines = [record.message for record in caplog.records]
    assert len(lines) == 10
    assert lines[0] == "virtio-serial0: refused: control message: 1 bytes, at least 8 expected"
    # and the port goes on
    guest.say(1, E.PORT_READY)
    await guest.ready(1)


async def test_a_control_buffer_too_small_for_a_message_is_given_back_and_the_message_waits(
    make_controller, make_guest
):
    controller = make_controller()
    events = events_of(controller)
    controller.add_port(python_port(1, "org.test.long.name"))
    guest = make_guest(controller)
    guest.start()
    guest.say(1, E.PORT_READY)
    guest.give_buffers(CONTROL_RECEIVEQ, 1, 8)
    ring = guest.rings[CONTROL_RECEIVEQ]
    used: list[bytes] = []
    await until(lambda: used.extend(guest.collect(CONTROL_RECEIVEQ)) or used)
    assert used == [b""]
    assert [e.why for e in events if isinstance(e, ev.MessageRefused)] == [
        "control buffer: 8 bytes, 26 needed"
    ]
    guest.give_buffers(CONTROL_RECEIVEQ, 1)
    await guest.until(lambda: guest.messages)
    assert guest.messages[0].payload == b"org.test.long.name"
    assert not ring.buffers or len(ring.buffers) == 1


async def test_a_controller_that_has_stopped_has_told_every_protocol(make_controller, make_guest):
    controller = make_controller()
    controller.add_port(python_port(1, "org.test"))
    await controller.start()
    guest = make_guest(controller)
    guest.boot()
    await guest.ready(1)
    guest.open(1)
    await guest.until(lambda: sink_of(controller, 1) and sink_of(controller, 1).transport)
    sink = sink_of(controller, 1)
    await controller.aclose()
    assert sink.lost


# --- hot-plug -------------------------------------------------------------------------------------


async def test_ports_come_and_go_while_the_guest_runs(make_controller, make_guest):
    controller = make_controller()
    await controller.start()
    guest = make_guest(controller)
    guest.boot()
    await guest.settle(5)
    for generation in range(3):
        name = f"org.test.{generation}"
        await controller.plug_port(python_port(5, name))
        await guest.until(lambda: 5 in guest.control.ports and guest.control.ports[5].name)
        assert guest.control.ports[5].name == name.encode()
        await guest.until(lambda: guest.control.ports[5].host_open)
        guest.open(5)
        await guest.until(lambda: controller.ports[5].guest_open)
        guest.write(5, b"hello %d" % generation)
        sink = sink_of(controller, 5)
        await guest.until(lambda sink=sink: sink.data)
        assert sink.data == b"hello %d" % generation
        await controller.remove_port(5)
        await guest.until(lambda: 5 not in guest.control.ports)
        assert sink.lost
        assert 5 not in controller.ports
    with pytest.raises(LocalProtocolError, match="no port 5"):
        await controller.remove_port(5)


async def test_numbers_and_names_are_checked_and_nothing_is_left_behind(make_controller):
    controller = make_controller(max_ports=4)
    first = python_port(1, "org.test")
    controller.add_port(first)
    for port, why in [
        (python_port(4), "port 4: numbers are 0..3"),
        (python_port(1), "port 1 exists already"),
        (python_port(2, "org.test"), "the name b'org.test' is taken"),
        (Port(2, "other", first.chardev), "chr1 is in use already"),
    ]:
        with pytest.raises(LocalProtocolError, match=why):
            controller.add_port(port)
    assert list(controller.ports) == [1]
    controller.add_port(python_port(2, "other"))


def test_a_second_listener_does_not_silently_replace_the_first():
    controller = Controller()
    events = events_of(controller)
    with pytest.raises(LocalProtocolError, match="on_event has a listener already"):
        controller.on_event = lambda event: None
    controller.emit(ev.DeviceReset())
    assert events == [ev.DeviceReset()]
    controller.on_event = None
    assert events_of(controller) == []


# --- queues ---------------------------------------------------------------------------------------


async def test_queues_that_run_or_do_not_exist_cannot_be_started(make_controller, make_guest):
    controller = make_controller(max_ports=1)
    guest = make_guest(controller)
    guest.start()
    with pytest.raises(LocalProtocolError, match="queue 2 runs already"):
        guest.start_queue(2)
    with pytest.raises(LocalProtocolError, match="no queue 4"):
        guest.start_queue(4)
    del guest.rings[4]
    assert controller.stop_queue(3) == 0
    assert controller.stop_queue(3) == 0
    assert controller.stop_queue(77) == 0


async def test_a_paused_vm_keeps_its_ports_and_a_new_driver_starts_without(
    make_controller, make_guest
):
    controller = make_controller(max_ports=3)
    controller.add_port(python_port(1, "org.test"))
    await controller.start()
    guest = make_guest(controller)
    guest.boot()
    await guest.ready(1)
    guest.open(1)
    await guest.until(lambda: controller.ports[1].guest_open)
    sink = sink_of(controller, 1)
    events = events_of(controller)
    for _ in range(3):
        guest.write(1, b"before ")
        guest.pause()
        controller.set_status(0)
        assert controller.ports[1].guest_open
        guest.resume()
        controller.set_status(15)
        guest.write(1, b"after ")
        await guest.until(lambda: guest.completed(1))
    assert sink.data == b"before after " * 3
    assert not sink.lost
    assert events == []
    # the guest reboots: rings from 0
    guest.pause()
    fresh = make_guest(controller)
    fresh.start()
    assert not controller.ports[1].guest_open
    assert events == [ev.PortClosed(Side.GUEST, 1), ev.DeviceReset()]
    fresh.give_buffers(CONTROL_RECEIVEQ)
    fresh.control.start()
    await fresh.ready(1)
    assert sink.lost


async def test_a_driver_that_resumes_gets_its_ports_back(make_controller, make_guest):
    controller = make_controller(max_ports=3)
    controller.add_port(python_port(1, "org.test"))
    await controller.start()
    guest = make_guest(controller)
    guest.boot()
    await guest.ready(1)
    guest.open(1)
    await guest.until(lambda: controller.ports[1].guest_open)
    guest.close()
    controller.reset()
    assert not controller.ports[1].guest_ready
    resumed = make_guest(controller)
    resumed.control = guest.control
    resumed.start()
    resumed.give_buffers(CONTROL_RECEIVEQ)
    resumed.give_buffers(4)
    resumed.control.resume()
    await resumed.until(lambda: controller.ports[1].guest_open)
    await resumed.until(lambda: resumed.control.ports[1].host_open)
    resumed.write(1, b"hello again")
    await resumed.until(lambda: resumed.completed(1))
    assert sink_of(controller, 1).data == b"hello again"


@pytest.mark.parametrize("queue", [2, 3, 4, 5])
async def test_a_broken_ring_stops_its_queue_and_nothing_else(make_controller, make_guest, queue):
    controller = make_controller(max_ports=3)
    controller.add_port(python_port(1, "org.test.one"))
    controller.add_port(python_port(2, "org.test.two"))
    await controller.start()
    guest = make_guest(controller)
    guest.boot()
    for nr in (1, 2):
        await guest.ready(nr)
        guest.open(nr)
    await guest.until(lambda: controller.ports[1].guest_open and controller.ports[2].guest_open)
    await guest.settle(3)
    told: list[RingError] = []
    controller.on_needs_reset = told.append
    # an available index far ahead
    ring = guest.rings[queue]
    here = ring.driver.avail_index
    guest.memory.write(ring.parts[1] + 2, (here + 1000).to_bytes(2, "little"))
    os.eventfd_write(ring.kick_fd, 1)
    if queue == 4:
        sink_of(controller, 1).transport.write(b"to the guest")
    if queue == 2:
        controller.ports[2].end_closed()
    await until(lambda: told)
    assert controller.status & Status.DEVICE_NEEDS_RESET
    assert told[0].queue == f"queue {queue}"
    if queue != 2:
        guest.write(2, b"goes on")
        await until(lambda: guest.completed(2))
        assert sink_of(controller, 2).data == b"goes on"
    assert len(told) == 1
    controller.set_status(15)
    assert controller.status & Status.DEVICE_NEEDS_RESET
    controller.reset()
    assert controller.status == 0


async def test_a_kick_that_is_no_eventfd_does_not_spin(make_controller, make_guest):
    controller = make_controller(max_ports=2)
    guest = make_guest(controller)
    guest.start()
    guest.stop_queue(CONTROL_TRANSMITQ)
    ring = guest.rings[CONTROL_TRANSMITQ]
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.close(ring.kick_fd)
    os.close(writing)
    ring.kick_fd = reading
    guest.start_queue(CONTROL_TRANSMITQ)
    await guest.settle(5)
    loop = asyncio.get_running_loop()
    assert not loop.remove_reader(reading)


# --- one port -------------------------------------------------------------------------------------


async def test_a_driver_without_multiport_has_one_console(make_controller, make_guest):
    controller = make_controller()
    events = events_of(controller)
    controller.add_port(python_port(0, console=True))
    controller.add_port(python_port(1, "org.test"))
    await controller.start()
    guest = make_guest(controller, features=DEFAULT_FEATURES & ~int(ConsoleFeature.MULTIPORT))
    guest.start(ports=0)
    assert ev.DriverReady() in events
    guest.give_buffers(0)
    guest.write(0, b"login: ")
    sink = sink_of(controller, 0)
    await guest.until(lambda: sink.data == b"login: ")
    sink.transport.write(b"root\n")
    await guest.until(lambda: guest.read(0) == b"root\n")
    assert not controller.ports[1].guest_ready
    controller.reset()
    assert not controller.ports[0].guest_ready


async def test_a_driver_without_multiport_is_not_held_up_for_want_of_a_port(
    make_controller, make_guest
):
    controller = make_controller()
    guest = make_guest(controller, features=DEFAULT_FEATURES & ~int(ConsoleFeature.MULTIPORT))
    guest.start(ports=0)
    guest.write(0, b"is anybody there?")
    await guest.until(lambda: guest.completed(0))
    # and a port that comes later takes over
    controller.add_port(python_port(0))
    await controller.start()
    guest.write(0, b"hello")
    await guest.until(lambda: guest.completed(0))
    await guest.until(lambda: sink_of(controller, 0).data == b"hello")
    assert NO_PORT not in controller.ports


# --- hostile --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
async def test_garbage_in_the_rings_harms_no_one_else(make_controller, make_guest, seed):
    """A driver that scribbles over its rings while they run: the next driver finds a device."""
    rng = random.Random(seed)
    controller = make_controller(max_ports=3)
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    controller.add_port(python_port(0, console=True))
    controller.add_port(python_port(1, "org.test"))
    await controller.start()
    for _ in range(5):
        guest = make_guest(controller, size=16)
        guest.boot()
        await guest.ready(1)
        guest.open(1)
        await guest.settle(2)
        for _ in range(60):
            ring = rng.choice(list(guest.rings.values()))
            part = rng.randrange(3)
            length = (16 * 16, 6 + 32, 6 + 128)[part]
            at = ring.parts[part] + rng.randrange(length)
            guest.memory.write(at, rng.randbytes(rng.randrange(1, 4)))
            os.eventfd_write(ring.kick_fd, 1)
            if rng.randrange(3) == 0:
                controller.ports[0].chardev.disconnect()
                controller.ports[0].chardev.connect()
                await turns(1)
        pump_turn(controller.pump)
        await turns()
        guest.close()
        controller.reset()
    guest = make_guest(controller)
    guest.boot()
    await guest.ready(1)
    guest.open(1)
    await guest.until(lambda: sink_of(controller, 1))
    guest.write(1, b"at last")
    await guest.until(lambda: sink_of(controller, 1).data == b"at last")
    assert failures == []
