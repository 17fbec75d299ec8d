"""INTx with the ISR status, and MSI-X (virtio 1.3, 4.1.4.5, 4.1.5; PCI 3.0, 6.8.2)."""

from __future__ import annotations

import os
import struct

import pytest

from tests.support.waiting import turns
from vring_serial.device.testing import PciDriver
from vring_serial.proto.console import ControlEvent
from vring_serial.proto.virtio import Status

MSIX_BAR = 1
NO_VECTOR = 0xFFFF


def unmask(machine, vector: int, address: int = 0xFEE0_0000, data: int = 0x4041) -> None:
    for offset, value in zip((0, 4, 8, 12), (address, 0, data, 0), strict=True):
        machine.pci.bar_write(MSIX_BAR, 16 * vector + offset, value, 4)


def pending(machine) -> int:
    # Without the driver's own write of the command register.
    read_only = PciDriver(machine.pci.config_read, lambda *_: None, machine.bar)
    capability = read_only.msix_capability
    offset = machine.pci.config_read(capability + 8, 4) & ~7
    return machine.pci.bar_read(MSIX_BAR, offset, 8)


# --- INTx and the ISR status (4.1.4.5)


async def test_intx_follows_the_isr_status(make_controller, make_register_guest):
    guest = make_register_guest(make_controller(max_ports=1))
    pci, machine = guest.machine.pci, guest.machine
    guest.boot()
    await guest.until(lambda: machine.levels == [True])
    assert pci.intx_level
    assert pci.config_read(6, 2) & 8
    pci.config_write(4, 0x406, 2)  # Interrupt Disable
    assert machine.levels == [True, False]
    assert pci.config_read(6, 2) & 8, "the status bit tells all the same"
    pci.config_write(4, 6, 2)
    assert machine.levels == [True, False, True]
    assert guest.registers.take_events() & 1
    assert machine.levels[-1] is False
    assert not pci.config_read(6, 2) & 8
    assert guest.registers.take_events() == 0


# --- MSI-X (4.1.5.1.2, PCI 3.0 6.8.2)


def test_the_table_takes_what_it_should(machine):
    pci = machine.pci
    assert pci.bar_read(MSIX_BAR, 12, 4) == 1, "masked after reset"
    for offset in range(0, 16, 4):
        pci.bar_write(MSIX_BAR, 16 + offset, 0xFFFFFFFF, 4)
    entry = struct.unpack("<IIII", pci.bar_read(MSIX_BAR, 16, 16).to_bytes(16, "little"))
    assert entry == (0xFFFFFFFC, 0xFFFFFFFF, 0xFFFFFFFF, 1)
    unmask(machine, 1, 0xFEE0_1000, 0x31)
    assert pci.msix_message(1) == (0xFEE0_1000, 0x31)
    assert pci.bar_read(MSIX_BAR, 16, 8) == 0xFEE0_1000
    pci.bar_write(MSIX_BAR, 16 * pci.vectors, 0xFFFF, 4)


def test_vectors_are_read_back_and_what_is_none_is_refused(machine, driver):
    assert machine.pci.config_read(driver.msix_capability + 2, 2) & 0x7FF == 8
    for offset in (16, 26):
        assert driver.read_common(offset, 2) == NO_VECTOR
        for vector in (0, 8, NO_VECTOR):
            driver.write_common(offset, vector, 2)
            assert driver.read_common(offset, 2) == vector
        for vector in (9, 0x7FF, 0x1234):
            driver.write_common(offset, vector, 2)
            assert driver.read_common(offset, 2) == NO_VECTOR


@pytest.fixture
async def guest(make_controller, make_register_guest, enable_msix):
    """A guest whose control receiveq has vector 2 and whose configuration has vector 0."""
    controller = make_controller(max_ports=1)
    guest = make_register_guest(controller)
    guest.vectors = {2: 2, 3: 3}
    enable_msix(guest.machine, guest.registers)
    accept = guest.accept

    def accept_and_map(wanted: int) -> int:
        bits = accept(wanted)
        guest.registers.write_common(16, 0, 2)
        return bits

    guest.accept = accept_and_map
    return guest


