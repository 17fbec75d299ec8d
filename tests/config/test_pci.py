from __future__ import annotations

from itertools import islice

import pytest

from vring_serial.config.pci import PciSlots
from vring_serial.config.topology import PciAddress
from vring_serial.errors import ConfigError


def free(slots: PciSlots, count: int = 3) -> list[str]:
    return [str(address) for address in islice(slots.assign_free(), count)]


def test_conventional_slots_from_3_on() -> None:
    slots = PciSlots()
    slots.note(PciAddress(slot=4), "a disk")
    assert free(slots) == ["0000:00:03.0", "0000:00:05.0", "0000:00:06.0"]


def test_express_buses_from_1_on() -> None:
    slots = PciSlots(express=True, bridges=[2])
    slots.note(PciAddress(bus=1), "a disk")
    assert free(slots) == ["0000:03:00.0", "0000:04:00.0", "0000:05:00.0"]


def test_a_slot_in_use_is_not_shared() -> None:
    slots = PciSlots()
    slots.note(PciAddress(slot=3, function=7), "a disk")
    assert free(slots, 1) == ["0000:00:04.0"]


def test_others_come_first() -> None:
    slots = PciSlots()
    slots.waiting = 2
    assert free(slots, 1) == ["0000:00:05.0"]
    slots.waiting = 100
    assert free(slots) == []


def test_addresses_end() -> None:
    assert len(list(PciSlots().assign_free())) == 29
    assert len(list(PciSlots(express=True).assign_free())) == 255


def test_take_refuses_what_is_taken() -> None:
    slots = PciSlots()
    slots.take(PciAddress(slot=5), "ours")
    with pytest.raises(ConfigError, match=r"theirs: PCI address 0000:00:05\.0 .*\(ours\)"):
        slots.take(PciAddress(slot=5), "theirs")
