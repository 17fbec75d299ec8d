"""GuestMemory: the region table, translation and its limits."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vring import AddressError, GuestMemory, LocalMisuseError, MemoryMapError, Region


def memory(*regions: tuple[int, int]) -> GuestMemory:
    return GuestMemory(Region(at, np.zeros(size, np.uint8)) for at, size in regions)


def test_reads_and_writes_cross_regions_that_touch() -> None:
    mem = memory((0x3000, 0x1000), (0x1000, 0x1000), (0x2000, 0x1000))
    assert [r.guest_addr for r in mem.regions] == [0x1000, 0x2000, 0x3000]
    data = bytes(range(256)) * 0x30
    mem.write(0x1000, data)
    assert mem.read(0x1000, 0x3000) == data
    assert mem.read(0x1FFF, 2) == data[0xFFF:0x1001]
    assert mem.read(0x1000, 0) == b""


@pytest.mark.parametrize(
    ("address", "length"),
    [(0xFFF, 1), (0xFFF, 2), (0x2000, 1), (0x1FFF, 2), (2**64 - 1, 1), (2**64 - 1, 2), (-1, 1),
     (2**64, 1), (0x1000, 2**64), (0x1000, 0x1001)],
)  # fmt: skip
def test_what_is_not_in_memory_is_refused(address: int, length: int) -> None:
    mem = memory((0x1000, 0x1000))
    for access in (lambda: mem.read(address, length), lambda: mem.view(address, length)):
        with pytest.raises(AddressError) as caught:
            access()
        assert (caught.value.address, caught.value.length) == (address, length)
    if length < 0x2000:
        with pytest.raises(AddressError):
            mem.write(address, bytes(length))
    with pytest.raises(LocalMisuseError):
        mem.read(0x1000, -1)


def test_the_last_byte_of_the_address_space() -> None:
    mem = memory((2**64 - 0x1000, 0x1000))
    mem.write(2**64 - 1, b"x")
    assert mem.read(2**64 - 2, 2) == b"\0x"
    with pytest.raises(MemoryMapError, match=r"wraps around 2\*\*64"):
        memory((2**64 - 0x1000, 0x1001))


def test_views_are_memory_itself_and_stay_in_one_region() -> None:
    mem = memory((0x1000, 0x1000), (0x2000, 0x1000))
    view = mem.view(0x1FF0, 16)
    view[:] = b"0123456789abcdef"
    assert mem.read(0x1FF0, 16) == b"0123456789abcdef"
    with pytest.raises(AddressError):
        mem.view(0x1FF0, 17)


def test_tables_are_immutable_and_checked() -> None:
    first = memory((0x1000, 0x1000))
    second = first.with_region(Region(0x2000, bytearray(0x800)))
    assert len(first.regions) == 1
    assert len(second.regions) == 2
    assert second.without_region(0x2000, 0x800).regions == first.regions
    with pytest.raises(MemoryMapError, match="no region at 0x2000 of 0x801"):
        second.without_region(0x2000, 0x801)
    for at in (0x800, 0x1000, 0x1FFF, 0x27FF):
        with pytest.raises(MemoryMapError, match="overlap"):
            second.with_region(Region(at, bytearray(0x1000)))


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=60
    )
)
def test_tables_with_and_without_regions_are_as_if_made_at_once(
    steps: list[tuple[bool, int, int]],
) -> None:
    """A table that came about step by step has the regions, and finds the bytes, of a new one."""
    table, kept = GuestMemory(), dict[int, Region]()
    for adds, at, size in steps:
        if adds:
            taken = any(at < start + r.size and start < at + size for start, r in kept.items())
            region = Region(at, bytearray([at]) * size)
            if taken:
                with pytest.raises(MemoryMapError, match="overlap"):
                    table.with_region(region)
                continue
            table, kept[at] = table.with_region(region), region
        elif at in kept and kept[at].size == size:
            del kept[at]
            table = table.without_region(at, size)
        else:
            with pytest.raises(MemoryMapError, match="no region"):
                table.without_region(at, size)
        assert table.regions == GuestMemory(kept.values()).regions
        for address in range(54):
            there = [start for start, r in kept.items() if start <= address < start + r.size]
            if there:
                assert table.read(address, 1) == bytes(there)
            else:
                with pytest.raises(AddressError):
                    table.read(address, 1)


@pytest.mark.parametrize(
    ("buffer", "why"),
    [(b"", "writable"), (bytes(8), "writable"), (bytearray(), "no bytes"), (7, "writable")],
)
def test_bad_buffers(buffer: object, why: str) -> None:
    with pytest.raises(MemoryMapError, match=why):
        Region(0x1000, buffer)  # type: ignore[arg-type]


def test_bad_addresses() -> None:
    for at in (-1, 2**64, 1.5):
        with pytest.raises(MemoryMapError, match="not an address"):
            Region(at, bytearray(1))  # type: ignore[arg-type]
    with pytest.raises(MemoryMapError, match="user address"):
        Region(0, bytearray(2), user_addr=2**64 - 1)


def test_user_addresses() -> None:
    mem = GuestMemory(
        [Region(0x1000, bytearray(0x1000), user_addr=0x7F00_0000), Region(0x4000, bytearray(16))]
    )
    assert mem.user_to_guest(0x7F00_0010, 0xFF0) == 0x1010
    for address, length in ((0x7F00_0010, 0xFF1), (0x6FFF_FFFF, 1), (0x7F00_1000, 1), (0x4000, 1)):
        with pytest.raises(AddressError, match="user address"):
            mem.user_to_guest(address, length)


def test_mapping_a_file_at_any_offset() -> None:
    fd = os.memfd_create("guest")
    os.truncate(fd, 0x5000)
    region = Region.map(fd, 0x1234, offset=0x1010, guest_addr=0x8000, user_addr=0x9000)
    GuestMemory([region]).write(0x8000, b"hello")
    assert os.pread(fd, 5, 0x1010) == b"hello"
    assert (region.size, region.user_addr) == (0x1234, 0x9000)
    for size, offset in ((0x5001, 0), (1, 0x5000), (0, 0), (-1, 0), (1, -1), (2**63, 1)):
        with pytest.raises(MemoryMapError):
            Region.map(fd, size, offset=offset, guest_addr=0)
    os.close(fd)
    with pytest.raises(MemoryMapError, match="Bad file descriptor"):
        Region.map(fd, 1, guest_addr=0)


def test_memory_keeps_its_buffers_alive_and_lets_them_go() -> None:
    array = np.zeros(64, np.uint8)
    gone = weakref.ref(array)
    view = GuestMemory([Region(0, array)]).view(0, 4)
    del array
    gc.collect()
    assert gone() is not None
    view.release()
    gc.collect()
    assert gone() is None
    pages = mmap.mmap(-1, 4096)
    region = Region(0, pages)
    with pytest.raises(BufferError):
        pages.close()
    del region
    pages.close()


def test_translation_over_many_regions() -> None:
    mem = memory(*((i * 0x3000, 0x1000) for i in range(1000)))
    for i in range(1000):
        mem.write(i * 0x3000 + 7, bytes([i & 0xFF]))
    assert [mem.read(i * 0x3000 + 7, 1)[0] for i in range(1000)] == [i & 0xFF for i in range(1000)]
    with pytest.raises(AddressError):
        mem.read(999 * 0x3000 + 0x1000, 1)
    with pytest.raises(AddressError):
        GuestMemory().read(0, 1)


# --- numbers that somebody else changes meanwhile

#: Sets the two bytes of a file to 0x00FF and 0xFF00 in turns, each in one store, until it is ended.
TOGGLE = """
import mmap, sys
number = memoryview(mmap.mmap(int(sys.argv[1]), 2)).cast("H")
number[0] = 0xFF00
print(flush=True)
while True:
    number[0] = 0x00FF
    number[0] = 0xFF00
