"""A device in an emulator that is built from the state of another one goes on where that stood."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.transport.inprocess.test_fronts import (
    FEATURES,
    RECEIVEQ,
    TRANSMITQ,
    Emulator,
    Upper,
    upper_device,
)
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.device.pci import PciDevice
from vring_serial.device.registers.mmio import MmioDevice
from vring_serial.errors import StateError
from vring_serial.proto.virtio import Status
from vring_serial.saving import StateFormat
from vring_serial.transport.inprocess.fronts import PolledHost


def copied(state: Any) -> Any:
    """What comes back of a state that was written down."""
    kind = StateFormat("test", 1, type(state))
    return kind.unpack(kind.pack(state))


class Machine:
    """An emulator with one device, which can be exchanged for one made from its state."""

    def __init__(self, host: PolledHost, kind: str) -> None:
        self.host = host
        self.emulator = Emulator()
        self.kind = kind.removesuffix("-legacy")
        self.options = {"transitional": True} if kind == "pci-legacy" else {}
        self.device = upper_device()
        host.complete(self.device.start())
        self.front = self.make_front()

    def make_front(self, **options: Any) -> Any:
        return getattr(self.emulator, self.kind)(self.host, self.device, **self.options, **options)

    def exchange(self) -> None:
        saved: list[Any] = []

        def save() -> None:
            with self.device.settled():
                self.front.note_positions()
                states = (self.device.state, self.device.ports[0].state, self.front.state)
                saved.extend(map(copied, states))

        self.host.run(save)
        device, port, front = saved
        self.end()
        self.device = Controller(features=FEATURES, queue_size_max=16, state=device)
        self.device.add_port(Port(0, "", ProtocolChardev("upper", Upper), state=port))
        self.host.complete(self.device.start())
        self.front = self.make_front(state=front)

    def end(self) -> None:
        levels = list(self.emulator.levels)
        self.front.close()
        self.emulator.levels[:] = levels  # closing is a reset, which the machine does not see
        self.host.complete(self.device.aclose())


@pytest.fixture
def host() -> Iterator[PolledHost]:
    host = PolledHost()
    yield host
    host.close()


@pytest.fixture(params=["pci", "pci-legacy", "mmio"])
def machine(host, request) -> Iterator[Machine]:
    machine = Machine(host, request.param)
    yield machine
    machine.end()


def test_rings_go_on_without_a_word_of_the_driver(machine):
    emulator = machine.emulator
    emulator.boot()
    for number in range(40):  # more than twice around the rings
        if number % 5 == 3:
            machine.exchange()
        word = b"word %d" % number
        emulator.send(word)
        assert emulator.take() == word.upper()
    assert emulator.driver.status & Status.DRIVER_OK


def test_an_interrupt_that_was_pending_is_pending(machine):
    emulator = machine.emulator
    emulator.boot()
    emulator.send(b"word")
    assert emulator.levels == [True]
    machine.exchange()
    assert emulator.levels == [True, True]  # the line of another device, asserted anew
    assert emulator.driver.take_events() == 1
    assert emulator.levels == [True, True, False]
    assert emulator.take() == b"WORD"


def test_a_device_that_no_driver_has_touched_can_be_exchanged(machine):
    machine.exchange()
    machine.emulator.boot()
    machine.emulator.send(b"word")
    assert machine.emulator.take() == b"WORD"


@pytest.mark.parametrize("machine", ["pci"], indirect=True)
def test_bars_and_masked_vectors_are_as_they_were(machine):
    emulator = machine.emulator
    emulator.boot()
    config = machine.front.config
    bars = {bar.register: 0xE000_0000 + 0x10_0000 * bar.index for bar in machine.front.layout}
    for register, address in bars.items():
        config.write(register, address, 4)
    control = emulator.driver.msix_capability + 2
    config.write(control, 0xC000, 2)  # enabled, and the whole function masked
    table = machine.front.bars[1]
    for vector in (RECEIVEQ, TRANSMITQ):
        for offset, value in ((0, 0xFEE0_0000), (4, 0), (8, 0x40 + vector), (12, 0)):
            table.write(16 * vector + offset, value, 4)
    emulator.send(b"word")
    assert emulator.messages == []
    before = [config.read(offset, 4) for offset in range(0, 256, 4)]
    machine.exchange()
    config = machine.front.config
    assert [config.read(offset, 4) for offset in range(0, 256, 4)] == before
    assert emulator.messages == []
    config.write(control, 0x8000, 2)
    assert (0xFEE0_0000, 0x40 + RECEIVEQ) in emulator.messages
    assert emulator.take() == b"WORD"


def test_what_software_cannot_write_is_not_taken_from_a_state():
    controller = Controller(max_ports=1)
    first = PciDevice(controller)
    state = copied(first.state)
    first.close()
    state.config_space[:] = b"\xff" * 256
    second = PciDevice(controller, state=state)
    assert second.config_read(0, 4) == 0x1043_1AF4
    assert second.config_read(0x3C, 1) == 0xFF
    second.close()


@pytest.mark.parametrize("part", ["config_space", "queues", "table"])
def test_the_state_of_another_device_is_refused(part):
    controller = Controller(max_ports=1)
    first = PciDevice(controller)
    state = copied(first.state)
    first.close()
    if part == "config_space":
        del state.config_space[-1]
    elif part == "queues":
        state.registers.queues.pop()
    else:
        state.msix.table += bytes(16)
    with pytest.raises(StateError):
        PciDevice(controller, state=state)
    mmio = MmioDevice(controller)  # what was refused has not taken the device
    mmio.close()
