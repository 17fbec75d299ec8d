"""A ring that one store fills with chains again, and the ways in which a device can use them.

``vring bench rings`` measures these, and so does ``benchmarks/test_ring.py``, which compares them
with a plain C loop over the same ring.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from vring import (
    Batch,
    GuestMemory,
    PackedDriver,
    PackedQueue,
    Region,
    SplitDriver,
    SplitQueue,
    VirtQueue,
)
from vring import layout as ring

#: Descriptors of the ring.
SIZE = 256
PAGE = 4096
#: Guest address of the ring's first part; the others are one and two pages further.
BASE = 0x10_0000
_TABLES = 16 * PAGE  # from there on: indirect tables, of at most 16 descriptors each
#: Bytes before the buffers in a region.
DATA = _TABLES + ring.DESC_SIZE * 16 * SIZE
_MEMORY = 8 << 20

#: A way in which a device uses all available chains.
Use = Callable[[VirtQueue], object]


class RingWork:
    """Driver and device of one ring of SIZE descriptors, which are all made available at first.

    Args:
        descriptors: number of descriptors of each chain, all device-readable.
        indirect: whether they are in indirect tables.
        regions: number of regions over which the buffers are spread in turn.
        event_idx, packed: the ring's kind.
        length: bytes of a buffer, at most PAGE. Each begins a page.

    Attributes:
        queue, driver: the two sides.
        chains: number of chains.
        guests, arrays: guest address and memory of each region.
    """

    def __init__(
        self,
        descriptors: int = 1,
        *,
        indirect: bool = False,
        regions: int = 1,
        event_idx: bool = False,
        packed: bool = False,
        length: int = PAGE,
    ) -> None:
        self.packed = packed
        per = _MEMORY // regions
        raw = [np.zeros(per + PAGE, np.uint8) for _ in range(regions)]
        self.arrays: list[Any] = [a[-a.ctypes.data % PAGE :][:per] for a in raw]
        self.guests = [BASE + 2 * per * i for i in range(regions)]
        pairs = zip(self.guests, self.arrays, strict=True)
        self.memory = GuestMemory(Region(guest, array) for guest, array in pairs)
        parts = BASE, BASE + PAGE, BASE + 2 * PAGE
        driver = PackedDriver if packed else SplitDriver
        self.driver = driver(self.memory, SIZE, *parts, event_idx=event_idx, indirect=True)
        self.chains = SIZE if indirect or descriptors == 1 else SIZE // descriptors
        self._buffers = [
            (self.guests[n % regions] + DATA + n // regions * PAGE % (per // 4), length)
            for n in range(self.chains * descriptors)
        ]
        for i in range(self.chains):
            table = BASE + _TABLES + ring.DESC_SIZE * descriptors * i if indirect else None
            buffers = self._buffers[i * descriptors : (i + 1) * descriptors]
            self.driver.add(buffers, [], indirect_at=table)
        self.driver.publish()
        queue = PackedQueue if packed else SplitQueue
        self.queue = queue(self.memory, SIZE, *parts, event_idx=event_idx, indirect=True)
        self._index = np.frombuffer(self.memory.view(BASE + PAGE, ring.AVAIL_RING), "<u2")
        # The second words of packed descriptors (length, id, flags), overwritten by each use.
        self._words = np.frombuffer(self.memory.view(BASE, ring.DESC_SIZE * SIZE), "<u8")[1::2]
        neither = self._words & np.uint64(0x7F7F_FFFF_FFFF_FFFF)  # AVAIL nor USED
        self._available = [neither | np.uint64(flags << 48) for flags in (0x8000, 0x80)]

    def refill(self, at: int | None = None) -> None:
        """Make every chain available again, bypassing the driver, which would take longer.

        Args:
            at: ``avail_index`` of a device that has used them all; default: the queue's.
        """
        at = self.queue.avail_index if at is None else at
        if self.packed:
            self._words[:] = self._available[at >> 15]
        else:
            self._index[ring.AVAIL_INDEX // 2] = (at + self.chains) & 0xFFFF

    def ns_per_chain(self, use: Use, batches: int) -> float:
        """Return the nanoseconds per chain of ``use``, which must use all chains.

        ``batches`` is the number of turns; the refill before each is not counted.
        """
        queue, refill, clock = self.queue, self.refill, time.perf_counter_ns
        refill()
        use(queue)  # what is used for the first time is allocated now
        if self.packed:
            total = 0
            for _ in range(batches):
                refill()
                start = clock()
                use(queue)
                total += clock() - start
            return total / batches / self.chains
        # A refill is as short as reading the clock, so the refills are measured separately.
        start = clock()
        for _ in range(batches):
            refill()
            use(queue)
        both = clock() - start
        start = clock()
        for _ in range(batches):
            refill()
            _nothing(queue)
        refills = clock() - start
        return (both - refills) / batches / self.chains

    def driver_ns_per_chain(self, turns: int) -> float:
        """Return the nanoseconds that the driver takes to get a used chain and add it again.

        The ring must be unused, with chains of one descriptor.
        """
        addresses, lengths = (np.array(column) for column in zip(*self._buffers, strict=True))
        total = 0
        for _ in range(turns):
            in_one_batch(self.queue)
            start = time.perf_counter_ns()
            self.driver.get_used()
            self.driver.add_many(addresses, lengths, False)
            self.driver.publish()
            total += time.perf_counter_ns() - start
        return total / turns / self.chains


def _nothing(queue: VirtQueue) -> None:
    """Do nothing, to measure the cost of the call."""


def in_one_batch(queue: VirtQueue) -> None:
    """Complete all chains as one batch."""
    queue.push_many(queue.pop_many())


def in_batches(times: int, limit: int = 0, look: Callable[[Batch], object] | None = None) -> Use:
    """Return a use with ``times`` batches of at most ``limit`` chains.

    ``look`` is called with each batch before it is completed.
    """

    def use(queue: VirtQueue) -> None:
        pop, push = queue.pop_many, queue.push_many
        for _ in range(times):
            push(pop(limit))

    def look_and_use(queue: VirtQueue) -> None:
        assert look is not None
        pop, push = queue.pop_many, queue.push_many
        for _ in range(times):
            batch = pop(limit)
            look(batch)
            push(batch)

    return use if look is None else look_and_use


def one_at_a_time(queue: VirtQueue) -> None:
    """Complete the chains one by one."""
    pop, push = queue.pop, queue.push
    while (chain := pop()) is not None:
        push(chain)


def iterate_queue(queue: VirtQueue) -> None:
    """Complete the chains in a loop over the queue."""
    for _ in queue:
        pass


def iterate_batch(queue: VirtQueue) -> None:
    """Complete the chains of one batch after a loop over it."""
    batch = queue.pop_many()
    for _ in batch:
        pass
    queue.push_many(batch)


def with_memoryview(queue: VirtQueue) -> None:
    """Complete the chains in a loop that takes a memoryview of each."""
    for chain in queue:
        chain.readable[0]
