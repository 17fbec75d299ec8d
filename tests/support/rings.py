"""A ring with driver and device in one memory, under two addresses."""

from __future__ import annotations

from typing import Any

import numpy as np

from vring import GuestMemory, PackedDriver, PackedQueue, Region, SplitDriver, SplitQueue

BASE = 0x1_0000
DATA = 0x100_0000


class Ring:
    """Rings at BASE, 1 MiB of buffers at DATA; `packed` chooses the layout."""

    def __init__(self, size: int = 8, packed: bool = False, index: int = 0, **features: Any):
        self.bytes = np.zeros(0x20_0000, np.uint8)
        self.data = np.zeros(0x10_0000, np.uint8)
        arrays: list[tuple[int, Any]] = [(BASE, self.bytes), (DATA, self.data)]
        self.memory = GuestMemory([Region(at, array) for at, array in arrays])
        driver, queue = (PackedDriver, PackedQueue) if packed else (SplitDriver, SplitQueue)
        self.desc = BASE
        self.avail = BASE + 16 * size
        self.used = self.avail + (2 * size + 9 & ~3)
        parts = (self.memory, size, self.desc, self.avail, self.used)
        features.setdefault("indirect", True)
        if packed:
            index = index or 0x8000
        else:
            self.memory.write(self.used + 2, index.to_bytes(2, "little"))
        self.driver: Any = driver(*parts, index=index, **features)
        self.queue: Any = queue(*parts, index=index, **features, name="q")

    def chain(self, *lengths: int, writable: int = 0) -> None:
        """Publishes a chain of buffers, the last `writable` of them device-writable."""
        buffers = [(DATA + 0x1000 * i, n) for i, n in enumerate(lengths)]
        cut = len(buffers) - writable
        self.driver.add(buffers[:cut], buffers[cut:])
        self.driver.publish()

    def descriptor(self, i: int, address: int, length: int, flags: int, following: int = 0) -> None:
        """Writes a split descriptor by hand."""
        self.put_table(self.desc + 16 * i, (address, length, flags, following))

    def put_table(self, at: int, *descriptors: tuple[int, int, int, int]) -> None:
        raw = b"".join(
            a.to_bytes(8, "little")
            + n.to_bytes(4, "little")
            + f.to_bytes(2, "little")
            + x.to_bytes(2, "little")
            for a, n, f, x in descriptors
        )
        self.memory.write(at, raw)

    def offer(self, *heads: int, index: int | None = None) -> None:
        """Writes the available ring of a split queue that started at 0."""
        self.memory.write(self.avail + 4, b"".join(h.to_bytes(2, "little") for h in heads))
        self.memory.write(self.avail + 2, (index or len(heads)).to_bytes(2, "little"))
