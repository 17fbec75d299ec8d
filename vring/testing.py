"""A guest's end of a stream over one virtqueue: for tests, benchmarks and examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vring import _layout as layout
from vring._memory import GuestMemory, Region
from vring._split import SplitQueue
from vring._split_driver import SplitDriver
from vring.errors import LocalMisuseError

if TYPE_CHECKING:
    from typing_extensions import Buffer


class GuestQueue:
    """A driver that streams bytes through one split queue, with a buffer per descriptor.

    Buffers are used in turn, so the device must complete chains in the order of their arrival.

    Args:
        data: zeroed, writable buffer of `bytes_needed` bytes for rings and buffers; the device's
            process may map the same memory. Kept alive by the GuestMemory made of it.
        size: number of descriptors of the queue.
        slot: bytes per buffer.
        writable: True: the device writes (a receive queue); False: it reads.
        event_idx: whether EVENT_IDX is negotiated.
        index: initial available and used index.
        guest_addr: guest address of the first byte of `data`.
    """

    def __init__(
        self,
        data: Buffer,
        size: int,
        slot: int,
        *,
        writable: bool,
        event_idx: bool = False,
        index: int = 0,
        guest_addr: int = 0x10_0000,
    ) -> None:
        self.memory = GuestMemory([Region(guest_addr, data)])
        self.size = size
        self.slot = slot
        self.writable = writable
        self._event_idx = event_idx
        self._index = index
        desc, avail, used, first = (guest_addr + n for n in self._layout(size))
        self.rings = (desc, avail, used)
        self.driver = SplitDriver(
            self.memory, size, desc, avail, used, event_idx=event_idx, index=index
        )
        self.memory.write(
            used + layout.USED_INDEX, index.to_bytes(2, "little")
        )  # as a device left it
        buffers = np.frombuffer(memoryview(data), np.uint8, size * slot, first - guest_addr)
        self.slots = buffers.reshape(size, slot)
        self.addresses = first + slot * np.arange(size, dtype=np.uint64)
        self._twice = np.concatenate([self.addresses, self.addresses])  # for runs past the end
        self._next = 0  # slot to add next
        self._oldest = 0  # slot the device uses next

    @staticmethod
    def _layout(size: int) -> tuple[int, int, int, int]:
        """Return the offsets in bytes of descriptor table, available ring, used ring, buffers."""
        desc, avail, used = SplitDriver.layout(size)
        used_at = (desc + avail + 4095) & ~4095
        return 0, desc, used_at, (used_at + used + 4095) & ~4095

    @classmethod
    def bytes_needed(cls, size: int, slot: int) -> int:
        """Return the size of rings and buffers together, in bytes."""
        return cls._layout(size)[3] + size * slot

    def device_queue(
        self,
        name: str = "queue",
        memory: GuestMemory | None = None,
        *,
        index: int | None = None,
    ) -> SplitQueue:
        """Return the device's side, in `memory` if given: another mapping of the same bytes.

        It starts at `index`, where an earlier device stopped; default: where the queue started.
        """
        desc, avail, used = self.rings
        return SplitQueue(
            memory or self.memory,
            self.size,
            desc,
            avail,
            used,
            event_idx=self._event_idx,
            index=self._index if index is None else index,
            name=name,
        )

    def add(self, lengths: Sequence[int] | NDArray[np.uint32]) -> bool:
        """Make the next buffers available unchanged, with these lengths; True: kick the device.

        Raises:
            LocalMisuseError: more buffers than are free.
        """
        n = len(lengths)
        if n > self.driver.num_free:
            raise LocalMisuseError(f"{n} buffers do not fit the queue")
        self.driver.add_many(self._twice[self._next : self._next + n], lengths, self.writable)
        self._next = (self._next + n) % self.size
        return self.driver.publish()

    def send(self, data: bytes, lengths: Sequence[int]) -> bool:
        """Make `data` available in buffers of these lengths; True: kick the device.

        Raises:
            LocalMisuseError: more buffers than are free, or one longer than a slot.
        """
        if sum(lengths) != len(data) or max(lengths, default=0) > self.slot:
            raise LocalMisuseError(f"{len(data)} bytes do not go into buffers of {lengths}")
        offset = 0
        for i, length in enumerate(lengths):
            piece = np.frombuffer(data, np.uint8, length, offset)
            self.slots[(self._next + i) % self.size, :length] = piece
            offset += length
        return self.add(lengths)

    def offer(self, count: int | None = None, length: int | None = None) -> bool:
        """Make `count` (default: all free) buffers available unchanged; True: kick the device."""
        n = self.driver.num_free if count is None else count
        return self.add(np.full(n, self.slot if length is None else length, np.uint32))

    def collect(self) -> NDArray[np.uint32]:
        """Take used buffers back; return the number of bytes the device wrote into each."""
        _, lengths = self.driver.get_used()
        self._oldest = (self._oldest + len(lengths)) % self.size
        return lengths

    def receive(self) -> bytes:
        """Take used buffers back; return the bytes that the device wrote into them."""
        at = self._oldest
        lengths = self.collect()
        return b"".join(
            self.slots[(at + i) % self.size, :length].tobytes() for i, length in enumerate(lengths)
        )
