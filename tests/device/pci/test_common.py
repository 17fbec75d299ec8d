"""The common configuration structure, at any width of access (virtio 1.3, 4.1.3, 4.1.4.3)."""

from __future__ import annotations

import asyncio
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vring_serial.device.console.config_space import DEFAULT_FEATURES
from vring_serial.device.console.controller import Controller
from vring_serial.device.pci import PciDevice
from vring_serial.device.testing import PciDriver
from vring_serial.proto.virtio import Feature, Status

NO_VECTOR = 0xFFFF


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


def test_the_registers_offer_what_is_theirs_and_hide_what_is_legacy(make_controller, make_machine):
    features = DEFAULT_FEATURES | Feature.ANY_LAYOUT | Feature.NOTIFY_ON_EMPTY
    machine = make_machine(make_controller(features=features), "pci-legacy")
    modern = PciDriver(machine.pci.config_read, machine.pci.config_write, machine.bar)
    assert modern.offered() == DEFAULT_FEATURES | Feature.RING_RESET | Feature.NOTIFICATION_DATA
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
@settings(max_examples=150)
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
