"""Addresses by themselves; what libvirt makes of whole domains is in test_libvirt.py."""

from __future__ import annotations

import pytest

from vring_serial.config.pci import CONVENTIONAL, PC, PSERIES, VIRT, PciMachine, PciSlots, Plug
from vring_serial.config.topology import PciAddress
from vring_serial.errors import ConfigError


def free(slots: PciSlots, count: int = 3, plug: Plug = Plug.EXPRESS) -> list[str]:
    return [str(address)[5:] for address in slots.assign([plug] * count)]


def test_conventional_slots() -> None:
    slots = PciSlots(PC)
    slots.note(PciAddress(slot=3), "a disk")
    assert free(slots) == ["00:02.0", "00:04.0", "00:05.0"]
    assert free(PciSlots(CONVENTIONAL)) == ["00:01.0", "00:02.0", "00:03.0"]


def test_express_buses() -> None:
    slots = PciSlots(VIRT)
    slots.add_bus(2, "pci-bridge", fixed=True)
    slots.note(PciAddress(bus=1), "a disk")
    assert free(slots) == ["03:00.0", "04:00.0", "05:00.0"]


def test_conventional_devices_on_an_express_machine_share_a_bridge() -> None:
    assert free(PciSlots(VIRT), plug=Plug.CONVENTIONAL) == ["02:01.0", "02:02.0", "02:03.0"]


def test_a_slot_in_use_is_not_shared() -> None:
    slots = PciSlots(CONVENTIONAL)
    slots.note(PciAddress(slot=1, function=7), "a disk")
    assert free(slots, 1) == ["00:02.0"]


def test_others_come_first_or_later() -> None:
    slots = PciSlots(VIRT)
    slots.before = [Plug.EXPRESS] * 2
    assert free(slots, 1) == ["03:00.0"]
    slots.after = [Plug.EXPRESS] * 2
    assert free(slots, 1) == ["03:00.0"]
    slots.after = [Plug.CONVENTIONAL]  # its bridge gets the first port
    assert free(slots, 1) == ["04:00.0"]


def test_assigning_changes_nothing() -> None:
    slots = PciSlots(PC)
    assert free(slots) == free(slots)


@pytest.mark.parametrize(
    ("machine", "count", "last"),
    # On pc libvirt keeps one slot for a bridge that may come.
    [(PC, 29, "00:1e.0"), (VIRT, 254, "fe:00.0"), (PSERIES, 32, "01:01.0")],
)
def test_addresses_end(machine: PciMachine, count: int, last: str) -> None:
    slots = PciSlots(machine)
    assert free(slots, count)[-1] == last
    assert slots.assign([Plug.EXPRESS] * 20_000)[-1] is None


def test_take_refuses_what_is_taken() -> None:
    slots = PciSlots()
    slots.take(PciAddress(slot=5), "ours")
    with pytest.raises(ConfigError, match=r"theirs: PCI address 0000:00:05\.0 .*\(ours\)"):
        slots.take(PciAddress(slot=5), "theirs")
    with pytest.raises(ConfigError, match=r"0000:00:01\.0 is taken already \(the chipset\)"):
        slots.take(PciAddress(slot=1), "ours")
