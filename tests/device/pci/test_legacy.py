"""The legacy interface in I/O space (virtio 1.3, 4.1.4.10)."""

from __future__ import annotations

import pytest

from vring_serial.device.testing import PciDriver
from vring_serial.proto.virtio import Feature


async def test_the_legacy_registers_move_with_msix(make_controller, make_machine, enable_msix):
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


@pytest.mark.parametrize("when", ["before legacy features", "after them"])
async def test_features_are_those_that_legacy_drivers_are_offered(
    make_controller, make_register_guest, when
):
    """Words that were written to the modern registers make no packed ring of a legacy one."""
    controller = make_controller(max_ports=1)
    guest = make_register_guest(controller, "pci-legacy+packed")
    machine = guest.machine
    modern = PciDriver(machine.pci.config_read, machine.pci.config_write, machine.bar)
    accept = guest.accept

    def write_modern() -> None:
        for word in (0, 1):
            modern.write_common(8, word, 4)
            modern.write_common(12, 0xFFFFFFFF, 4)

    def accept_legacy(wanted: int) -> int:
        if when == "before legacy features":
            write_modern()
        bits = accept(wanted)
        if when == "after them":
            write_modern()
        return bits

    guest.accept = accept_legacy
    guest.boot()
    await guest.until(lambda: guest.collect(3) is not None and not guest.rings[3].buffers)
    read, _ = machine.bar(0)
    offered, accepted = read(0, 4), read(4, 4)
    assert accepted & ~offered == 0
    assert controller.driver_features & ~offered == 0
