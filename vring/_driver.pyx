"""The driver's side of virtqueues (virtio 1.3, 2.7): for guests, tests, benchmarks and fuzzing."""

from __future__ import annotations

import numpy as np

cimport cython
from libc.stdlib cimport calloc, free

from vring._wire cimport (
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE, QUEUE_SIZE_MAX,
    USED_F_NO_NOTIFY, vr_fence, vr_load16, vr_load16_acquire, vr_load32, vr_need_event,
    vr_store16, vr_store16_release, vr_write_desc
)
from vring.errors import LocalMisuseError, QueueFullError, UsedRingError


def need_event(uint16_t event, uint16_t after, uint16_t before):
    """Whether moving an index from `before` to `after` passes `event` (2.7.7.2), wrap-safe."""
    return bool(vr_need_event(event, after, before))


@cython.final
cdef class SplitDriver:
    """The driver's side of a split virtqueue (virtio 1.3, 2.7).

    It writes the descriptor table when made; the rings' memory must be zero or belong to a device
    that is set up with the same `index`. Buffers that it adds are the caller's to manage.

    Args:
        memory: the guest's memory, kept alive.
        size: number of descriptors: a power of two, 1 to 32768.
        desc, avail, used: guest addresses of the three parts.
        event_idx, indirect: the negotiated features.
        index: available and used index to start from.
        name: what errors call the queue.
    """

    @staticmethod
    def layout(size):
        """Bytes of descriptor table, available ring and used ring, event indices included."""
        return DESC_SIZE * size, 6 + 2 * size, 6 + 8 * size

    def __cinit__(
        self, GuestMemory memory not None, size, desc, avail, used, *, event_idx=False,
        indirect=False, index=0, name="driver"
    ):
        cdef uint32_t i
        if not 1 <= size <= QUEUE_SIZE_MAX or size & (size - 1):
            raise LocalMisuseError(f"{name}: size {size} is not a power of two from 1 to 32768")
        if not 0 <= index <= 0xFFFF:
            raise LocalMisuseError(f"{name}: index {index} is not of 16 bits")
        desc_bytes, avail_bytes, used_bytes = SplitDriver.layout(size)
        self.memory = memory
        self.name = name
        self.size = self.num_free = size
        self.event_idx = event_idx
        self.indirect = indirect
        self.desc = memory.locate(desc, desc_bytes)
        self.avail = memory.locate(avail, avail_bytes)
        self.used = memory.locate(used, used_bytes)
        if <size_t>self.desc % 16 or <size_t>self.avail % 2 or <size_t>self.used % 4:
            raise LocalMisuseError(f"{name}: a part of the ring is not aligned (2.7)")
        self.next = <uint16_t*>calloc(self.size, sizeof(uint16_t))
        self.descriptors = <uint16_t*>calloc(self.size, sizeof(uint16_t))
        if self.next == NULL or self.descriptors == NULL:
            raise MemoryError
        for i in range(self.size):
            self.next[i] = <uint16_t>(i + 1)
        self.next_avail = self.published = self.next_used = index
        vr_store16(self.avail + 2, index)
        self.enable_notifications()

    def __init__(
        self, memory, size, desc, avail, used, *, event_idx=False, indirect=False, index=0,
        name="driver"
    ):
        pass

    def __dealloc__(self):
        free(self.next)
        free(self.descriptors)

    cdef uint16_t take(self) noexcept nogil:
        cdef uint16_t at = self.free_head
        self.free_head = self.next[at]
        self.num_free -= 1
        return at

    cdef void give(self, uint16_t head) noexcept nogil:
        """Puts a chain's descriptors back on the free list."""
        cdef uint16_t n = self.descriptors[head], at = head
        self.descriptors[head] = 0
        self.num_free += n
        while n > 1:
            at = self.next[at]
            n -= 1
        self.next[at] = self.free_head
        self.free_head = head

    def add(self, readable, writable, *, indirect_at=None):
        """Adds a chain; the device sees it after ``publish``.

        Args:
            readable, writable: (guest address, length in bytes) of device-readable and
                device-writable buffers, in order; at least one in all.
            indirect_at: guest address of a free piece of memory of 16 bytes per buffer, the
                caller's until the chain is used: the chain goes there and takes one descriptor.

        Returns:
            The head, by which get_used names the chain.

        Raises:
            QueueFullError: not enough free descriptors.
            LocalMisuseError: no buffer, more than the queue's size, or indirect not negotiated.
        """
        buffers = [(address, length, 0) for address, length in readable]
        buffers += [(address, length, DESC_F_WRITE) for address, length in writable]
        cdef uint32_t n = len(buffers), i
        cdef uint8_t* table
        cdef uint16_t head, at
        if not 1 <= n <= self.size:
            raise LocalMisuseError(f"{self.name}: a chain of {n} buffers, queue size {self.size}")
        if indirect_at is not None and not self.indirect:
            raise LocalMisuseError(f"{self.name}: INDIRECT_DESC is not negotiated")
        if (1 if indirect_at is not None else n) > self.num_free:
            raise QueueFullError(f"{self.name}: {self.num_free} free descriptors, {n} needed")
        if indirect_at is not None:
            table = self.memory.locate(indirect_at, n * DESC_SIZE)
            for i in range(n):
                address, length, flags = buffers[i]
                vr_write_desc(
                    table + i * DESC_SIZE, address, length,
                    <uint16_t>(flags | (DESC_F_NEXT if i + 1 < n else 0)), <uint16_t>(i + 1)
                )
            head = self.take()
            self.descriptors[head] = 1
            vr_write_desc(
                self.desc + head * DESC_SIZE, indirect_at, n * DESC_SIZE, DESC_F_INDIRECT, 0
            )
        else:
            head = self.free_head
            self.descriptors[head] = n
            for i in range(n):
                address, length, flags = buffers[i]
                at = self.take()
                vr_write_desc(
                    self.desc + at * DESC_SIZE, address, length,
                    <uint16_t>(flags | (DESC_F_NEXT if i + 1 < n else 0)),
                    self.next[at] if i + 1 < n else 0
                )
        self.offer(head)
        return head

    cdef void offer(self, uint16_t head) noexcept nogil:
        cdef uint16_t slot = self.next_avail & <uint16_t>(self.size - 1)
        vr_store16(self.avail + 4 + 2 * <size_t>slot, head)
        self.next_avail += 1

    def add_many(self, addresses, lengths, writable):
        """Adds one-descriptor chains until all are added or no descriptor is free; how many.

        Args:
            addresses: guest addresses (uint64 array or sequence).
            lengths: bytes of each (uint32 array or sequence).
            writable: whether all are device-writable (else all device-readable).
        """
        cdef const uint64_t[::1] at = np.ascontiguousarray(addresses, np.uint64)
        cdef const uint32_t[::1] length = np.ascontiguousarray(lengths, np.uint32)
        if at.shape[0] != length.shape[0]:
            raise LocalMisuseError(f"{at.shape[0]} addresses, {length.shape[0]} lengths")
        cdef uint32_t n = min(<uint64_t>at.shape[0], self.num_free), i
        cdef uint16_t flags = DESC_F_WRITE if writable else 0
        cdef uint16_t head
        with nogil:
            for i in range(n):
                head = self.take()
                self.descriptors[head] = 1
                vr_write_desc(self.desc + head * DESC_SIZE, at[i], length[i], flags, 0)
                self.offer(head)
        return n

    def publish(self):
        """Makes all added chains available to the device; whether it must be kicked (2.7.13)."""
        cdef uint16_t before = self.published
        if before == self.next_avail:
            return False
        vr_store16_release(self.avail + 2, self.next_avail)
        self.published = self.next_avail
        # The index must be visible before the device's wish is read, or both sides may sleep.
        vr_fence()
        if self.event_idx:
            return bool(vr_need_event(
                vr_load16(self.used + 4 + 8 * <size_t>self.size), self.published, before
            ))
        return not vr_load16(self.used) & USED_F_NO_NOTIFY

    cdef int used_ready(self) except -1:
        """Chains the device has used and get_used has not returned."""
        cdef uint16_t ready = vr_load16_acquire(self.used + 2) - self.next_used
        if ready > <uint16_t>(self.published - self.next_used):
            raise UsedRingError(
                self.name, <uint16_t>(self.next_used + ready),
                "the used index moved further than the available index"
            )
        return ready

    def get_used(self, Py_ssize_t limit=0):
        """Takes chains back that the device has used.

        Args:
            limit: at most so many; 0: all.

        Returns:
            Their heads and the bytes the device stored in each (two uint32 arrays).

        Raises:
            RingError: the device used a chain that is not in flight, or its index jumped.
        """
        cdef uint32_t n = self.used_ready(), i, head
        if limit < 0:
            raise LocalMisuseError(f"limit {limit} is below 0")
        if 0 < limit < n:
            n = limit
        heads = np.empty(n, np.uint32)
        lengths = np.empty(n, np.uint32)
        cdef uint32_t[::1] head_rows = heads
        cdef uint32_t[::1] length_rows = lengths
        cdef const uint8_t* element
        for i in range(n):
            element = self.used + 4 + 8 * <size_t>(self.next_used & <uint16_t>(self.size - 1))
            head = vr_load32(element)
            if head >= self.size or self.descriptors[head] == 0:
                raise UsedRingError(self.name, head, "the device used a head that is not in flight")
            head_rows[i] = head
            length_rows[i] = vr_load32(element + 4)
            self.give(head)
            self.next_used += 1
        return heads, lengths

    def enable_notifications(self, uint16_t after=1):
        """Asks the device to notify when chains are used.

        Args:
            after: when so many are (2.7.7.2), counted from the last that get_used returned; without
                EVENT_IDX the device notifies at each. A driver with a full queue waits better for
                half of it than for one chain.

        Returns:
            True if so many are used already: no notification may come for those.
        """
        if self.event_idx:
            vr_store16(
                self.avail + 4 + 2 * <size_t>self.size, <uint16_t>(self.next_used + after - 1)
            )
        else:
            vr_store16(self.avail, 0)
        vr_fence()
        return <uint16_t>(vr_load16(self.used + 2) - self.next_used) >= after

    def disable_notifications(self):
        """Tells the device that notifications are not needed; it may still send some."""
        if self.event_idx:
            # An event as far away as can be (2.7.7: flags must stay 0).
            vr_store16(self.avail + 4 + 2 * <size_t>self.size, <uint16_t>(self.next_used - 1))
        else:
            vr_store16(self.avail, AVAIL_F_NO_INTERRUPT)

    @property
    def avail_index(self):
        """The next available index to publish (0 to 65535)."""
        return self.next_avail

    @property
    def used_index(self):
        """The next used index to take back (0 to 65535)."""
        return self.next_used

    @property
    def in_flight(self):
        """Chains added and not taken back."""
        return <uint16_t>(self.next_avail - self.next_used)
