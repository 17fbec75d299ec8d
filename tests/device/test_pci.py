"""The PCI function: what virtio 1.3, 4.1 and PCI 3.0 demand of it."""

from __future__ import annotations

import asyncio
import itertools
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vring_serial.device.controller import DEFAULT_FEATURES, Controller
from vring_serial.device.pci import PciDevice
from vring_serial.device.testing import PciDriver
from vring_serial.errors import ConfigError
from vring_serial.proto.console import Feature, Status

VIRTIO_BAR = 4
MSIX_BAR = 1
NO_VECTOR = 0xFFFF


@pytest.fixture
def machine(make_controller, make_machine):
    return make_machine(make_controller(max_ports=3))


@pytest.fixture
def driver(machine) -> PciDriver:
    return machine.driver()


def enable_msix(machine, driver, *, function_mask: bool = False) -> None:
    control = 0x8000 | 0x4000 * function_mask
    machine.pci.config_write(driver.msix_capability + 2, control, 2)


def unmask(machine, vector: int, address: int = 0xFEE0_0000, data: int = 0x4041) -> None:
    for offset, value in zip((0, 4, 8, 12), (address, 0, data, 0), strict=True):
        machine.pci.bar_write(MSIX_BAR, 16 * vector + offset, value, 4)


def pending(machine) -> int:
    capability = machine.driver().msix_capability
    offset = machine.pci.config_read(capability + 8, 4) & ~7
    return machine.pci.bar_read(MSIX_BAR, offset, 8)


# --- discovery (4.1.2)


def test_a_modern_device_has_the_ids_of_one(machine):
    read = machine.pci.config_read
    assert (read(0x00, 2), read(0x02, 2)) == (0x1AF4, 0x1043)
    assert read(0x08, 1) >= 1, "revision"
    assert read(0x09, 3) == 0x078000, "class: communication controller"
    assert read(0x0E, 1) == 0, "header type"
    assert (read(0x2C, 2), read(0x3D, 1)) == (0x1AF4, 1)
    assert read(0x2E, 2) >= 0x40


def test_a_transitional_device_has_the_ids_of_one(make_controller, make_machine):
    read = make_machine(make_controller(), "pci-legacy").pci.config_read
    assert (read(0x00, 2), read(0x02, 2)) == (0x1AF4, 0x1003)
    assert read(0x08, 1) == 0, "revision"
    assert read(0x2E, 2) == 3, "subsystem: the device type"
    assert read(0x10, 4) == 1, "BAR 0 in I/O space"


@pytest.mark.parametrize("kind", ["pci", "pci-legacy"])
def test_bars_tell_their_sizes(make_controller, make_machine, kind):
    pci = make_machine(make_controller(), kind).pci
    sizes = {}
    for index in range(6):
        pci.config_write(0x10 + 4 * index, 0xFFFFFFFF, 4)
        mask = pci.config_read(0x10 + 4 * index, 4)
        if mask:
            sizes[index] = (1 << 32) - (mask & ~3)
            assert mask & 3 == (1 if index == 0 else 0)
        pci.config_write(0x10 + 4 * index, 0xC000_0000, 4)
        assert pci.config_read(0x10 + 4 * index, 4) & ~3 == (0xC000_0000 if mask else 0)
    assert sizes == {bar.index: bar.size for bar in pci.bars}
    assert (0 in sizes) is (kind == "pci-legacy")


def test_a_bar_has_an_address_while_its_space_is_enabled(make_controller, make_machine):
    pci = make_machine(make_controller(), "pci-legacy").pci
    pci.config_write(0x10, 0xC000, 4)
    pci.config_write(0x20, 0xE000_0000, 4)
    assert [pci.bar_address(n) for n in (0, 4)] == [None, None]
    pci.config_write(0x04, 1, 2)
    assert [pci.bar_address(n) for n in (0, 4)] == [0xC000, None]
    pci.config_write(0x04, 2, 2)
    assert [pci.bar_address(n) for n in (0, 4, 2)] == [None, 0xE000_0000, None]


# --- capabilities (4.1.4)


