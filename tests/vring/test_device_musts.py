"""The device's MUSTs of virtio 1.3, 2.7 and 2.8, on the bytes of rings that are written by hand."""

from __future__ import annotations

import struct

import pytest

from tests.support.rings import BASE, DATA, Ring
from vring import AddressError, GuestMemory, PackedQueue, Region, SplitQueue

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15
TABLE = DATA + 0x8000
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


def half(ring: Ring, at: int) -> int:
    """A little-endian 16-bit field of guest memory."""
    return int.from_bytes(ring.memory.read(at, 2), "little")


def put(ring: Ring, at: int, value: int) -> None:
    ring.memory.write(at, value.to_bytes(2, "little"))


# --- both layouts


@PACKED
def test_the_device_writes_only_what_is_its_own(packed: bool) -> None:
    """2.7.5.1, 2.8.15: not the descriptor table, not device-readable buffers, not indirect tables.

    A packed ring's descriptors are written where they are used: one for each chain.
    """
    ring = Ring(size=8, packed=packed, event_idx=True)
    ring.data[:] = 0x5A
    ring.driver.add([(DATA, 16)], [(DATA + 0x1000, 16)])
    ring.driver.add([(DATA + 0x2000, 8)], [(DATA + 0x3000, 8)], indirect_at=TABLE)
    ring.driver.publish()
    rings, data = bytearray(ring.bytes), bytearray(ring.data)
    batch = ring.queue.pop_many()
    assert batch.scatter(b"x" * 20)[0] == 2
    ring.queue.push_many(batch, [16, 4])
    ring.queue.enable_notifications()
    data[0x1000:0x1010], data[0x3000:0x3004] = b"x" * 16, b"x" * 4
    assert bytes(ring.data) == data
    changed = {i for i, (a, b) in enumerate(zip(rings, ring.bytes, strict=True)) if a != b}
    device_area = set(range(ring.used - BASE, ring.used - BASE + 6 + 8 * 8))
    if packed:
        # Two used descriptors of 16 bytes: at slot 0, and behind the first chain's two.
        device_area = {*range(16), *range(32, 48), *range(ring.used - BASE, ring.used - BASE + 4)}
        addresses = {*range(8), *range(32, 40)}
        assert not changed & addresses
    assert changed
    assert changed <= device_area


@PACKED
@pytest.mark.parametrize("event_idx", [False, True])
def test_spurious_notifications_find_nothing(packed: bool, event_idx: bool) -> None:
    """2.7.10.2: a kick with nothing added changes nothing, however often it comes."""
    ring = Ring(packed=packed, event_idx=event_idx)
    for _ in range(2):
        for _ in range(3):
            ring.queue.disable_notifications()
            assert not ring.queue.pop_many()
            assert ring.queue.pop() is None
            assert not ring.queue.enable_notifications()
        ring.chain(3)
        chain = ring.queue.pop()
        assert chain.readable_bytes == 3
        ring.queue.push(chain)
        ring.driver.get_used()


@PACKED
def test_parts_lie_where_their_alignment_allows(packed: bool) -> None:
    """2.7.1, 2.8.11: descriptors at multiples of 16, the others of 2 and 4 (packed: of 4)."""
    memory = GuestMemory([Region(BASE, bytearray(0x4000))])
    kind = PackedQueue if packed else SplitQueue
    parts = BASE, BASE + 0x1000, BASE + 0x2000
    kind(memory, 8, *parts)
    for which, off in ((0, 8), (1, 2 if packed else 1), (2, 2)):
        wrong = [at + off * (i == which) for i, at in enumerate(parts)]
        with pytest.raises(AddressError, match="not aligned"):
            kind(memory, 8, *wrong)


# --- split


@pytest.mark.parametrize("used_event", [0, 1, 2, 7, 65535])
@pytest.mark.parametrize("flags", [0, 1])
@pytest.mark.parametrize("event_idx", [False, True])
def test_the_flag_or_used_event_decides(event_idx: bool, flags: int, used_event: int) -> None:
    """2.7.7.2: the flag alone without EVENT_IDX; with it, whether used_event was passed, alone."""
    ring = Ring(size=8, event_idx=event_idx)
    for _ in range(4):
        ring.chain(1)
    put(ring, ring.avail, flags)
    put(ring, ring.avail + 4 + 2 * 8, used_event)
    for batch in (ring.queue.pop_many(1), ring.queue.pop_many(2), ring.queue.pop_many(1)):
        before = half(ring, ring.used + 2)
        notify = ring.queue.push_many(batch)
        after = half(ring, ring.used + 2)
        assert notify == (used_event in range(before, after) if event_idx else flags == 0)


@pytest.mark.parametrize("index", [0, 65534])
def test_the_devices_flag_and_avail_event(index: int) -> None:
    """2.7.10.2: 0 or 1 without EVENT_IDX; with it always 0, and avail_event is the next entry."""
    ring = Ring(index=index)
    flags = []
    for _ in range(2):
        ring.queue.disable_notifications()
        flags.append(half(ring, ring.used))
        ring.queue.enable_notifications()
        flags.append(half(ring, ring.used))
    assert flags == [1, 0, 1, 0]
    ring = Ring(index=index, event_idx=True)
    for n in range(5):
        ring.queue.disable_notifications()
        assert half(ring, ring.used) == 0
        ring.chain(1)
        ring.queue.push(ring.queue.pop())
        ring.driver.get_used()
        ring.queue.enable_notifications()
        assert half(ring, ring.used) == 0
        assert half(ring, ring.used + 4 + 8 * 8) == (index + n + 1) % 65536


