"""Guest memory whose file is cut off (SIGBUS): zeros, a mark and a message instead of death."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from vring import GuestMemory, MemoryWatch, Region

SIZE = 1 << 20


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("memory")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


def map_all(fd: int, **options: object) -> Region:
    return Region.map(fd, SIZE, guest_addr=0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("private", [False, True])
def test_reads_zeros_is_marked_and_tells(memfd: int, private: bool) -> None:
    watch = MemoryWatch()
    region = map_all(memfd, private=private, watch=watch)
    memory = GuestMemory([region])
    memory.write(0x8000, b"there")
    assert (region.lost, memory.lost) == (False, False)
    os.ftruncate(memfd, 4096)
    assert memory.read(0x8000, 5) == bytes(5)
    assert (region.lost, memory.lost) == (True, True)
    assert os.eventfd_read(watch.fd) == 1
    watch.clear()
    assert not select.select([watch], [], [], 0)[0]


def test_lost_memory_is_memory_of_its_own(memfd: int) -> None:
    memory = GuestMemory([map_all(memfd)])
    os.ftruncate(memfd, 0)
    memory.write(SIZE - 5, b"still")
    assert memory.read(SIZE - 5, 5) == b"still"
    os.ftruncate(memfd, SIZE)
    assert os.pread(memfd, 5, SIZE - 5) == bytes(5)


def test_python_numpy_and_views(memfd: int) -> None:
    for access in (
        lambda memory: bytes(memory.view(0x4000, 4096)),
        lambda memory: np.frombuffer(memory.view(0x4000, 4096), np.uint8).sum(),
        lambda memory: memory.view(0x4000, 8).__setitem__(0, 1),
    ):
        os.ftruncate(memfd, SIZE)
        memory = GuestMemory([map_all(memfd)])
        os.ftruncate(memfd, 0)
        access(memory)
        assert memory.lost


def test_only_the_region_that_was_cut_off_is_lost(memfd: int) -> None:
    other = os.memfd_create("other")
    try:
        os.ftruncate(other, SIZE)
        regions = [map_all(memfd), Region.map(other, SIZE, guest_addr=SIZE)]
        memory = GuestMemory(regions)
        memory.write(SIZE, b"kept")
        os.ftruncate(memfd, 0)
        memory.read(0, 1)
        assert [region.lost for region in regions] == [True, False]
        assert memory.read(SIZE, 4) == b"kept"
        assert not GuestMemory(regions[1:]).lost
    finally:
        os.close(other)


def test_a_slot_serves_again(memfd: int) -> None:
    for _ in range(600):  # more than one block of slots, were they not used again
        memory = GuestMemory([map_all(memfd)])
        os.ftruncate(memfd, 0)
        memory.read(SIZE - 1, 1)
        assert memory.lost
        os.ftruncate(memfd, SIZE)


def test_more_regions_than_one_block_of_slots(memfd: int) -> None:
    regions = [Region.map(memfd, 4096, guest_addr=4096 * i) for i in range(600)]
    memory = GuestMemory(regions)
    os.ftruncate(memfd, 0)
    memory.read(4096 * 599, 1)
    memory.read(4096 * 3, 1)
    assert [i for i in range(600) if regions[i].lost] == [3, 599]


def test_an_offset_that_is_not_a_page(memfd: int) -> None:
    region = Region.map(memfd, 5000, offset=1234, guest_addr=0)
    memory = GuestMemory([region])
    os.pwrite(memfd, b"first", 1234)
    assert memory.read(0, 5) == b"first"
    os.ftruncate(memfd, 4096)
    assert memory.read(4990, 10) == bytes(10)
    assert region.lost


def test_in_many_threads_at_once(memfd: int) -> None:
    """Each access ends, whichever thread is the first."""
    for _ in range(50):
        os.ftruncate(memfd, SIZE)
        region = map_all(memfd)
        memory = GuestMemory([region])
        start = threading.Barrier(5)

        def access(memory: GuestMemory = memory, start: threading.Barrier = start) -> None:
            start.wait()
            for at in range(0, SIZE, 65536):
                memory.read(at, 65536)

        threads = [threading.Thread(target=access) for _ in range(4)]
        for thread in threads:
            thread.start()
        start.wait()
        os.ftruncate(memfd, 0)
        for thread in threads:
            thread.join()
        memory.read(0, 1)
        assert region.lost


def test_a_watch_outlives_its_owner(memfd: int) -> None:
    """What the handler writes to stays open as long as it may."""
    region = map_all(memfd, watch=MemoryWatch())
    os.ftruncate(memfd, 0)
    memory = GuestMemory([region])
    memory.read(0, 1)
    assert memory.lost


def test_huge_pages() -> None:
    size = 2 << 20
    try:
        fd = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_HUGE_2MB)
        os.ftruncate(fd, 2 * size)
        region = Region.map(fd, size - 4096, offset=size, guest_addr=0)
    except Exception as error:
        pytest.skip(f"no huge pages here: {error}")
    try:
        memory = GuestMemory([region])
        memory.write(0, b"there")
        os.ftruncate(fd, size)
        assert memory.read(0, 5) == bytes(5)
        assert region.lost
    finally:
        os.close(fd)