@pytest.mark.parametrize("max_ports", [1, 31, 500])
def test_the_structures_lie_in_their_bar_and_apart(make_controller, make_machine, max_ports):
    machine = make_machine(make_controller(max_ports=max_ports))
    driver = machine.driver()
    assert set(driver.structures) == {1, 2, 3, 4}
    assert driver.window_capability
    size = {bar.index: bar.size for bar in machine.pci.bars}
    places = []
    for kind, (bar, offset, length) in driver.structures.items():
        assert bar == VIRTIO_BAR
        assert offset % 4 == 0 or kind == 3
        assert offset + length <= size[bar]
        places.append((offset, offset + length))
    places.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    assert driver.structures[1][2] >= 64
    assert driver.structures[4][2] == 12
    driver.write_common(22, 2 * max_ports + 1, 2)
    last = driver.read_common(30, 2)
    multiplier = machine.pci.notify_offsets[1].offset - machine.pci.notify_offsets[0].offset
    assert multiplier % 4 == 0
    assert driver.structures[2][2] >= last * multiplier + 4


def test_capability_lengths_include_what_follows(machine, driver):
    read, at, seen = machine.pci.config_read, machine.pci.config_read(0x34, 1), []
    while at:
        if read(at, 1) == 9:
            seen.append((read(at + 3, 1), read(at + 2, 1)))
        at = read(at + 1, 1)
    assert seen == [(1, 16), (2, 20), (3, 16), (4, 16), (5, 20)]
    assert read(6, 2) & 0x10, "status: there is a list"


def test_no_capability_but_the_window_can_be_written(machine, driver):
    pci = machine.pci
    before = pci.config_read(0, 256)
    for at in range(256):
        if not driver.window_capability <= at < driver.window_capability + 20:
            pci.config_write(at, 0, 1)
    assert pci.config_read(0, 256).to_bytes(256, "little")[0x34:0x38] == b"\x40\0\0\0"
    pci.reset()
    assert pci.config_read(0, 256) == PciDevice(Controller(max_ports=3)).config_read(0, 256)
    assert before != pci.config_read(0, 256), "the driver had set the command register"


def test_the_configuration_space_is_bytes_at_any_offset_and_size(machine):
    whole = machine.pci.config_read(0, 256).to_bytes(256, "little")
    for size in (1, 2, 3, 4, 8):
        for offset in range(256 - size):
            value = machine.pci.config_read(offset, size)
            assert value.to_bytes(size, "little") == whole[offset : offset + size]
    assert machine.pci.config_read(0x100, 4) == 0xFFFFFFFF
    assert machine.pci.config_read(0xFE, 4) == 0xFFFF0000
    machine.pci.config_write(0xFE, 0x12345678, 4)
    machine.pci.config_write(0x1000, 1, 4)


# --- common configuration (4.1.4.3)


def test_feature_words_beyond_the_second_are_zero_and_harmless(driver):
    for word in (2, 3, 0xFFFFFFFF):
        driver.write_common(0, word, 4)
        assert driver.read_common(4, 4) == 0
    driver.accept(DEFAULT_FEATURES)
    driver.status = 0
    driver.status = 3
    for word, value in enumerate((0x11, 1, 0xFFFFFFFF, 0xFFFFFFFF)):
        driver.write_common(8, word, 4)
        driver.write_common(12, value, 4)
    for word, value in enumerate((0x11, 1, 0, 0)):
        driver.write_common(8, word, 4)
        assert driver.read_common(12, 4) == value


def test_features_are_fixed_by_features_ok(machine, driver):
    accepted = driver.accept(DEFAULT_FEATURES)
    driver.write_common(8, 0, 4)
    driver.write_common(12, 0, 4)
    assert driver.read_common(12, 4) == accepted & 0xFFFFFFFF
    assert machine.pci.device.driver_features == accepted


def test_the_registers_offer_ring_reset_and_hide_what_is_legacy(make_controller, make_machine):
    features = DEFAULT_FEATURES | Feature.ANY_LAYOUT | Feature.NOTIFY_ON_EMPTY
    machine = make_machine(make_controller(features=features), "pci-legacy")
    modern = PciDriver(machine.pci.config_read, machine.pci.config_write, machine.bar)
    assert modern.offered() == DEFAULT_FEATURES | Feature.RING_RESET
    assert machine.bar(0)[0](0, 4) == features & 0xFFFFFFFF


def test_a_reset_brings_all_registers_back(make_controller, make_register_guest):
    async def scenario() -> None:
        guest = make_register_guest(make_controller(max_ports=1))
        before = [guest.registers.read_common(at, 1) for at in range(64)]
        guest.start()
        guest.registers.write_common(16, 1, 2)
        guest.registers.write_common(22, 2, 2)
        guest.registers.write_common(0, 1, 4)
        guest.registers.write_common(8, 1, 4)
        guest.forget()
        assert [guest.registers.read_common(at, 1) for at in range(64)] == before
        for index in range(4):
            guest.registers.write_common(22, index, 2)
            assert guest.registers.read_common(28, 2) == 0
            assert guest.registers.read_common(26, 2) == NO_VECTOR
            assert guest.registers.read_common(24, 2) == 64

    asyncio.run(scenario())


