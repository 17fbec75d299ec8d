"""Malformed rings: a named error with queue, index and cause, and nothing else harmed."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import sysconfig
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.rings import BASE, DATA, Ring
from vring import GuestMemory, PackedQueue, Region, RingError, SplitQueue, errors
from vring.errors import UsedRingError

NEXT, WRITE, INDIRECT = 1, 2, 4
TABLE = DATA + 0x8000


def fails(ring: Any, kind: type[RingError], index: int, cause: str) -> None:
    with pytest.raises(kind, match=cause) as caught:
        ring.queue.pop_many()
    assert (type(caught.value), caught.value.queue, caught.value.index) == (kind, "q", index)
    assert str(ring.queue.broken) == str(caught.value)
    with pytest.raises(kind):
        ring.queue.pop()
    assert ring.queue.available() == 0
    assert ring.queue.in_flight == 0


@pytest.mark.parametrize("index", [9, 300, 32768, 65535])
def test_available_index_jumps(index: int) -> None:
    ring = Ring()
    ring.descriptor(0, DATA, 1, 0)
    ring.offer(0, index=index)
    fails(ring, errors.AvailableIndexError, index, "more available")


def test_available_index_counts_what_is_in_flight() -> None:
    ring = Ring()
    for _ in range(3):
        ring.chain(1)
    batch = ring.queue.pop_many()
    ring.memory.write(ring.avail + 2, (3 + 6).to_bytes(2, "little"))
    with pytest.raises(errors.AvailableIndexError):
        ring.queue.pop()
    ring.queue.push_many(batch)


def test_head_outside_the_table() -> None:
    ring = Ring()
    ring.offer(8)
    fails(ring, errors.HeadError, 8, "head")


def test_next_outside_the_table() -> None:
    ring = Ring()
    ring.descriptor(3, DATA, 1, NEXT, 8)
    ring.offer(3)
    fails(ring, errors.ChainError, 3, "next")


@pytest.mark.parametrize(("address", "length"), [(DATA, 1), (DATA, 0), (0x10, 0)])
def test_loops(address: int, length: int) -> None:
    """Also of descriptors without bytes, wherever they point: those take no segment."""
    ring = Ring()
    ring.descriptor(0, address, length, NEXT, 1)
    ring.descriptor(1, address, length, NEXT, 0)
    ring.offer(0)
    with pytest.raises(errors.ChainError, match="loops"):
        ring.queue.pop_many()


def test_loop_inside_an_indirect_table() -> None:
    ring = Ring()
    ring.put_table(TABLE, (DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0))
    ring.descriptor(0, TABLE, 32, INDIRECT)
    ring.offer(0)
    with pytest.raises(errors.ChainError, match="loops"):
        ring.queue.pop_many()


def test_a_chain_as_long_as_the_queue_and_one_longer() -> None:
    ring = Ring()
    ring.put_table(TABLE, *((DATA, 1, NEXT if i < 8 else 0, i + 1) for i in range(9)))
    ring.descriptor(0, TABLE + 16, 128, INDIRECT)
    ring.put_table(TABLE + 16, *((DATA, 1, NEXT if i < 7 else 0, i + 1) for i in range(8)))
    ring.offer(0)
    assert ring.queue.pop().readable_bytes == 8
    ring = Ring()
    ring.put_table(TABLE, *((DATA, 1, NEXT if i < 8 else 0, i + 1) for i in range(9)))
    ring.descriptor(0, TABLE, 144, INDIRECT)
    ring.offer(0)
    with pytest.raises(errors.ChainError, match="more descriptors"):
        ring.queue.pop()


def test_too_many_bytes() -> None:
    ring = Ring(size=8192)
    n = (1 << 32) // 0x10_0000
    ring.put_table(
        ring.desc, *((DATA, 0x10_0000, NEXT if i < n - 1 else 0, i + 1) for i in range(n))
    )
    ring.offer(0)
    with pytest.raises(errors.ChainError, match=r"2\*\*32"):
        ring.queue.pop()


def test_readable_after_writable() -> None:
    ring = Ring()
    ring.descriptor(0, DATA, 1, WRITE | NEXT, 1)
    ring.descriptor(1, DATA, 1, 0)
    ring.offer(0)
    fails(ring, errors.ChainOrderError, 1, "readable descriptor after")


@pytest.mark.parametrize(
    ("address", "length"),
    [(0, 1), (DATA - 1, 1), (DATA - 1, 2), (DATA + 0x10_0000, 1), (DATA + 0xF_FFFF, 2),
     (2**64 - 1, 1), (2**64 - 1, 2), (2**64 - 1, 2**32 - 1), (DATA, 2**32 - 1)],
)  # fmt: skip
@pytest.mark.parametrize("flags", [0, WRITE])
def test_buffers_outside_memory(address: int, length: int, flags: int) -> None:
    ring = Ring()
    ring.descriptor(2, address, length, flags)
    ring.offer(2)
    fails(ring, errors.BufferAddressError, 2, f"{address:#x}, {length:#x} bytes")


def test_zero_length_buffers_are_no_segments_wherever_they_point() -> None:
    ring = Ring()
    ring.descriptor(0, 0x10, 0, NEXT, 1)
    ring.descriptor(1, DATA, 3, NEXT, 2)
    ring.descriptor(2, DATA, 0, NEXT | WRITE, 3)
    ring.descriptor(3, DATA, 4, WRITE)
    ring.offer(0)
    chain = ring.queue.pop()
    assert ([len(v) for v in chain.readable], [len(v) for v in chain.writable]) == ([3], [4])


@pytest.mark.parametrize(
    ("flags", "length", "kind", "cause"),
    [
        (INDIRECT | NEXT, 16, errors.IndirectError, "NEXT"),
        (INDIRECT, 0, errors.IndirectError, "length"),
        (INDIRECT, 15, errors.IndirectError, "length"),
        (INDIRECT, 17, errors.IndirectError, "length"),
        (INDIRECT, 0x10_0000, errors.IndirectError, "outside"),
    ],
)
def test_indirect_tables(flags: int, length: int, kind: type[RingError], cause: str) -> None:
    ring = Ring()
    ring.put_table(TABLE, (DATA, 1, 0, 0))
    ring.descriptor(5, TABLE if length < 999 else 2**64 - 0x1000, length, flags)
    ring.offer(5)
    with pytest.raises(kind, match=cause):
        ring.queue.pop()


def test_indirect_not_negotiated_nested_and_the_write_flag() -> None:
    ring = Ring(indirect=False)
    ring.descriptor(0, TABLE, 16, INDIRECT)
    ring.offer(0)
    fails(ring, errors.DescriptorFlagsError, 0, "not negotiated")
    ring = Ring()
    ring.put_table(TABLE, (DATA, 1, NEXT, 1), (TABLE, 16, INDIRECT, 0))
    ring.descriptor(0, TABLE, 32, INDIRECT)
    ring.offer(0)
    fails(ring, errors.IndirectError, 1, "inside an indirect table")
    ring = Ring()  # 2.7.5.3.2: WRITE on the descriptor of the table is ignored; chained ones first
    ring.put_table(TABLE, (DATA, 2, 0, 0))
    ring.descriptor(0, DATA, 1, NEXT, 1)
    ring.descriptor(1, TABLE, 16, INDIRECT | WRITE)
    ring.offer(0)
    assert ring.queue.pop().readable_bytes == 3


def test_chains_before_a_malformed_one_are_delivered() -> None:
    ring = Ring()
    ring.descriptor(0, DATA, 1, 0)
    ring.descriptor(1, DATA, 2, 0)
    ring.offer(0, 1, 9)
    batch = ring.queue.pop_many()
    assert batch.heads.tolist() == [0, 1]
    with pytest.raises(errors.HeadError):
        ring.queue.pop_many()
    ring.queue.push_many(batch)
    assert ring.memory.read(ring.used + 2, 2) == b"\2\0", "what was accepted is completed"


def test_a_broken_queue_harms_no_other() -> None:
    broken, sound = Ring(), Ring()
    sound.chain(5)
    broken.offer(9)
    with pytest.raises(RingError):
        broken.queue.pop()
    assert sound.queue.pop().readable_bytes == 5


# --- packed

AVAIL, USED = 1 << 7, 1 << 15


def packed_ring(*descriptors: tuple[int, int, int], **features: Any) -> Ring:
    """A packed ring of 4 with (address, length, flags) written as the driver would."""
    ring = Ring(size=4, packed=True, **features)
    ring.put_table(ring.desc, *((a, n, 7, f | AVAIL) for a, n, f in descriptors))
    return ring


@pytest.mark.parametrize(
    ("descriptors", "kind", "cause"),
    [
        ([(DATA, 1, NEXT)] * 4, errors.ChainError, "loops"),
        ([(DATA, 1, WRITE | NEXT), (DATA, 1, 0)], errors.ChainOrderError, "after"),
        ([(16, 1, 0)], errors.BufferAddressError, "0x10"),
        ([(2**64 - 1, 2, 0)], errors.BufferAddressError, "outside"),
        ([(DATA, 1, NEXT), (TABLE, 16, INDIRECT)], errors.IndirectError, "NEXT"),
        ([(TABLE, 16, INDIRECT | NEXT)], errors.IndirectError, "NEXT"),
        ([(TABLE, 8, INDIRECT)], errors.IndirectError, "length"),
        ([(TABLE, 0, INDIRECT)], errors.IndirectError, "length"),
        ([(TABLE, 80, INDIRECT)], errors.ChainError, "more descriptors"),
        ([(16, 16, INDIRECT)], errors.IndirectError, "outside"),
        ([(TABLE + 16, 16, INDIRECT)], errors.IndirectError, "inside"),
    ],
)
def test_malformed_packed_rings(
    descriptors: list[tuple[int, int, int]], kind: type[RingError], cause: str
) -> None:
    ring = packed_ring(*descriptors)
    ring.put_table(TABLE, (DATA, 1, 0, 0), (DATA, 16, 0, INDIRECT))
    with pytest.raises(kind, match=cause):
        ring.queue.pop()
    assert ring.queue.broken is not None


def test_packed_chain_into_slots_that_are_in_flight() -> None:
    ring = packed_ring((DATA, 1, 0), (DATA, 1, NEXT), (DATA, 1, NEXT), (DATA, 1, NEXT))
    batch = ring.queue.pop_many()
    assert len(batch) == 1
    with pytest.raises(errors.ChainError):
        ring.queue.pop()


def test_packed_indirect_not_negotiated() -> None:
    ring = packed_ring((TABLE, 16, INDIRECT), indirect=False)
    with pytest.raises(errors.DescriptorFlagsError):
        ring.queue.pop()


# --- the device as the hostile side: what the drivers refuse


def test_split_driver_refuses_bad_used_rings() -> None:
    for head, index in ((3, 1), (99, 1), (0, 2), (0, 60000)):
        ring = Ring()
        ring.chain(1)
        ring.memory.write(ring.used + 4, head.to_bytes(4, "little"))
        ring.memory.write(ring.used + 2, index.to_bytes(2, "little"))
        with pytest.raises(UsedRingError):
            ring.driver.get_used()


def test_packed_driver_refuses_bad_used_ids() -> None:
    for used_id in (3, 99):
        ring = Ring(packed=True)
        ring.chain(1)
        ring.put_table(ring.desc, (0, 1, used_id, AVAIL | USED))
        with pytest.raises(UsedRingError):
            ring.driver.get_used()


@pytest.mark.parametrize("packed", [False, True])
def test_drivers_take_batches_of_in_order_devices(packed: bool) -> None:
    """One used element for several chains (2.7.9): skipped ones count as written completely."""
    ring = Ring(size=16, packed=packed, in_order=True)
    for n in (1, 2, 3):
        ring.driver.add([(DATA, 1)], [(DATA, n)])
    ring.driver.publish()
    last = 2 if packed else 4
    if packed:
        ring.put_table(ring.desc, (0, 77, last, AVAIL | USED))
    else:
        ring.memory.write(ring.used + 4, last.to_bytes(4, "little") + b"\x4d\0\0\0")
        ring.memory.write(ring.used + 2, b"\3\0")
    heads, lengths = ring.driver.get_used()
    assert heads[-1] == last
    assert lengths.tolist() == [1, 2, 77]
    assert ring.driver.num_free == 16
    assert ring.driver.add([(DATA, 1)], []) == (2 if packed else 6)


@pytest.mark.parametrize("kind", [SplitQueue, PackedQueue])
def test_the_machine_code_reads_each_descriptor_word_once(kind: type, tmp_path: Path) -> None:
    """A page that a debugger-like fault handler counts: every load from the table is seen.

    The descriptor's page allows no access; a handler of SIGSEGV counts faults and single-steps.
    """
    if sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("steps with x86's trap flag")
    source = Path(__file__).with_name("count_loads.c")
    library = tmp_path / "count_loads.so"
    subprocess.run(
        ["cc", "-std=gnu11", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source],
        check=True,
    )
    script = Path(__file__).with_name("count_loads.py")
    out = subprocess.run(
        [sys.executable, script, library, kind.__name__],
        check=True, timeout=60, capture_output=True, text=True, env={**os.environ},
    )  # fmt: skip
    loads = {int(line.split()[0], 16): int(line.split()[1]) for line in out.stdout.splitlines()}
    # Packed: the flags are polled first, and what the rest of that word says of them is dropped.
    assert loads == ({0x0: 1, 0x8: 1} if kind is SplitQueue else {0x0: 1, 0x8: 1, 0xE: 1})


# --- how long one pop may take, and how much memory


def same_table(ring: Ring, packed: bool, table: int, entries: int, length: int) -> None:
    """1024 chains of one indirect table of so many entries."""
    nexts = ((0, 0) if packed or i == entries - 1 else (NEXT, i + 1) for i in range(entries))
    ring.put_table(table, *((DATA, length, *flags) for flags in nexts))
    if packed:
        slots = ((table, 16 * entries, i, INDIRECT | AVAIL) for i in range(1024))
        ring.put_table(ring.desc, *slots)
    else:
        ring.descriptor(0, table, 16 * entries, INDIRECT)
        ring.offer(*[0] * 1024)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_pop_of_empty_buffers_ends_soon(packed: bool) -> None:
    """1024 chains of 1024 descriptors without bytes: all arrive, but not in one pop."""
    ring = Ring(size=1024, packed=packed)
    same_table(ring, packed, BASE + 0x10_0000, 1024, 0)
    sizes = []
    while batch := ring.queue.pop_many():
        sizes.append(len(batch))
        ring.queue.push_many(batch)
    assert sum(sizes) == 1024
    assert max(sizes) <= 2, "one chain is as much as a pop should do"


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_pop_of_scattered_tables_ends_soon(packed: bool) -> None:
    """Entries that are read piecewise count more than a segment."""
    ring = Ring(size=1024, packed=packed)
    table = 0x200_0000
    for i in range(3):  # regions of 24 bytes: no entry of the second half lies in one
        ring.memory = ring.memory.with_region(Region(table + 24 * i, bytearray(24)))
    ring.queue.memory = ring.memory
    same_table(ring, packed, table, 4, 1)
    sizes = []
    while batch := ring.queue.pop_many():
        sizes.append(len(batch))
        assert set(batch.readable_bytes.tolist()) == {4}
        ring.queue.push_many(batch)
    assert sum(sizes) == 1024
    assert max(sizes) <= 512 // 4 + 1


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_pop_goes_on_after_a_chain_of_empty_buffers(packed: bool) -> None:
    """The bound ends a pop after a chain, never before the first one."""
    ring = Ring(size=1024, packed=packed)
    for lengths in ([0] * 300, [3], [0] * 700 + [5], [0], [7], [0] * 15):
        ring.driver.add([(DATA, n) for n in lengths], [])
    ring.driver.publish()
    got: list[int] = []
    while batch := ring.queue.pop_many():
        got += batch.readable_bytes.tolist()
        ring.queue.push_many(batch)
    assert got == [0, 3, 5, 0, 7, 0]


def many_borders(packed: bool, buffers: int) -> Ring:
    """A chain of so many buffers, each over 4096 regions of 16 bytes."""
    ring = Ring(size=256, packed=packed)
    at = 0x200_0000
    regions = [Region(at + 16 * i, bytearray(16)) for i in range(4096)]
    ring.memory = GuestMemory([*ring.memory.regions, *regions])
    ring.queue.memory = ring.memory
    ring.driver.add([(at, 0x1_0000)] * buffers, [])
    ring.driver.publish()
    return ring


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("single", [False, True], ids=["pop_many", "pop"])
def test_segments_of_a_chain_are_bounded(packed: bool, single: bool) -> None:
    """256 buffers over 4096 regions would be 16 MiB of segments; the table ends at 2 MiB."""
    ring = many_borders(packed, 256)
    pop = ring.queue.pop if single else ring.queue.pop_many
    tracemalloc.start()
    try:
        with pytest.raises(errors.ChainError, match="more segments than the device takes"):
            pop()
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 1 << 19, "the large table is not kept"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("single", [False, True], ids=["pop_many", "pop"])
def test_a_grown_table_is_not_kept(packed: bool, single: bool) -> None:
    ring = many_borders(packed, 8)
    pop = ring.queue.pop if single else ring.queue.pop_many
    tracemalloc.start()
    try:
        taken = pop()
        assert tracemalloc.get_traced_memory()[0] > 8 * 4096 * 16
        ring.queue.push(taken) if single else ring.queue.push_many(taken)
        del taken
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 1 << 18
    finally:
        tracemalloc.stop()
    ring.driver.get_used()
    ring.chain(5)
    assert pop() is not None


def test_too_many_bytes_grow_no_table() -> None:
    """4 GiB and more over borders: found before there is a table for all of it."""
    ring = Ring(size=2048)
    memory = np.zeros(1 << 22, np.uint8)
    at, half = 0x200_0000, 1 << 21
    ring.memory = GuestMemory(
        [*ring.memory.regions, Region(at, memory[:half]), Region(at + half, memory[half:])]
    )
    ring.queue.memory = ring.memory
    ring.driver.add([(at, 1 << 22)] * 2047, [])
    ring.driver.publish()
    tracemalloc.start()
    try:
        with pytest.raises(errors.ChainError, match=r"2\*\*32"):
            ring.queue.pop_many()
        assert tracemalloc.get_traced_memory()[1] < 2048 * (16 + 28) + (1 << 16)
    finally:
        tracemalloc.stop()