def test_used_elements_name_head_and_length() -> None:
    """2.7.8.2: id and len of each element, below the index, around the ring's end."""
    ring = Ring(size=4, index=65534)
    seen = []
    for length in (5, 6, 7, 8, 9):
        ring.chain(1, length, writable=1)
        chain = ring.queue.pop()
        assert chain.write(b"z" * length) == length
        ring.queue.push(chain, length)
        index = half(ring, ring.used + 2)
        at = ring.used + 4 + 8 * ((index - 1) % 4)
        seen.append(struct.unpack("<II", ring.memory.read(at, 8)))
        assert seen[-1] == (chain_head(ring), length)
    assert [length for _, length in seen] == [5, 6, 7, 8, 9]
    assert half(ring, ring.used + 2) == 3


def chain_head(ring: Ring) -> int:
    """The head that the driver takes back."""
    heads, _ = ring.driver.get_used()
    assert len(heads) == 1
    return int(heads[0])


# --- packed


def packed_slot(ring: Ring, slot: int) -> tuple[int, int, int, int]:
    """Address, length, id and flags of a descriptor."""
    return struct.unpack("<QIHH", ring.memory.read(ring.desc + 16 * slot, 16))


@pytest.mark.parametrize("wrap", [1, 0])
def test_a_packed_descriptor_waits_for_its_avail_flag(wrap: int) -> None:
    """2.8.15: AVAIL as the wrap counter says and USED not is available, and nothing else is."""
    for flags in (0, AVAIL, USED, AVAIL | USED):
        ring = Ring(size=4, packed=True)
        ring.queue = PackedQueue(ring.memory, 4, ring.desc, ring.avail, ring.used, index=wrap << 15)
        ring.put_table(ring.desc, (DATA, 1, 2, flags))
        expected = flags == (AVAIL if wrap else USED)
        assert ring.queue.available() == expected
        assert (ring.queue.pop() is not None) == expected


def test_packed_lists_are_taken_in_ring_order_and_used_as_they_complete() -> None:
    """2.8.12, 2.8.15, 2.8.18: used descriptors in the order of completion, then never changed."""
    ring = Ring(size=8, packed=True)
    for i, n in enumerate((1, 2, 3)):  # lists of 1, 2 and 3 descriptors
        at = [(DATA + 0x100 * i + j, j + 1) for j in range(n)]
        ring.driver.add(at[:-1], at[-1:])
    ring.driver.publish()
    batches = [ring.queue.pop_many(1) for _ in range(3)]
    starts = [ring.data.ctypes.data + 0x100 * i for i in range(3)]
    assert [batch.addresses.tolist() for batch in batches] == [
        [start + j for j in range(n)] for start, n in zip(starts, (1, 2, 3), strict=True)
    ]
    ids = [int(batch.heads[0]) for batch in batches]
    # Completed third, first, second: at slot 0, then 3 further on, then 1.
    ring.queue.push_many(batches[2], 3)
    first = packed_slot(ring, 0)
    ring.queue.push_many(batches[0], 0)
    second = packed_slot(ring, 3)
    ring.queue.push_many(batches[1], 2)
    assert packed_slot(ring, 0) == first
    assert packed_slot(ring, 3) == second
    used = [packed_slot(ring, slot)[1:] for slot in (0, 3, 4)]
    both = AVAIL | USED
    assert [(n, i) for n, i, _ in used] == [(3, ids[2]), (0, ids[0]), (2, ids[1])]
    assert [flags & both for *_, flags in used] == [both] * 3
    assert [bool(flags & WRITE) for *_, flags in used] == [True, False, True], "2.8.3"


@pytest.mark.parametrize(
    ("flags", "off_wrap", "decisions"),
    [
        (0, 0x8002, [True] * 4),
        (1, 0x8002, [False] * 4),
        (2, 0x8000, [True, False, False, False]),
        (2, 0x8002, [False, False, True, False]),
        (2, 0x0000, [False, False, False, True]),
    ],
)
def test_the_drivers_event_structure_decides(
    flags: int, off_wrap: int, decisions: list[bool]
) -> None:
    """2.8.14: enable, disable, or one descriptor in one lap of the ring."""
    ring = Ring(size=3, packed=True, event_idx=True)
    got = []
    for _ in decisions:
        ring.chain(1)
        ring.memory.write(ring.avail, struct.pack("<HH", off_wrap, flags))
        got.append(ring.queue.push(ring.queue.pop()))
        ring.driver.get_used()
    assert got == decisions


def test_the_devices_event_structure() -> None:
    """2.8.14: disable, and enable (with EVENT_IDX for the next descriptor and its lap)."""
    for event_idx in (False, True):
        ring = Ring(size=3, packed=True, event_idx=event_idx)
        for n in range(4):
            ring.queue.disable_notifications()
            assert half(ring, ring.used + 2) == 1
            ring.chain(1)
            ring.queue.push(ring.queue.pop())
            ring.driver.get_used()
            ring.queue.enable_notifications()
            assert half(ring, ring.used + 2) == (2 if event_idx else 0)
            if event_idx:
                slot = (n + 1) % 3
                assert half(ring, ring.used) == (slot | (n < 2) << 15)