@pytest.mark.parametrize("size", [0, 3, 48, 100, 512, 65535])
def test_a_size_that_cannot_be_is_not_taken(driver, size):
    assert driver.queue_size(0) == 256
    driver.write_common(24, size, 2)
    assert driver.read_common(24, 2) == 256
    driver.write_common(24, 32, 2)
    assert driver.read_common(24, 2) == 32


def test_a_queue_that_is_not_there_is_zero_everywhere(driver):
    for index in (8, 0x7FFF, 0xFFFF):
        driver.start_queue(index, 64, (0x1000, 0x2000, 0x3000), vector=1)
        assert driver.read_common(22, 2) == index
        assert driver.read_common(24, 2) == 0
        assert driver.read_common(26, 2) == NO_VECTOR
        assert [driver.read_common(at, 4) for at in range(32, 56, 4)] == [0] * 6
        driver.write_common(58, 1, 2)
    assert driver.read_common(18, 2) == 8


async def test_a_queue_is_reset_before_the_write_returns(make_controller, make_register_guest):
    features = DEFAULT_FEATURES | Feature.RING_RESET
    guest = make_register_guest(make_controller(max_ports=1), features=features)
    guest.registers.write_common(22, 1, 2)
    guest.registers.write_common(58, 1, 2)
    assert guest.registers.read_common(58, 2) == 0
    guest.vectors[1] = 2
    guest.start()
    guest.registers.write_common(22, 1, 2)
    assert (guest.registers.read_common(28, 2), guest.registers.read_common(58, 2)) == (1, 0)
    guest.registers.write_common(58, 0, 2)
    assert guest.registers.read_common(28, 2) == 1, "only 1 resets"
    guest.registers.write_common(58, 1, 2)
    assert (guest.registers.read_common(28, 2), guest.registers.read_common(58, 2)) == (0, 0)
    assert guest.controller.stop_queue(1) == 0, "the device has left it"
    assert guest.registers.read_common(26, 2) == NO_VECTOR
    guest.registers.write_common(22, 0, 2)
    assert guest.registers.read_common(28, 2) == 1, "the others go on"


def test_halves_of_addresses_are_independent(driver):
    driver.write_common(22, 1, 2)
    for offset in (32, 40, 48):
        driver.write_common(offset + 4, 0x11223344, 4)
        assert driver.read_common(offset, 8) == 0x11223344_00000000
        driver.write_common(offset, 0x55667788, 4)
        assert driver.read_common(offset, 8) == 0x11223344_55667788
        driver.write_common(offset, 0x0102030405060708, 8)
        assert driver.read_common(offset + 4, 4) == 0x01020304


async def test_what_a_running_queue_is_cannot_be_changed(make_controller, make_register_guest):
    guest = make_register_guest(make_controller(max_ports=1))
    guest.start()
    guest.registers.write_common(22, 0, 2)
    before = [guest.registers.read_common(at, 4) for at in range(24, 56, 4)]
    guest.registers.write_common(24, 32, 2)
    for at in range(32, 56, 4):
        guest.registers.write_common(at, 0xFFFFFFFF, 4)
    guest.registers.write_common(28, 0, 2)  # which a driver must not
    assert [guest.registers.read_common(at, 4) for at in range(24, 56, 4)] == before


async def test_no_buffer_is_used_before_driver_ok(make_controller, make_register_guest):
    controller = make_controller(max_ports=1)
    guest = make_register_guest(controller)
    guest.registers.accept(guest.features)
    for index in range(4):
        guest.start_queue(index)
    guest.give_buffers(2)
    guest.control.start()
    guest.flush()
    await guest.settle(5)
    assert guest.rings[3].buffers
    guest.registers.status = 15
    await guest.until(lambda: guest.collect(3) is not None and not guest.rings[3].buffers)


async def test_without_bus_mastering_memory_is_not_touched(make_controller, make_register_guest):
    guest = make_register_guest(make_controller(max_ports=1))
    guest.boot()
    await guest.until(lambda: guest.collect(3) is not None and not guest.rings[3].buffers)
    guest.machine.pci.config_write(4, 2, 2)
    guest.say(0, 3)
    await guest.settle(5)
    guest.collect(3)
    assert guest.rings[3].buffers
    guest.machine.pci.config_write(4, 6, 2)
    await guest.until(lambda: guest.collect(3) is not None and not guest.rings[3].buffers)


