"""What a bus finds: configuration space and capabilities (virtio 1.3, 4.1.2, 4.1.4)."""

from __future__ import annotations

import itertools

import pytest

from vring_serial.device.console.controller import Controller
from vring_serial.device.pci import PciDevice
from vring_serial.errors import ConfigError

VIRTIO_BAR = 4


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


# --- what the one who builds it asks for


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"vectors": 2049}, "2049 MSI-X vectors"),
        ({"vectors": -1}, "-1 MSI-X vectors"),
        ({"queue_size": 100}, "queue size 100"),
        ({"queue_size": 65536}, "queue size 65536"),
        ({"queue_size": -1}, "queue size -1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, why):
    with pytest.raises(ConfigError, match=why):
        PciDevice(Controller(), **options)


def test_a_device_has_no_more_queues_than_registers_can_name():
    with pytest.raises(ConfigError, match="65538 queues"):
        PciDevice(Controller(max_ports=0x8000))