"""
#: Reads, and how often the number must have been seen to change meanwhile.
LOADS, CHANGES = 200_000, 1000


def test_a_number_that_changes_is_never_seen_torn() -> None:
    """`read` shows 0x0000 and 0xFFFF too: it copies two bytes one by one."""
    fd = os.memfd_create("guest")
    os.truncate(fd, 2)
    mem = GuestMemory([Region.map(fd, 2, guest_addr=0x1000)])
    seen = set()
    last = changes = loads = 0
    with subprocess.Popen(
        [sys.executable, "-S", "-c", TOGGLE, str(fd)], pass_fds=[fd], stdout=subprocess.PIPE
    ) as toggler:
        try:
            assert toggler.stdout is not None
            assert toggler.stdout.readline() == b"\n"
            while loads < LOADS or changes < CHANGES:
                value = mem.load16(0x1000)
                seen.add(value)
                changes += value != last
                last = value
                loads += 1
        finally:
            toggler.kill()
            os.close(fd)
    assert seen == {0x00FF, 0xFF00}


def test_numbers_of_16_bits() -> None:
    mem = memory((0x1000, 0x1000), (0x2000, 0x10))
    mem.store16(0x1FFE, 0x1234)
    assert mem.read(0x1FFE, 2) == b"\x34\x12"
    assert mem.load16(0x1FFE) == 0x1234
    mem.store16(0x2000, 0xFFFF)
    assert mem.load16(0x2000) == 0xFFFF
    for address in (0xFFF, 0x1FFF, 0x2001, 0x200F, 0x2010, 2**64 - 1, -2, 2**64):
        with pytest.raises(AddressError):
            mem.load16(address)
        with pytest.raises(AddressError):
            mem.store16(address, 1)
    for value in (-1, 1 << 16):
        with pytest.raises(OverflowError):
            mem.store16(0x1000, value)
    odd = GuestMemory([Region(0x1000, np.zeros(9, np.uint8)[1:])])
    with pytest.raises(AddressError, match="not aligned to 2 bytes"):
        odd.load16(0x1000)
    assert odd.load16(0x1001) == 0


def overlapping(memory: GuestMemory, source: int, at: int, length: int) -> None:
    """Writes a view of the memory to another place in it, as if it were a copy."""
    before = memory.read(source, length)
    memory.write(at, memory.view(source, length))
    assert memory.read(at, length) == before


@pytest.mark.parametrize("length", [100, 3000, 5000])
@pytest.mark.parametrize("distance", [-4096, -130, -64, -1, 0, 1, 64, 127, 200, 4097])
def test_memory_written_from_a_view_of_itself(length: int, distance: int) -> None:
    """At distances where copies go one way, the other, or in larger pieces."""
    mem = memory((0x1000, 0x8000))
    random = np.random.default_rng(length)
    mem.write(0x1000, random.bytes(0x8000))
    overlapping(mem, 0x3000, 0x3000 + distance, length)


@pytest.mark.parametrize("distance", [-0x900, -1, 1, 0x900])
def test_an_overlap_over_region_borders(distance: int) -> None:
    """The first piece must not change what the second one is copied from."""
    mem = memory((0x1000, 0x1000), (0x2000, 0x4000), (0x6000, 0x1000))
    mem.write(0x1000, np.random.default_rng(1).bytes(0x6000))
    overlapping(mem, 0x2000, 0x2000 + distance, 0x4000)


@pytest.mark.parametrize("distance", [1, 100, 4000])
def test_an_overlap_through_a_second_mapping(distance: int) -> None:
    fd = os.memfd_create("guest")
    os.truncate(fd, 0x10000)
    mem = GuestMemory(Region.map(fd, 0x10000, guest_addr=at) for at in (0, 0x10_0000))
    os.close(fd)
    mem.write(0, np.random.default_rng(2).bytes(0x10000))
    overlapping(mem, 0x10_0000, distance, 0x8000)


COLLECTED = """
import gc
import numpy as np
from vring import GuestMemory, Region

def leave(buffer):
    memory = GuestMemory([Region(0x1000, buffer)])
    cycle = [buffer, memory]
    cycle.append(cycle)

for make in (
    lambda: memoryview(bytearray(1 << 16)),
    lambda: np.zeros(1 << 16, np.uint8),
    lambda: np.zeros(1 << 16, np.uint8).data,
    lambda: memoryview(np.zeros(1 << 16, np.uint8))[16:],
):
    for _ in range(20):
        leave(make())
        gc.collect()
print("collected")
"""


def test_a_region_in_a_cycle_of_garbage_is_collected() -> None:
    """The collector clears no view of which a region still has an export."""
    # In a process of its own: what fails may be the interpreter.
    done = subprocess.run([sys.executable, "-c", COLLECTED], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "collected\n", "")
