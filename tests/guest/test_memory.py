"""The guest's RAM."""

from __future__ import annotations

import os

import pytest

from tests.support.leaks import held
from vring_serial.errors import ResourceError
from vring_serial.guest.errors import GuestMemoryError
from vring_serial.guest.memory import PAGE, GuestRam


def test_what_is_written_here_is_seen_through_the_descriptor_and_the_region_table() -> None:
    ram = GuestRam(3 * PAGE + 1)
    assert ram.size == 4 * PAGE == os.fstat(ram.fd).st_size
    ram.allocate(100)
    address = ram.allocate(4, PAGE)
    assert address == ram.guest_addr + PAGE
    ram.view(address, 4)[:] = b"ring"
    assert os.pread(ram.fd, 4, PAGE) == b"ring"
    assert ram.memory.read(address, 4) == b"ring"
    assert ram.memory.user_to_guest(ram.user_address(address)) == address
    ram.close()
    ram.close()
    assert bytes(ram.view(address, 4)) == b"ring"


def test_it_can_neither_shrink_nor_grow() -> None:
    ram = GuestRam(PAGE)
    for size in (0, 2 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(ram.fd, size)
    ram.close()


def test_it_ends() -> None:
    ram = GuestRam(PAGE)
    ram.allocate(PAGE - 8)
    ram.allocate(8)
    with pytest.raises(GuestMemoryError, match="used up"):
        ram.allocate(1)
    ram.close()


@pytest.mark.parametrize("size", [1 << 62, 0, -1])
def test_an_impossible_size_is_a_named_error(size: int) -> None:
    before = held()
    with pytest.raises(ResourceError, match="guest RAM"):
        GuestRam(size)
    assert held() == before
