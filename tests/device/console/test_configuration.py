"""Features, configuration space, and what is told through it: sizes, emergency writes."""

from __future__ import annotations

import pytest

from tests.support.console import events_of, python_port, sink_of
from tests.support.waiting import until
from vring_serial.device.console import events as ev
from vring_serial.device.console.config_space import DEFAULT_FEATURES
from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.console import (
    ConsoleConfig,
    ConsoleFeature,
    ControlEvent,
    Size,
)
from vring_serial.proto.virtio import Feature


async def test_features_that_were_not_offered_are_refused(make_controller):
    controller = make_controller()
    with pytest.raises(RemoteProtocolError, match="not offered: RING_PACKED"):
        controller.set_driver_features(DEFAULT_FEATURES | Feature.RING_PACKED)
    assert controller.driver_features == 0
    controller.set_driver_features(DEFAULT_FEATURES)
    assert controller.driver_features == DEFAULT_FEATURES


async def test_configuration_space(make_controller):
    controller = make_controller(max_ports=7)
    port = python_port(0, console=True)
    controller.add_port(port)
    assert ConsoleConfig.unpack(controller.read_config(0, 12)) == ConsoleConfig(0, 0, 7, 0)
    changes = []
    controller.on_config_change = lambda: changes.append(controller.read_config(0, 4))
    port.end_resized(80, 25)
    assert changes == []  # nobody has accepted SIZE yet
    generation = controller.config_generation
    controller.set_driver_features(DEFAULT_FEATURES)
    port.end_resized(132, 43)
    assert changes == [Size(132, 43).pack()]
    assert controller.config_generation == generation + 1
    for offset in range(20):
        for length in range(20):
            whole = controller.read_config(0, 12) + bytes(40)
            assert controller.read_config(offset, length) == whole[offset : offset + length]


async def test_a_terminals_size_reaches_the_guest_as_a_resize_message(make_controller, make_guest):
    controller = make_controller()
    console, plain = python_port(0, console=True), python_port(1, "org.test")
    controller.add_port(console)
    controller.add_port(plain)
    console.end_resized(80, 25)
    await controller.start()
    guest = make_guest(controller)
    guest.boot()
    await guest.until(lambda: guest.control.ports.get(0) and guest.control.ports[0].size)
    assert guest.control.ports[0].size == Size(80, 25)
    console.end_resized(100, 30)
    plain.end_resized(1, 1)
    await guest.until(lambda: guest.control.ports[0].size == Size(100, 30))
    assert not any(m.event == ControlEvent.RESIZE and m.id == 1 for m in guest.messages)


async def test_emergency_writes_reach_the_console_also_before_any_driver(make_controller):
    controller = make_controller()
    events = events_of(controller)
    controller.add_port(python_port(0, console=True))
    await controller.start()
    sink = sink_of(controller, 0)
    controller.write_config(8, b"A\0\0\0")
    controller.write_config(0, bytes(8) + b"B\xff\xff\xff")  # QEMU writes all of it
    controller.write_config(0, bytes(12))  # and means nothing by 0
    controller.write_config(8, b"C")
    controller.write_config(0, bytes(8))
    controller.write_config(9, b"\1\1\1")
    controller.write_config(500, b"D")
    await until(lambda: sink.data == b"ABC")
    assert controller.read_config(8, 4) == bytes(4)
    assert [e.char for e in events if isinstance(e, ev.EmergencyWrite)] == list(b"ABC")


async def test_without_the_feature_an_emergency_write_is_nothing(make_controller):
    controller = make_controller(features=DEFAULT_FEATURES & ~int(ConsoleFeature.EMERG_WRITE))
    events = events_of(controller)
    controller.write_config(8, b"A\0\0\0")
    assert events == []
