"""Guest memory stays out of core dumps, whoever maps it and whatever becomes of it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest

from vring import GuestMemory, Region
from vring_serial.guest.memory import GuestRam
from vring_serial.proto.vfio_user_dma import DmaFlag, DmaMap
from vring_serial.transport.lost_memory import make_watch
from vring_serial.transport.vfio_user.dma import DmaTable

SIZE = 1 << 20


def is_dumped(region: Region) -> bool:
    """What the kernel says of the mapping that holds it."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            first, _, rest = line.partition(" ")
            if "-" in first:
                start, end = (int(number, 16) for number in first.split("-"))
                inside = start <= address < end
            elif inside and first == "VmFlags:":
                return "dd" not in rest.split()
    raise AssertionError(f"{address:#x} is mapped nowhere")


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


def test_a_buffer_of_our_own_is_dumped() -> None:
    assert is_dumped(Region(0, bytearray(SIZE)))


@pytest.mark.parametrize("private", [False, True])
def test_a_mapped_file(memfd: int, private: bool) -> None:
    region = Region.map(memfd, SIZE - 5000, offset=5000, guest_addr=0, private=private)
    assert not is_dumped(region)


def test_memory_that_was_cut_off(memfd: int) -> None:
    region = Region.map(memfd, SIZE, guest_addr=0)
    os.ftruncate(memfd, 0)
    GuestMemory([region]).read(0, 1)
    assert region.lost
    assert not is_dumped(region)


def test_the_embedded_guest() -> None:
    ram = GuestRam(SIZE)
    (region,) = ram.memory.regions
    assert not is_dumped(region)
    os.close(ram.fd)


def test_copies_of_memory_that_only_the_client_has() -> None:
    table = DmaTable(4, make_watch("test"), {})
    table.map(DmaMap(DmaFlag.READ | DmaFlag.WRITE, 0, 0, SIZE), -1)
    (region,) = table.memory.regions
    assert not is_dumped(region)
    table.close()