def test_status_bits_of_the_device_are_not_the_drivers(driver):
    driver.status = 3 | Status.DEVICE_NEEDS_RESET
    assert driver.status == 3
    driver.status = 0x83
    assert driver.status == 0x83
    driver.status = 0
    assert driver.status == 0


async def test_every_width_of_notification_counts(make_controller, make_register_guest):
    guest = make_register_guest(make_controller(max_ports=1))
    guest.start()
    for width in (1, 2, 4):
        kick_fd = guest.machine.pci.kick_fd(1)
        guest.controller.stop_queue(1)  # nobody else reads the kicks
        where = guest.machine.pci.notify_offsets[1]
        guest.machine.pci.bar_write(where.bar, where.offset, 1, width)
        assert os.eventfd_read(kick_fd) == 1
    assert guest.machine.pci.bar_read(where.bar, where.offset, 4) == 0


# --- access of any width (4.1.3)


def test_narrow_and_wide_reads_see_the_same_bytes(driver):
    driver.accept(DEFAULT_FEATURES)
    driver.write_common(22, 1, 2)
    driver.write_common(40, 0x1234_5678_9ABC_DEF0, 8)
    whole = driver.read_common(0, 64).to_bytes(64, "little")
    for size in (1, 2, 3, 4, 7, 8):
        for offset in range(64 - size):
            value = driver.read_common(offset, size).to_bytes(size, "little")
            assert value == whole[offset : offset + size]


def test_a_write_reaches_whole_fields_only(driver):
    driver.write_common(22, 1, 2)
    driver.write_common(22, 0, 1)  # half of queue_select
    assert driver.read_common(22, 2) == 1
    driver.write_common(22, 32 << 16 | 2, 4)  # queue_select and queue_size
    assert (driver.read_common(22, 2), driver.read_common(24, 2)) == (2, 32)
    driver.write_common(21, 0x0003_00, 3)  # config_generation, and queue_select
    assert driver.read_common(22, 2) == 3


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_access_has_an_answer(data):
    pci = PciDevice(Controller(max_ports=1), transitional=True)
    offsets = st.one_of(st.integers(0, 300), st.sampled_from([0x1000, 0x2000, 0x3000, 0x3FFF]))
    for _ in range(data.draw(st.integers(1, 20))):
        offset, size = data.draw(offsets), data.draw(st.integers(1, 16))
        value, bar = data.draw(st.integers(0, 2**64)), data.draw(st.integers(-1, 6))
        if (bar, offset) == (4, 20) or bar == 0:
            value &= ~0x04  # DRIVER_OK starts queues, which needs a loop: tests/fuzz have one
        if data.draw(st.booleans()):
            assert 0 <= pci.bar_read(bar, offset, size) < 1 << 8 * size
        elif bar != 4 or not offset <= 20 < offset + size:
            pci.bar_write(bar, offset, value, size)
        assert 0 <= pci.config_read(offset, size) < 1 << 8 * size
    pci.close()


# --- the window in configuration space (4.1.4.9)


def test_every_structure_is_reached_through_configuration_space(machine, driver):
    pci, window = machine.pci, driver.window_capability

    def select(offset: int, size: int, bar: int = VIRTIO_BAR) -> None:
        pci.config_write(window + 4, bar, 1)
        pci.config_write(window + 8, offset, 4)
        pci.config_write(window + 12, size, 4)

    def read(offset: int, size: int) -> int:
        select(offset, size)
        return pci.config_read(window + 16, size)

    def write(offset: int, value: int, size: int) -> None:
        select(offset, size)
        pci.config_write(window + 16, value, size)

    common, config = driver.structures[1][1], driver.structures[4][1]
    write(common + 20, 3, 1)
    assert driver.status == 3
    write(common + 22, 2, 2)
    assert read(common + 24, 2) == driver.queue_size(2) == 256
    write(common + 32, 0xCAFE0000, 4)
    assert driver.read_common(32, 4) == 0xCAFE0000
    assert read(config + 4, 4) == 3
    assert read(driver.structures[3][1], 1) == 0
    for size, bar, offset in ((3, 4, 0), (0, 4, 0), (8, 4, 0), (4, 6, 0), (4, 4, 2), (4, 0, 0)):
        select(offset, size, bar)
        pci.config_write(window + 16, 0xFFFFFFFF, 4)
        pci.config_read(window + 16, 4)
    assert driver.status == 3


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


