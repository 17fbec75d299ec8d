"""The driver's side of virtqueues (virtio 1.3, 2.7, 2.8): guests, tests, benchmarks, fuzzing."""

from __future__ import annotations

import numpy as np

cimport cython
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from vring._wire cimport (
    AVAIL_F_NO_INTERRUPT, DESC_F_AVAIL, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_USED, DESC_F_WRITE,
    DESC_SIZE, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, QUEUE_SIZE_MAX, USED_F_NO_NOTIFY, vr_fence,
    vr_load16, vr_load16_acquire, vr_load32, vr_need_event, vr_read_packed, vr_store16,
    vr_store16_release, vr_store32, vr_write_desc
)
from vring.errors import LocalMisuseError, QueueFullError, UsedRingError

cdef enum:
    WRAP = 1 << 15                  # in a state word and in an event structure: the wrap counter


def need_event(uint16_t event, uint16_t after, uint16_t before):
    """Whether moving an index from `before` to `after` passes `event` (2.7.7.2), wrap-safe."""
    return bool(vr_need_event(event, after, before))


cdef class Driver:
    """What the drivers of both layouts have in common. Made as SplitDriver or PackedDriver."""

    def __init__(self, *args, **kwargs):
        if type(self) is Driver:
            raise TypeError("Driver is abstract: make a SplitDriver or a PackedDriver")

    def __dealloc__(self):
        free(self.descriptors)
        free(self.writable)
        free(self.order)

    cdef int allocate(self) except -1:
        self.descriptors = <uint16_t*>calloc(self.size, sizeof(uint16_t))
        self.writable = <uint32_t*>calloc(self.size, sizeof(uint32_t))
        self.order = <uint16_t*>calloc(self.size, sizeof(uint16_t))
        if self.descriptors == NULL or self.writable == NULL or self.order == NULL:
            raise MemoryError
        return 0

    cdef uint8_t* locate(self, uint64_t address, uint64_t length, uint64_t align) except NULL:
        cdef uint8_t* host = self.memory.locate(address, length)
        if <size_t>host % align or address % align:
            raise LocalMisuseError(
                f"{self.name}: ring part at {address:#x} is not aligned to {align} bytes"
            )
        return host

    cdef list check_buffers(self, object readable, object writable, bint indirect_at):
        """All buffers of a chain as (address, length, flags), if there is room for it."""
        buffers = [(address, length, 0) for address, length in readable]
        buffers += [(address, length, DESC_F_WRITE) for address, length in writable]
        n = len(buffers)
        if not 1 <= n <= self.size:
            raise LocalMisuseError(f"{self.name}: a chain of {n} buffers, queue size {self.size}")
        if indirect_at and not self.indirect:
            raise LocalMisuseError(f"{self.name}: INDIRECT_DESC is not negotiated")
        needed = 1 if indirect_at else n
        if needed > self.num_free:
            raise QueueFullError(
                f"{self.name}: {self.num_free} free descriptors, {needed} needed"
            )
        return buffers

    cdef void note(self, uint16_t head, uint32_t descriptors, uint32_t writable) noexcept nogil:
        """A chain is in flight from now on."""
        self.descriptors[head] = <uint16_t>descriptors
        self.writable[head] = writable
        self.order[self.youngest] = head
        self.youngest = self.youngest + 1 if self.youngest + 1 < self.size else 0
        self.flying += 1

    cdef bint next_element(self, uint32_t* head, uint32_t* length) except -1:
        return False

    cdef void take_back(self, uint16_t head) noexcept nogil:
        pass

    cdef void restart(self) noexcept:
        pass

    cdef int batch_size(self, uint32_t head) except -1:
        """How many chains an element that names `head` uses: with IN_ORDER all up to it."""
        cdef uint32_t n, at = self.oldest
        if head >= self.size or self.descriptors[head] == 0:
            raise UsedRingError(self.name, head, "the device used a buffer that is not in flight")
        if not self.in_order:
            return 1
        for n in range(1, self.flying + 1):
            if self.order[at] == head:
                return n
            at = at + 1 if at + 1 < self.size else 0
        raise UsedRingError(self.name, head, "the device used a buffer out of order")

    cdef tuple collect(self, Py_ssize_t limit):
        cdef uint32_t most = self.flying, i = 0, n, head = 0, length = 0
        if limit < 0:
            raise LocalMisuseError(f"limit {limit} is below 0")
        if 0 < limit < most:
            most = limit
        heads = np.empty(self.flying, np.uint32)
        lengths = np.empty(self.flying, np.uint32)
        cdef uint32_t[::1] head_rows = heads
        cdef uint32_t[::1] length_rows = lengths
        while i < most and self.next_element(&head, &length):
            n = self.batch_size(head)
            while n > 1:
                # IN_ORDER (2.7.9): skipped buffers have been used completely.
                head_rows[i] = self.order[self.oldest]
                length_rows[i] = self.writable[head_rows[i]]
                self.take_back(<uint16_t>head_rows[i])
                i += 1
                n -= 1
            head_rows[i] = head
            length_rows[i] = length
            self.take_back(<uint16_t>head)
            i += 1
        return heads[:i], lengths[:i]

    def get_used(self, Py_ssize_t limit=0):
        """Takes chains back that the device has used.

        Args:
            limit: end after so many (with IN_ORDER the last batch may exceed it); 0: all.

        Returns:
            Their heads (packed: buffer ids) and the bytes the device stored in each, two uint32
            arrays.

        Raises:
            RingError: the device used a chain that is not in flight, or its index jumped.
        """
        return self.collect(limit)

    def reset(self):
        """Starts the ring anew (RING_RESET, 2.6.1): all buffers are the caller's again.

        The device must have stopped using the ring, and does the same before the next ``publish``.
        """
        memset(self.descriptors, 0, self.size * sizeof(uint16_t))
        self.oldest = self.youngest = self.flying = 0
        self.num_free = self.size
        self.restart()

    def add(self, readable, writable, *, indirect_at=None):
        """Adds a chain; see SplitDriver.add."""
        raise NotImplementedError

    def add_many(self, addresses, lengths, writable):
        """Adds one-descriptor chains; see SplitDriver.add_many."""
        raise NotImplementedError

    def publish(self):
        """Makes all added chains available; whether the device must be kicked."""
        raise NotImplementedError

    def enable_notifications(self, after=1):
        """Asks the device to notify; True if so many chains are used already."""
        raise NotImplementedError

    def disable_notifications(self):
        """Tells the device that notifications are not needed; it may still send some."""
        raise NotImplementedError

    def notification_data(self, queue):
        """What a kick of queue number `queue` carries with NOTIFICATION_DATA (2.9), 32 bits."""
        return queue | self.avail_index << 16

    @property
    def avail_index(self):
        """Where the next chain goes."""
        raise NotImplementedError

    @property
    def used_index(self):
        """Where the next used chain comes from."""
        raise NotImplementedError

    @property
    def in_flight(self):
        """Chains added and not taken back."""
        return self.flying


