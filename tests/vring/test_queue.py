"""The device's side from Python: batches, chains, iteration, suppression, state; both layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.rings import BASE, DATA, Ring
from vring import (
    GuestMemory,
    LocalMisuseError,
    NotificationData,
    PackedDriver,
    PackedQueue,
    Region,
    SplitDriver,
    SplitQueue,
    VirtQueue,
)

PACKED = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@PACKED
def test_gather_and_scatter(packed: bool) -> None:
    ring = Ring(packed=packed)
    ring.data[:0x1000] = 1
    ring.data[0x1000:0x2000] = 2
    ring.chain(3, 5, 7, writable=1)
    ring.chain(4, writable=1)
    ring.chain(2)
    batch = ring.queue.pop_many()
    assert len(batch) == 3
    assert batch.gather() == b"\1\1\1\2\2\2\2\2\1\1"
    assert batch[0].read() == b"\1\1\1\2\2\2\2\2"
    out = bytearray(12)
    assert batch.gather_into(out) == 10
    assert out == b"\1\1\1\2\2\2\2\2\1\1\0\0"
    with pytest.raises(LocalMisuseError, match="10 bytes, the buffer 9"):
        batch.gather_into(bytearray(9))
    used, written = batch.scatter(b"abcdefghi")
    assert (used, written.tolist()) == (2, [7, 2])
    assert bytes(ring.data[0x2000:0x2007]) == b"abcdefg"
    ring.queue.push_many(batch, written, used)
    assert len(batch) == 1
    assert batch.gather() == b"hi", "the second chain's buffer is the third's"
    assert ring.queue.in_flight == 1
    ring.queue.unpop(batch)
    assert not batch
    assert ring.queue.in_flight == 0
    assert ring.driver.get_used()[1].tolist() == [7, 2]
    assert ring.queue.pop().read() == b"hi"


@PACKED
def test_scatter_into_nothing_and_of_nothing(packed: bool) -> None:
    ring = Ring(packed=packed)
    ring.chain(3)
    ring.chain(3, writable=1)
    batch = ring.queue.pop_many()
    used, written = batch.scatter(b"")
    assert (used, len(written)) == (0, 0)
    used, written = batch.scatter(b"abcd")
    assert (used, written.tolist()) == (2, [0, 3])


@PACKED
def test_limits_of_a_pop(packed: bool) -> None:
    ring = Ring(packed=packed)
    for _ in range(6):
        ring.chain(100)
    assert len(ring.queue.pop_many(2)) == 2
    assert len(ring.queue.pop_many(0, 250)) == 2
    assert len(ring.queue.pop_many(0, 99)) == 1, "the first is taken whatever it holds"
    assert ring.queue.available() == 1
    with pytest.raises(LocalMisuseError):
        ring.queue.pop_many(-1)


@PACKED
def test_written_lengths_are_checked(packed: bool) -> None:
    ring = Ring(packed=packed)
    ring.chain(3, 5, writable=1)
    ring.chain(3, 6, writable=1)
    batch = ring.queue.pop_many()
    for bad in ([6, 0], [0], [0, 0, 0], -1, 2**32, [0, 7], np.array([6, 0], np.uint32)):
        with pytest.raises(LocalMisuseError):
            ring.queue.push_many(batch, bad)
    with pytest.raises(LocalMisuseError, match="3 chains to complete"):
        ring.queue.push_many(batch, None, 3)
    ring.queue.push_many(batch, np.array([5, 6], np.uint32))
    with pytest.raises(LocalMisuseError, match="completed"):
        ring.queue.push_many(batch)
    assert ring.driver.get_used()[1].tolist() == [5, 6]


@PACKED
def test_chains_belong_to_their_queue(packed: bool) -> None:
    one, other = Ring(packed=packed), Ring(packed=packed)
    one.chain(1)
    one.chain(1)
    batch = one.queue.pop_many(1)
    newer = one.queue.pop()
    with pytest.raises(LocalMisuseError, match="another queue's"):
        other.queue.push_many(batch)
    with pytest.raises(LocalMisuseError, match="popped after"):
        one.queue.unpop(batch)
    one.queue.push(newer)
    for use in (newer.read, lambda: newer.readable, lambda: one.queue.push(newer)):
        with pytest.raises(LocalMisuseError, match="completed"):
            use()


@PACKED
def test_chains_of_a_batch_complete_in_order(packed: bool) -> None:
    ring = Ring(packed=packed)
    ring.chain(1)
    ring.chain(2)
    batch = ring.queue.pop_many()
    first, second = batch[0], batch[-1]
    with pytest.raises(LocalMisuseError, match="earlier chains"):
        ring.queue.push(second)
    ring.queue.push(first)
    ring.queue.push(second)
    with pytest.raises(IndexError):
        batch[0]


@PACKED
def test_in_order_is_kept(packed: bool) -> None:
    ring = Ring(packed=packed, in_order=True)
    ring.chain(1)
    ring.chain(2)
    first, second = ring.queue.pop(), ring.queue.pop()
    with pytest.raises(LocalMisuseError, match="IN_ORDER"):
        ring.queue.push(second)
    ring.queue.push(first)
    ring.queue.push(second)


@PACKED
def test_memoryviews_end_with_their_chain(packed: bool) -> None:
    ring = Ring(packed=packed)
    ring.data[:3] = 7
    ring.chain(3, 5, 6, writable=2)
    chain = ring.queue.pop()
    assert [bytes(v) for v in chain.readable] == [b"\7\7\7"]
    assert chain.readable[0].readonly
    chain.writable[1][:2] = b"hi"
    view = chain.writable[1]
    part = view[1:]
    with pytest.raises(LocalMisuseError, match="slice or array"):
        ring.queue.push(chain, 7)
    assert ring.queue.in_flight == 1
    part.release()
    ring.queue.push(chain, 7)
    with pytest.raises(ValueError, match="released"):
        view[0]
    assert bytes(ring.data[0x2000:0x2002]) == b"hi"
    with pytest.raises(BufferError):
        memoryview(chain)


@PACKED
def test_arrays_over_a_chain_hold_it_back(packed: bool) -> None:
    ring = Ring(packed=packed)
    ring.chain(4)
    batch = ring.queue.pop_many()
    array = np.frombuffer(batch[0].readable[0], np.uint8)
    for give_back in (ring.queue.push_many, ring.queue.unpop):
        with pytest.raises(LocalMisuseError, match="still in use"):
            give_back(batch)
    del array
    ring.queue.push_many(batch)


@PACKED
def test_old_memory_stays_until_chains_complete(packed: bool) -> None:
    ring = Ring(packed=packed)
    ring.data[:4] = 9
    ring.chain(4)
    batch = ring.queue.pop_many()
    rings = ring.memory.without_region(DATA, 0x10_0000)
    ring.queue.memory = rings
    ring.memory = None  # type: ignore[assignment]
    before = ring.data.ctypes.data
    assert batch.addresses.tolist() == [before]
    assert batch.gather() == b"\x09" * 4
    ring.queue.push_many(batch)
    assert ring.queue.memory is rings
    with pytest.raises(Exception, match="not in one region"):
        ring.queue.memory = GuestMemory([Region(0, bytearray(4096))])
    assert ring.queue.memory is rings


@PACKED
def test_iteration_completes_and_gathers_the_decision(packed: bool) -> None:
    ring = Ring(size=16, packed=packed)
    for n in range(1, 6):
        ring.chain(n, 4, writable=1)
    heads = []
    for chain in ring.queue:
        heads.append(chain.head)
        if len(heads) == 4:
            ring.queue.push(chain, 2)
        elif len(heads) == 5:
            break
        else:
            assert chain.write(b"ab") == 2
            assert chain.write(b"cdef") == 2
            assert chain.written == 4
    assert ring.queue.take_notification()
    assert not ring.queue.take_notification()
    assert ring.driver.get_used()[1].tolist() == [4, 4, 4, 2]
    assert ring.queue.in_flight == 1
    ring.queue.push(chain)


@PACKED
def test_batch_iteration(packed: bool) -> None:
    ring = Ring(packed=packed)
    for n in range(1, 6):
        ring.chain(n)
    batch = ring.queue.pop_many()
    kept = list(batch)
    assert [c.readable_bytes for c in kept] == [1, 2, 3, 4, 5]
    assert [c.readable_bytes for c in batch] == [1, 2, 3, 4, 5]
    views = [c.readable[0] for c in batch]
    ring.queue.push_many(batch, None, 2)
    with pytest.raises(ValueError, match="released"):
        views[1][0]
    assert len(views[2]) == 3
    with pytest.raises(LocalMisuseError):
        kept[1].read()
    assert kept[2].read() == b"\0\0\0"


@PACKED
@pytest.mark.parametrize("event_idx", [False, True])
def test_no_wakeup_is_lost(packed: bool, event_idx: bool) -> None:
    """Each side asks, the other acts before and after the wish is visible."""
    ring = Ring(packed=packed, event_idx=event_idx)
    ring.queue.disable_notifications()
    ring.queue.enable_notifications()
    ring.driver.add([(DATA, 1)], [])
    assert ring.driver.publish(), "asked for, so kicked"
    assert ring.queue.enable_notifications(), "added before the wish: go on popping"
    ring.queue.disable_notifications()
    ring.driver.add([(DATA, 1)], [])
    assert not ring.driver.publish() or event_idx
    ring.driver.disable_notifications()
    batch = ring.queue.pop_many()
    assert not ring.queue.push_many(batch, None, 1)
    assert ring.driver.enable_notifications(), "used before the wish"
    ring.driver.get_used()
    assert not ring.driver.enable_notifications()
    assert ring.queue.push_many(batch), "asked for, so notified"


@PACKED
def test_reset_forgets_what_was_in_flight(packed: bool) -> None:
    ring = Ring(packed=packed)
    for n in range(1, 8):
        ring.chain(n)
    batch = ring.queue.pop_many(3)
    ring.queue.push(ring.queue.pop())
    ring.queue.reset()
    ring.driver.reset()
    assert ring.queue.in_flight == 0
    with pytest.raises(LocalMisuseError, match="reset"):
        ring.queue.push_many(batch)
    assert ring.queue.avail_index == ring.queue.used_index == (0x8000 if packed else 0)
    assert ring.driver.num_free == 8
    assert not ring.queue.pop_many()
    for n in range(1, 9):
        ring.chain(n)
    assert ring.queue.pop_many().readable_bytes.tolist() == list(range(1, 9))


@PACKED
def test_state_can_be_read_out_and_put_back(packed: bool) -> None:
    ring = Ring(packed=packed)
    for _ in range(5):
        for _ in range(3):
            ring.chain(1, 1)
        ring.queue.push_many(ring.queue.pop_many())
        ring.driver.get_used()
    ring.chain(5)
    old = ring.queue
    base = old.vring_base
    if packed:
        assert base == old.avail_index | old.used_index << 16
    kind = PackedQueue if packed else SplitQueue
    parts = ring.memory, 8, ring.desc, ring.avail, ring.used
    queue: VirtQueue = kind(*parts, index=base & 0xFFFF, indirect=True)
    assert queue.pop_many().readable_bytes.tolist() == [5]


@pytest.mark.parametrize(
    ("packed", "sizes"),
    [(False, [1, 2, 4, 256, 32768]), (True, [1, 2, 3, 7, 255, 32767, 32768])],
)
def test_sizes_from_one_to_the_largest(packed: bool, sizes: list[int]) -> None:
    for size in sizes:
        ring = Ring(size=size, packed=packed, event_idx=True)
        at = np.full(size, DATA, np.uint64)
        for _ in range(3):
            assert ring.driver.add_many(at, np.full(size, 9, np.uint32), True) == size
            ring.driver.publish()
            done = 0
            while batch := ring.queue.pop_many():
                done += len(batch)
                ring.queue.push_many(batch, 9)
            assert done == size
            heads, lengths = ring.driver.get_used()
            assert len(set(heads.tolist())) == size
            assert set(lengths.tolist()) == {9}
        longest = min(size, 1000)
        ring.driver.add([(DATA + i, 1) for i in range(longest)], [])
        ring.driver.publish()
        chain = ring.queue.pop()
        assert len(chain.readable) == longest
        assert ring.queue.pop() is None


KINDS = (SplitQueue, SplitDriver, PackedQueue, PackedDriver)
IMPOSSIBLE = [(kind, size) for kind in KINDS for size in (0, -1, 32769, 65536)]


@pytest.mark.parametrize(("kind", "size"), [*IMPOSSIBLE, (SplitQueue, 3), (SplitDriver, 3)])
def test_impossible_sizes(kind: Any, size: int) -> None:
    memory = Ring().memory
    with pytest.raises(LocalMisuseError, match=f"size {size} is not"):
        kind(memory, size, BASE, BASE, BASE)


def test_a_chain_over_very_many_regions_grows_the_table() -> None:
    regions = [Region(BASE, bytearray(0x10000))]
    regions += [Region(DATA + 16 * i, bytearray(16)) for i in range(3000)]
    memory = GuestMemory(regions)
    ring: Any = Ring()
    queue = SplitQueue(memory, 8, BASE, BASE + 0x1000, BASE + 0x2000)
    ring.memory, ring.desc, ring.avail = memory, BASE, BASE + 0x1000
    memory.write(DATA, bytes(range(240)) * 200)
    ring.descriptor(0, DATA, 48000, 0)
    ring.offer(0)
    batch = queue.pop_many()
    assert len(batch.addresses) == 3000
    assert batch.gather() == bytes(range(240)) * 200


def test_virt_queue_is_abstract() -> None:
    with pytest.raises(TypeError):
        VirtQueue()  # type: ignore[call-arg]


@PACKED
def test_notification_data(packed: bool) -> None:
    """2.9: what the driver puts into a kick is what the device reads out of it, around the wrap."""
    ring = Ring(size=3 if packed else 4, packed=packed, index=0 if packed else 65533)
    for queue in (0, 5, 0xFFFF):
        for _ in range(2):
            ring.chain(1)
            data = NotificationData.unpack(ring.driver.notification_data(queue))
            assert data.queue == queue
            assert data.avail_index == ring.driver.avail_index
            ring.queue.push(ring.queue.pop())
            assert data.avail_index == ring.queue.avail_index
            ring.driver.get_used()


def test_notification_data_by_its_bits() -> None:
    """Split: the available index; packed: offset and wrap counter, both above the queue's index."""
    split, packed = Ring(index=65535), Ring(size=3, packed=True)
    for _ in range(2):
        split.chain(1)
    assert split.driver.notification_data(5) == 5 | 1 << 16
    for _ in range(3):
        packed.chain(1)
    assert packed.driver.notification_data(7) == 7, "offset 0, wrap counter 0"
    assert Ring(packed=True).driver.notification_data(0xFFFF) == 0x8000_FFFF
    assert NotificationData.unpack(0x8003_0007) == (7, 3, True)
    assert NotificationData.unpack(0x7FFF_FFFF) == (0xFFFF, 0x7FFF, False)
    for value in (-1, 1 << 32):
        with pytest.raises(LocalMisuseError, match="32 bits"):
            NotificationData.unpack(value)


@PACKED
@pytest.mark.parametrize("distance", [-300, -64, 0, 1, 64, 127, 300])
@pytest.mark.parametrize("length", [100, 5000])
def test_buffers_of_a_chain_that_overlap(packed: bool, distance: int, length: int) -> None:
    """An echo of a chain whose writable buffer lies over its readable one copies the bytes."""
    ring = Ring(packed=packed)
    ring.data[:] = np.frombuffer(np.random.default_rng(3).bytes(len(ring.data)), np.uint8)
    for echo in (lambda c: c.write(c.readable[0]), lambda c: c.write(c.read())):
        at = DATA + 0x2000
        wanted = ring.memory.read(at, length)
        ring.driver.add([(at, length)], [(at + distance, length)])
        ring.driver.publish()
        chain = ring.queue.pop()
        assert echo(chain) == length
        ring.queue.push(chain)
        assert ring.memory.read(at + distance, length) == wanted
        ring.driver.get_used()


@PACKED
def test_nothing_can_be_given_back_or_completed(packed: bool) -> None:
    queue = Ring(packed=packed).queue
    queue.unpop(queue.pop_many())
    assert not queue.push_many(queue.pop_many())