async def msix_guest(make_controller, make_register_guest):
    """A guest whose control receiveq has vector 2 and whose configuration has vector 0."""
    controller = make_controller(max_ports=1)
    guest = make_register_guest(controller)
    guest.vectors = {2: 2, 3: 3}
    enable_msix(guest.machine, guest.registers)
    accept = guest.registers.accept

    def accept_and_map(wanted: int) -> int:
        bits = accept(wanted)
        guest.registers.write_common(16, 0, 2)
        return bits

    guest.registers.accept = accept_and_map
    return guest


async def test_masked_vectors_stay_pending_until_unmasked(make_controller, make_register_guest):
    guest = await msix_guest(make_controller, make_register_guest)
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


async def test_without_a_vector_there_is_no_interrupt(make_controller, make_register_guest):
    guest = await msix_guest(make_controller, make_register_guest)
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


async def test_the_configuration_has_its_own_vector(make_controller, make_register_guest):
    guest = await msix_guest(make_controller, make_register_guest)
    machine = guest.machine
    unmask(machine, 0)
    guest.boot()
    guest.rings[3].driver.add([(0xDEAD_0000_0000, 8)], [])
    guest.publish(3)
    await guest.until(lambda: machine.vectors == [0])


async def test_a_reset_forgets_what_was_pending(make_controller, make_register_guest):
    guest = await msix_guest(make_controller, make_register_guest)
    guest.boot()
    await guest.until(lambda: pending(guest.machine) == 1 << 3)
    guest.forget()
    assert pending(guest.machine) == 0
    unmask(guest.machine, 3)
    assert guest.machine.vectors == []


async def test_what_cannot_be_delivered_waits_for_the_sink(make_controller, make_register_guest):
    guest = await msix_guest(make_controller, make_register_guest)
    machine = guest.machine
    machine.pci.set_irq_sink(machine, client_masks=True)  # the table is masked, and does not count
    machine.deliverable = False
    guest.boot()
    await guest.until(lambda: pending(machine) == 1 << 3)
    machine.deliverable = True
    machine.pci.vectors_changed()
    assert machine.vectors == [3]


async def test_calls_go_straight_to_a_descriptor_of_the_vector(
    make_controller, make_register_guest
):
    guest = await msix_guest(make_controller, make_register_guest)
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


# --- the legacy interface (4.1.4.10)


async def test_the_legacy_registers_move_with_msix(make_controller, make_machine):
    machine = make_machine(make_controller(max_ports=5), "pci-legacy")
    read, write = machine.bar(0)
    assert read(20 + 4, 4) == 5
    modern = PciDriver(machine.pci.config_read, machine.pci.config_write, machine.bar)
    enable_msix(machine, modern)
    assert read(24 + 4, 4) == 5
    assert read(20, 4) == 0xFFFFFFFF, "no vectors"
    write(20, 1, 2)
    write(22, 2, 2)
    assert read(20, 4) == 0x0002_0001
    machine.pci.config_write(modern.msix_capability + 2, 0, 2)
    assert read(20 + 4, 4) == 5
    for offset in range(20, 32):  # any width gives the same bytes
        for size in (1, 2, 4):
            expected = machine.pci.device.read_config(offset - 20, size)
            assert read(offset, size).to_bytes(size, "little") == expected


async def test_a_legacy_driver_uses_queues_before_driver_ok(make_controller, make_register_guest):
    controller = make_controller(max_ports=1)
    guest = make_register_guest(controller, "pci-legacy")
    guest.registers.write_config(8, ord("!"), 4)  # even before features
    guest.features = guest.registers.accept(guest.features)
    for index in range(4):
        guest.start_queue(index)
    guest.give_buffers(2)
    guest.control.start()
    guest.flush()
    await guest.until(lambda: guest.collect(3) is not None and not guest.rings[3].buffers)
    assert controller.driver_features == guest.features & ~Feature.ANY_LAYOUT
    read, write = guest.machine.bar(0)
    write(14, 3, 2)
    assert read(8, 4) == guest.rings[3].parts[0] >> 12
    write(8, 0, 4)
    assert read(8, 4) == 0


# --- what the one who builds it asks for


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"vectors": 2049}, "2049 MSI-X vectors"),
        ({"queue_size": 100}, "queue size 100"),
        ({"queue_size": 2048}, "queue size 2048"),
        ({"queue_size": -1}, "queue size -1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, why):
    with pytest.raises(ConfigError, match=why):
        PciDevice(Controller(), **options)


def test_a_device_has_no_more_queues_than_registers_can_name():
    with pytest.raises(ConfigError, match="65538 queues"):
        PciDevice(Controller(max_ports=0x8000))