@cython.final
cdef class SplitDriver(Driver):
    """The driver's side of a split virtqueue (virtio 1.3, 2.7).

    The rings' memory must be zero, or belong to a device that is set up with the same `index`.
    Buffers that are added are the caller's to manage.

    Args:
        memory: the guest's memory, kept alive.
        size: number of descriptors: a power of two, 1 to 32768.
        desc, avail, used: guest addresses of the three parts.
        event_idx, indirect, in_order: the negotiated features.
        index: available and used index to start from.
        name: what errors call the queue.
    """

    @staticmethod
    def layout(size):
        """Bytes of descriptor table, available ring and used ring, event indices included."""
        return DESC_SIZE * size, 6 + 2 * size, 6 + 8 * size

    def __cinit__(
        self, GuestMemory memory not None, size, desc, avail, used, *, event_idx=False,
        indirect=False, in_order=False, index=0, name="driver"
    ):
        if not 1 <= size <= QUEUE_SIZE_MAX or size & (size - 1):
            raise LocalMisuseError(f"{name}: size {size} is not a power of two from 1 to 32768")
        if not 0 <= index <= 0xFFFF:
            raise LocalMisuseError(f"{name}: index {index} is not of 16 bits")
        self.memory = memory
        self.name = name
        self.size = self.num_free = size
        self.event_idx = event_idx
        self.indirect = indirect
        self.in_order = in_order
        desc_bytes, avail_bytes, used_bytes = SplitDriver.layout(size)
        self.desc = self.locate(desc, desc_bytes, 16)
        self.avail = self.locate(avail, avail_bytes, 2)
        self.used = self.locate(used, used_bytes, 4)
        self.allocate()
        self.next = <uint16_t*>calloc(self.size, sizeof(uint16_t))
        if self.next == NULL:
            raise MemoryError
        self.start(index)

    def __init__(
        self, memory, size, desc, avail, used, *, event_idx=False, indirect=False, in_order=False,
        index=0, name="driver"
    ):
        pass

    def __dealloc__(self):
        free(self.next)

    cdef void start(self, uint16_t index) noexcept:
        cdef uint32_t i
        for i in range(self.size):
            self.next[i] = <uint16_t>(i + 1) & <uint16_t>(self.size - 1)
        self.free_head = 0
        self.next_avail = self.published = self.next_used = index
        vr_store16(self.avail + 2, index)
        self.enable_notifications()

    cdef void restart(self) noexcept:
        memset(self.avail, 0, 4)
        memset(self.used, 0, 4)
        self.start(0)

    cdef uint16_t take(self) noexcept nogil:
        """A free descriptor. With IN_ORDER the links are never changed: ring order (2.7.9)."""
        cdef uint16_t at = self.free_head
        self.free_head = self.next[at]
        self.num_free -= 1
        return at

    cdef void take_back(self, uint16_t head) noexcept nogil:
        """Puts a chain's descriptors back on the free list."""
        cdef uint16_t n = self.descriptors[head], at = head
        self.descriptors[head] = 0
        self.num_free += n
        self.flying -= 1
        self.next_used += 1
        self.oldest = self.oldest + 1 if self.oldest + 1 < self.size else 0
        if self.in_order:
            return
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
        buffers = self.check_buffers(readable, writable, indirect_at is not None)
        cdef uint32_t n = len(buffers), i
        cdef uint8_t* table = NULL
        cdef uint16_t head = self.free_head, at, after
        if indirect_at is not None:
            table = self.memory.locate(indirect_at, n * DESC_SIZE)
            self.take()
            vr_write_desc(
                self.desc + head * DESC_SIZE, indirect_at, n * DESC_SIZE, DESC_F_INDIRECT, 0
            )
        total = 0
        for i in range(n):
            address, length, flags = buffers[i]
            if flags:
                total += length
            at = <uint16_t>i if table != NULL else self.take()
            after = <uint16_t>(i + 1) if table != NULL else self.next[at]
            if i + 1 < n:
                flags |= DESC_F_NEXT
            else:
                after = 0
            vr_write_desc(
                (table if table != NULL else self.desc) + at * DESC_SIZE, address, length, flags,
                after
            )
        self.note(head, 1 if table != NULL else n, min(total, 0xFFFFFFFF))
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
                vr_write_desc(self.desc + head * DESC_SIZE, at[i], length[i], flags, 0)
                self.note(head, 1, length[i] if flags else 0)
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

    cdef bint next_element(self, uint32_t* head, uint32_t* length) except -1:
        cdef uint16_t ready = vr_load16_acquire(self.used + 2) - self.next_used
        cdef const uint8_t* element
        if ready > <uint16_t>(self.published - self.next_used):
            raise UsedRingError(
                self.name, <uint16_t>(self.next_used + ready),
                "the used index moved further than the available index"
            )
        if ready == 0:
            return False
        element = self.used + 4 + 8 * <size_t>(self.next_used & <uint16_t>(self.size - 1))
        head[0] = vr_load32(element)
        length[0] = vr_load32(element + 4)
        return True

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
            # The flag must stay 0 then (2.7.7): an event as far away as can be.
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