async def test_masked_vectors_stay_pending_until_unmasked(guest, enable_msix):
    machine = guest.machine
    guest.boot()
    await guest.until(lambda: pending(machine) == 1 << 3)
    assert machine.vectors == machine.levels == []
    unmask(machine, 2)
    assert machine.vectors == []
    unmask(machine, 3)
    assert machine.vectors == [3]
    assert pending(machine) == 0
    guest.say(0, 3)
    await guest.until(lambda: machine.vectors == [3, 3])
    enable_msix(machine, guest.registers, function_mask=True)
    guest.say(0, 3)
    await guest.until(lambda: pending(machine) == 1 << 3)
    assert machine.vectors == [3, 3]
    enable_msix(machine, guest.registers)
    assert machine.vectors == [3, 3, 3]


@pytest.mark.parametrize("vectors", [1, 2, 3, 2048])
def test_the_table_has_the_size_that_was_asked_for(make_controller, make_machine, vectors):
    machine = make_machine(make_controller(), vectors=vectors)
    driver = machine.driver()
    assert machine.pci.vectors == vectors
    assert machine.pci.config_read(driver.msix_capability + 2, 2) & 0x7FF == vectors - 1
    for vector, expected in ((vectors - 1, vectors - 1), (vectors, NO_VECTOR)):
        driver.write_common(16, vector, 2)
        assert driver.read_common(16, 2) == expected


@pytest.mark.parametrize("kind", ["pci", "pci-legacy"])
async def test_without_a_table_the_function_has_intx_alone(
    make_controller, make_register_guest, kind
):
    guest = make_register_guest(make_controller(max_ports=1), kind, vectors=0)
    machine = guest.machine
    assert MSIX_BAR not in [bar.index for bar in machine.pci.bars]
    assert machine.pci.config_read(0x10 + 4 * MSIX_BAR, 4) == 0
    modern = PciDriver(machine.pci.config_read, machine.pci.config_write, machine.bar)
    assert modern.msix_capability == 0
    modern.write_common(16, 0, 2)
    assert modern.read_common(16, 2) == NO_VECTOR
    guest.boot()
    await guest.until(lambda: machine.levels == [True])
    machine.pci.reset()
    assert machine.levels == [True, False]


async def test_without_a_vector_there_is_no_interrupt(guest):
    machine = guest.machine
    guest.vectors = {}
    for vector in range(machine.pci.vectors):
        unmask(machine, vector)
    guest.boot()
    await guest.until(lambda: guest.collect(3) is not None and not guest.rings[3].buffers)
    await guest.settle(3)
    assert machine.vectors == machine.levels == []
    guest.registers.write_common(16, NO_VECTOR, 2)
    guest.rings[3].driver.add([(0xDEAD_0000_0000, 8)], [])
    guest.publish(3)
    await guest.until(lambda: guest.registers.status & Status.DEVICE_NEEDS_RESET)
    assert machine.vectors == machine.levels == []
    assert guest.registers.take_events() == 2, "the ISR status has the configuration's bit even so"


async def test_the_configuration_has_its_own_vector(guest):
    machine = guest.machine
    unmask(machine, 0)
    guest.boot()
    guest.rings[3].driver.add([(0xDEAD_0000_0000, 8)], [])
    guest.publish(3)
    await guest.until(lambda: machine.vectors == [0])


async def test_a_reset_forgets_what_was_pending(guest):
    guest.boot()
    await guest.until(lambda: pending(guest.machine) == 1 << 3)
    guest.forget()
    assert pending(guest.machine) == 0
    unmask(guest.machine, 3)
    assert guest.machine.vectors == []


async def test_what_cannot_be_delivered_waits_for_the_sink(guest):
    machine = guest.machine
    machine.pci.set_irq_sink(machine, client_masks=True)  # the table is masked, and does not count
    machine.deliverable = False
    guest.boot()
    await guest.until(lambda: pending(machine) == 1 << 3)
    machine.deliverable = True
    machine.pci.vectors_changed()
    assert machine.vectors == [3]


