"""Random ring memory and random calls: no input may crash, hang, or touch memory outside the guest.

The invariant: whatever bytes the rings hold and in whatever order the device calls its queue,
every call returns or raises a VringError, every segment lies in guest memory, and a chain has no
more segments and bytes than the specification allows. Under `make sanitize` the extensions are
built with AddressSanitizer and UBSan, and guest memory is malloc'ed, so one byte beside it is an
error.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from vring import GuestMemory, PackedQueue, Region, RingError, SplitQueue, VringError, layout

RING, TABLES, DATA = 0x1000, 0x4000, 0x8000
AVAIL, USED = RING + 0x1000, RING + 0x1800
ADDRESSES = np.array(
    [DATA, DATA + 0xFF0, DATA + 0x1000, TABLES, TABLES + 0x10, RING, 0, 2**64 - 16, 2**63],
    np.uint64,
)
LENGTHS = [0, 1, 16, 32, 64, 0x20, 0x1000, 0x1010, 0xFFFFFFFF, 17, 256, 0x80000010]


class Input:
    """Numbers out of the fuzzer's bytes; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def number(self, below: int) -> int:
        at, self._at = self._at, self._at + (1 if below <= 256 else 2)
        return int.from_bytes(self._data[at : self._at], "little") % below

    def bytes(self, count: int) -> bytes:
        at, self._at = self._at, self._at + count
        return self._data[at : self._at].ljust(count, b"\0")


def descriptor(source: Input, packed: bool) -> bytes:
    """Mostly plausible, sometimes random bytes: those alone seldom get past the first check."""
    if source.number(8) == 0:
        return source.bytes(layout.DESC_SIZE)
    address = int(ADDRESSES[source.number(len(ADDRESSES))])
    length = LENGTHS[source.number(len(LENGTHS))]
    low, high = source.number(8), source.number(20)
    if packed:
        low, high = high, low | (0x80, 0x8000, 0x8080, 0)[source.number(4)]
    return (
        address.to_bytes(8, "little")
        + length.to_bytes(4, "little")
        + low.to_bytes(2, "little")
        + high.to_bytes(2, "little")
    )


def check_batch(batch: Any, arrays: list[np.ndarray[Any, Any]], size: int) -> None:
    starts = [a.ctypes.data for a in arrays]
    inside = np.zeros(len(batch.addresses), bool)
    for start, array in zip(starts, arrays, strict=True):
        inside |= (batch.addresses >= start) & (
            batch.addresses + batch.lengths <= start + len(array)
        )
    assert inside.all(), "a segment outside guest memory"
    totals = batch.readable_bytes.astype(np.uint64) + batch.writable_bytes
    assert int(totals.sum()) == int(batch.lengths.sum())
    assert (batch.n_readable + batch.n_writable <= size * (len(arrays) + 1)).all()


def one_input(data: bytes) -> None:
    """Plays one input; raises what breaks the invariant."""
    source = Input(data)
    packed = bool(source.number(2))
    size = 1 << source.number(5) if not packed else 1 + source.number(17)
    arrays = [np.zeros(n, np.uint8) for n in (0x2000, 0x2000, 0x1000, 0x1000)]
    memory = GuestMemory(
        Region(at, array)
        for at, array in zip((RING, TABLES, DATA, DATA + 0x1000), arrays, strict=True)
    )
    features = {"event_idx": bool(source.number(2)), "indirect": bool(source.number(4))}
    features["in_order"] = source.number(4) == 1
    index = source.number(65536) if not packed else source.number(size) | source.number(2) << 15
    queue: Any = (PackedQueue if packed else SplitQueue)(
        memory, size, RING, AVAIL, USED, index=index, **features
    )
    memory.write(RING, b"".join(descriptor(source, packed) for _ in range(size)))
    memory.write(TABLES, b"".join(descriptor(source, packed) for _ in range(20)))
    if not packed:
        heads = b"".join(source.number(size + 1).to_bytes(2, "little") for _ in range(size))
        memory.write(AVAIL + layout.AVAIL_RING, heads)
    batches: list[Any] = []
    for _ in range(32):
        if not source:
            break
        try:
            match source.number(8):
                case 0 | 1:
                    ahead = (queue.avail_index + source.number(size + 2)) & 0xFFFF
                    memory.write(AVAIL + layout.AVAIL_INDEX, ahead.to_bytes(2, "little"))
                case 2 | 3:
                    batch = queue.pop_many(source.number(4), source.number(3) * 40)
                    check_batch(batch, arrays, size)
                    if int(batch.readable_bytes.sum()) < 1 << 20:
                        batch.gather()
                    batches.append(batch)
                case 4 if batches:
                    batch = batches.pop(source.number(len(batches)))
                    used, written = batch.scatter(source.bytes(source.number(65)))
                    queue.push_many(batch, written, used)
                    queue.push_many(batch, int(source.number(2)))
                case 5 if batches:
                    queue.unpop(batches.pop())
                case 6:
                    (queue.enable_notifications, queue.disable_notifications)[source.number(2)]()
                case _:
                    slot = RING + layout.DESC_SIZE * source.number(size)
                    memory.write(slot, descriptor(source, packed))
        except RingError:
            assert queue.broken is not None
            queue.reset()
            batches.clear()
        except VringError:
            pass


if __name__ == "__main__":
    from runner import run

    sys.exit(run(one_input, "rings"))