@cython.final
cdef class PackedDriver(Driver):
    """The driver's side of a packed virtqueue (virtio 1.3, 2.8).

    The ring's memory must be zero, or belong to a device that is set up with the same `index`.
    Buffers that are added are the caller's to manage.

    Args:
        memory: the guest's memory, kept alive.
        size: number of descriptors, 1 to 32768.
        desc, avail, used: guest addresses of descriptor ring, driver and device event suppression.
        event_idx, indirect, in_order: the negotiated features.
        index: first descriptor (bits 0 to 14) and wrap counter (bit 15) to start from.
        name: what errors call the queue.
    """

    @staticmethod
    def layout(size):
        """Bytes of descriptor ring, driver and device event suppression structures."""
        return DESC_SIZE * size, 4, 4

    def __cinit__(
        self, GuestMemory memory not None, size, desc, avail, used, *, event_idx=False,
        indirect=False, in_order=False, index=WRAP, name="driver"
    ):
        if not 1 <= size <= QUEUE_SIZE_MAX:
            raise LocalMisuseError(f"{name}: size {size} is not 1 to 32768")
        if not 0 <= index <= 0xFFFF or index & ~WRAP >= size:
            raise LocalMisuseError(f"{name}: index {index:#x} is not in a ring of {size}")
        self.memory = memory
        self.name = name
        self.size = self.num_free = size
        self.event_idx = event_idx
        self.indirect = indirect
        self.in_order = in_order
        self.ring = self.locate(desc, DESC_SIZE * size, 16)
        self.driver_event = self.locate(avail, 4, 4)
        self.device_event = self.locate(used, 4, 4)
        self.allocate()
        self.ids = <uint16_t*>calloc(self.size, sizeof(uint16_t))
        if self.ids == NULL:
            raise MemoryError
        self.start(index)

    def __init__(
        self, memory, size, desc, avail, used, *, event_idx=False, indirect=False, in_order=False,
        index=WRAP, name="driver"
    ):
        pass

    def __dealloc__(self):
        free(self.ids)

    cdef void start(self, uint32_t index) noexcept:
        cdef uint32_t i
        for i in range(self.size):
            self.ids[i] = <uint16_t>(self.size - 1 - i)
        self.free_ids = self.size
        self.next_slot = self.next_used = index & <uint32_t>~WRAP
        self.wrap = self.used_wrap = (index & WRAP) != 0
        self.held_slots = 0
        self.enable_notifications()

    cdef void restart(self) noexcept:
        memset(self.ring, 0, self.size * DESC_SIZE)
        vr_store32(self.device_event, 0)
        self.start(WRAP)

    cdef void put(
        self, uint64_t address, uint32_t length, uint32_t flags, uint16_t id
    ) noexcept nogil:
        """Writes the next descriptor; the first that is not published keeps its old flags."""
        cdef uint8_t* slot = self.ring + <size_t>self.next_slot * DESC_SIZE
        flags |= DESC_F_AVAIL if self.wrap else DESC_F_USED
        if self.held_slots == 0:
            self.held = self.next_slot
            self.held_flags = flags
            flags = vr_load16(slot + 14)
        vr_write_desc(slot, address, length, id, <uint16_t>flags)
        self.advance(1)

    cdef void advance(self, uint32_t slots) noexcept nogil:
        self.held_slots += slots
        self.num_free -= slots
        self.next_slot += slots
        if self.next_slot >= self.size:
            self.next_slot -= self.size
            self.wrap = not self.wrap

    def add(self, readable, writable, *, indirect_at=None):
        """Adds a chain; the device sees it after ``publish``. Arguments as SplitDriver.add's.

        Returns:
            The buffer id, by which get_used names the chain.
        """
        buffers = self.check_buffers(readable, writable, indirect_at is not None)
        cdef uint32_t n = len(buffers), i
        cdef uint8_t* table = NULL
        cdef uint16_t id = self.ids[self.free_ids - 1]
        if indirect_at is not None:
            table = self.memory.locate(indirect_at, n * DESC_SIZE)
        self.free_ids -= 1
        total = 0
        for i in range(n):
            address, length, flags = buffers[i]
            if flags:
                total += length
            if table != NULL:
                vr_write_desc(table + i * DESC_SIZE, address, length, 0, flags)
            else:
                self.put(address, length, flags | (DESC_F_NEXT if i + 1 < n else 0), id)
        if table != NULL:
            self.put(indirect_at, n * DESC_SIZE, DESC_F_INDIRECT, id)
        self.note(id, 1 if table != NULL else n, min(total, 0xFFFFFFFF))
        return id

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
        cdef uint32_t flags = DESC_F_WRITE if writable else 0
        with nogil:
            for i in range(n):
                self.free_ids -= 1
                self.put(at[i], length[i], flags, self.ids[self.free_ids])
                self.note(self.ids[self.free_ids], 1, length[i] if flags else 0)
        return n

    def publish(self):
        """Makes all added chains available to the device; whether it must be kicked (2.8.21.3)."""
        cdef uint32_t slots = self.held_slots, event, flags
        cdef uint16_t offset
        if slots == 0:
            return False
        # The device reads in order, so the first descriptor shows it all of them: last.
        vr_store16_release(
            self.ring + <size_t>self.held * DESC_SIZE + 14, <uint16_t>self.held_flags
        )
        self.held_slots = 0
        # What is available must be visible before the device's wish is read, or both may sleep.
        vr_fence()
        event = vr_load32(self.device_event)
        flags = event >> 16 & 3
        if not self.event_idx or flags != EVENT_DESC:
            return flags != EVENT_DISABLE
        offset = event & 0x7FFF
        if ((event & WRAP) != 0) != self.wrap:
            offset -= self.size
        return bool(vr_need_event(offset, self.next_slot, <uint16_t>(self.next_slot - slots)))

    cdef bint is_used(self, uint32_t slot, bint wrap) noexcept nogil:
        cdef uint32_t flags = vr_load16_acquire(self.ring + <size_t>slot * DESC_SIZE + 14)
        return ((flags & DESC_F_AVAIL) != 0) == wrap and ((flags & DESC_F_USED) != 0) == wrap

    cdef bint next_element(self, uint32_t* head, uint32_t* length) except -1:
        if not self.is_used(self.next_used, self.used_wrap):
            return False
        element = vr_read_packed(self.ring + <size_t>self.next_used * DESC_SIZE)
        head[0] = element.id
        length[0] = element.len
        return True

    cdef void take_back(self, uint16_t head) noexcept nogil:
        cdef uint32_t slots = self.descriptors[head]
        self.descriptors[head] = 0
        self.num_free += slots
        self.flying -= 1
        self.oldest = self.oldest + 1 if self.oldest + 1 < self.size else 0
        self.ids[self.free_ids] = head
        self.free_ids += 1
        self.next_used += slots
        if self.next_used >= self.size:
            self.next_used -= self.size
            self.used_wrap = not self.used_wrap

    def enable_notifications(self, uint16_t after=1):
        """Asks the device to notify of used chains.

        Args:
            after: when so many descriptors are (2.8.10), counted from the last that get_used
                returned, at most the queue's size; without EVENT_IDX it stands for 1.

        Returns:
            True if they are used already: no notification may come for those.
        """
        cdef uint32_t at = self.next_used, event = EVENT_ENABLE << 16
        cdef bint wrap = self.used_wrap
        if not 1 <= after <= self.size:
            raise LocalMisuseError(f"{self.name}: after {after} of {self.size} descriptors")
        if self.event_idx:
            at += after - 1
            if at >= self.size:
                at -= self.size
                wrap = not wrap
            event = EVENT_DESC << 16 | at | (WRAP if wrap else 0)
        vr_store32(self.driver_event, event)
        vr_fence()
        return self.flying != 0 and self.is_used(at, wrap)

    def disable_notifications(self):
        """Tells the device that notifications are not needed; it may still send some."""
        vr_store32(self.driver_event, EVENT_DISABLE << 16)

    @property
    def avail_index(self):
        """Where the next descriptor goes (bits 0 to 14) and the wrap counter (bit 15)."""
        return self.next_slot | (WRAP if self.wrap else 0)

    @property
    def used_index(self):
        """The next used descriptor to take back (bits 0 to 14) and its wrap counter (bit 15)."""
        return self.next_used | (WRAP if self.used_wrap else 0)