async def test_calls_go_straight_to_a_descriptor_of_the_vector(guest):
    machine = guest.machine
    event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    other = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        machine.descriptors[3] = event
        machine.pci.set_irq_sink(machine, client_masks=True)
        guest.boot()
        await guest.until(lambda: guest.collect(3) is not None and not guest.rings[3].buffers)
        assert os.eventfd_read(event) >= 1
        assert machine.vectors == [], "nobody had to be asked"
        machine.descriptors[3] = other
        machine.pci.vectors_changed()
        guest.say(0, 3)
        await guest.until(lambda: guest.collect(3) is not None and not guest.rings[3].buffers)
        assert os.eventfd_read(other) >= 1
        machine.descriptors.clear()
        machine.pci.vectors_changed()
        guest.say(0, 3)
        await guest.until(lambda: machine.vectors == [3])
        with pytest.raises(BlockingIOError):
            os.eventfd_read(event)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(other)
    finally:
        os.close(event)
        os.close(other)


# --- Bus Master Enable: messages are writes to memory (PCI 3.0, 6.2.2 and 6.8.2)


@pytest.mark.parametrize("client_masks", [False, True])
async def test_messages_wait_for_bus_mastering(guest, client_masks):
    machine = guest.machine
    machine.pci.set_irq_sink(machine, client_masks=client_masks)
    unmask(machine, 0)
    guest.boot()
    machine.pci.config_write(4, 2, 2)
    guest.controller.on_config_change()
    assert machine.vectors == []
    assert pending(machine) & 1
    unmask(machine, 0)
    machine.pci.vectors_changed()
    assert machine.vectors == [], "nor does unmasking let it go"
    machine.pci.config_write(4, 6, 2)
    assert machine.vectors[0] == 0
    assert not pending(machine) & 1


async def test_a_descriptor_is_not_told_without_bus_mastering(guest):
    """Neither by us, nor by whoever calls the driver of a queue directly."""
    machine = guest.machine
    event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        machine.descriptors[0] = machine.descriptors[3] = event
        machine.pci.set_irq_sink(machine, client_masks=True)
        guest.boot()
        await guest.until(lambda: guest.collect(3) is not None and not guest.rings[3].buffers)
        os.eventfd_read(event)
        machine.pci.config_write(4, 2, 2)
        guest.say(0, ControlEvent.PORT_READY, 0)
        await turns()
        guest.collect(3)
        assert guest.rings[3].buffers, "the device may not write either"
        guest.controller.on_config_change()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(event)
        machine.pci.config_write(4, 6, 2)
        assert machine.vectors == [0]
        await guest.until(lambda: guest.collect(3) is not None and not guest.rings[3].buffers)
        assert os.eventfd_read(event)
    finally:
        os.close(event)


async def test_intx_is_no_message(make_controller, make_register_guest):
    guest = make_register_guest(make_controller(max_ports=1))
    pci, machine = guest.machine.pci, guest.machine
    guest.boot()
    await guest.until(lambda: machine.levels == [True])
    guest.registers.take_events()
    pci.config_write(4, 2, 2)
    guest.controller.on_config_change()
    assert machine.levels == [True, False, True]


async def test_legacy_drivers_need_not_ask_for_bus_mastering(
    make_controller, make_register_guest, enable_msix
):
    guest = make_register_guest(make_controller(max_ports=1), "pci-legacy")
    machine = guest.machine
    machine.pci.config_write(4, 1, 2)
    modern = PciDriver(machine.pci.config_read, lambda *_: None, machine.bar)
    enable_msix(machine, modern)
    guest.registers.msix = True
    guest.vectors = {3: 3}
    unmask(machine, 3)
    guest.boot()
    await guest.until(lambda: machine.vectors != [])
    assert machine.vectors[0] == 3
