"""The driver's side of split virtqueues (virtio 1.3, 2.7)."""

from __future__ import annotations

cimport cython
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from vring._driver cimport vr_buffer
from vring._layout cimport (
    AVAIL_ALIGN, AVAIL_ENTRY, AVAIL_FLAGS, AVAIL_INDEX, AVAIL_RING, DESC_ALIGN, DESC_SIZE,
    USED_ALIGN, USED_ENTRY, USED_FLAGS, USED_INDEX, USED_RING, avail_event_at, avail_size,
    used_event_at, used_size
)
from vring._wire cimport (
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, USED_F_NO_NOTIFY, vr_fence, vr_load16,
    vr_load16_acquire, vr_load32, vr_need_event, vr_store16, vr_store16_release, vr_write_desc
)
from vring.errors import LocalMisuseError, UsedRingError


@cython.final
cdef class SplitDriver(Driver):
    """The driver's side of a split virtqueue (virtio 1.3, 2.7); arguments as of Driver."""

    @staticmethod
    def layout(size):
        """Return the sizes of descriptor table, available ring and used ring, in bytes.

        The rings' event indices are included.
        """
        return DESC_SIZE * size, avail_size(size, True), used_size(size, True)

    def __cinit__(self, memory, size, desc, avail, used, *, index=None, **features):
        if self.size & (self.size - 1):
            raise LocalMisuseError(f"{self.name}: size {self.size} is not a power of two")
        index = self.check_number(0 if index is None else index, 0xFFFF, "index")
        desc_bytes, avail_bytes, used_bytes = SplitDriver.layout(self.size)
        self.desc = self.locate(desc, desc_bytes, DESC_ALIGN)
        self.avail = self.locate(avail, avail_bytes, AVAIL_ALIGN)
        self.used = self.locate(used, used_bytes, USED_ALIGN)
        self.next = <uint16_t*>calloc(self.size, sizeof(uint16_t))
        if self.next == NULL:
            raise MemoryError
        self.start(index)

    def __dealloc__(self):
        free(self.next)

    cdef void start(self, uint16_t index) noexcept:
        cdef uint32_t i
        for i in range(self.size):
            self.next[i] = <uint16_t>(i + 1) & <uint16_t>(self.size - 1)
        self.free_head = 0
        self.next_avail = self.published = self.next_used = index
        vr_store16(self.avail + AVAIL_INDEX, index)
        self.enable_notifications()

    cdef void restart(self) noexcept:
        memset(self.avail, 0, AVAIL_RING)
        memset(self.used, 0, USED_RING)
        self.start(0)

    cdef uint16_t take(self) noexcept nogil:
        """Take a free descriptor. With IN_ORDER the links never change: ring order (2.7.9)."""
        cdef uint16_t at = self.free_head
        self.free_head = self.next[at]
        self.num_free -= 1
        return at

    cdef void take_back(self, uint16_t head) noexcept nogil:
        """Put a chain's descriptors back on the free list."""
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

    cdef uint16_t put_chain(
        self, const vr_buffer* buffers, uint32_t n, uint64_t table_at, uint8_t* table
    ) noexcept nogil:
        cdef uint16_t head = self.free_head, at, after, flags
        cdef uint32_t i
        if table != NULL:
            self.take()
            vr_write_desc(
                self.desc + head * DESC_SIZE, table_at, n * DESC_SIZE, DESC_F_INDIRECT, 0
            )
        for i in range(n):
            at = <uint16_t>i if table != NULL else self.take()
            after = <uint16_t>(i + 1) if table != NULL else self.next[at]
            flags = <uint16_t>buffers[i].flags
            if i + 1 < n:
                flags |= DESC_F_NEXT
            else:
                after = 0
            vr_write_desc(
                (table if table != NULL else self.desc) + at * DESC_SIZE, buffers[i].address,
                buffers[i].length, flags, after
            )
        self.offer(head)
        return head

    cdef void offer(self, uint16_t head) noexcept nogil:
        cdef uint16_t slot = self.next_avail & <uint16_t>(self.size - 1)
        vr_store16(self.avail + AVAIL_RING + AVAIL_ENTRY * <size_t>slot, head)
        self.next_avail += 1

    cdef uint16_t put_one(self, uint64_t address, uint32_t length, uint32_t flags) noexcept nogil:
        cdef uint16_t head = self.take()
        vr_write_desc(self.desc + head * DESC_SIZE, address, length, <uint16_t>flags, 0)
        self.offer(head)
        return head

    def publish(self):
        """Make all added chains available to the device; return whether to kick it (2.7.13)."""
        cdef uint16_t before = self.published
        if before == self.next_avail:
            return False
        vr_store16_release(self.avail + AVAIL_INDEX, self.next_avail)
        self.published = self.next_avail
        # The index must be visible before the device's setting is read, or both sides may sleep.
        vr_fence()
        if self.event_idx:
            return bool(vr_need_event(
                vr_load16(self.used + avail_event_at(self.size)), self.published, before
            ))
        return not vr_load16(self.used + USED_FLAGS) & USED_F_NO_NOTIFY

    cdef bint next_element(self, uint32_t* head, uint32_t* length) except -1:
        cdef uint16_t ready = vr_load16_acquire(self.used + USED_INDEX) - self.next_used
        cdef const uint8_t* element
        if ready > <uint16_t>(self.published - self.next_used):
            raise UsedRingError(
                self.name, <uint16_t>(self.next_used + ready),
                "the used index moved further than the available index"
            )
        if ready == 0:
            return False
        element = self.used + USED_RING + USED_ENTRY * <size_t>(
            self.next_used & <uint16_t>(self.size - 1)
        )
        head[0] = vr_load32(element)
        length[0] = vr_load32(element + 4)
        return True

    def enable_notifications(self, uint16_t after=1):
        """Ask the device to notify when chains are used.

        Args:
            after: number of used chains after which to notify (2.7.7.2), counted from the last that
                get_used returned. Without EVENT_IDX the device notifies after each. With a full
                queue, waiting for half of it is more efficient than waiting for one chain.

        Returns:
            True if that many are used already: they may bring no notification.

        Raises:
            LocalMisuseError: `after` is not 1 to the queue's size.
        """
        if not 1 <= after <= self.size:
            raise LocalMisuseError(f"{self.name}: after {after} of {self.size} descriptors")
        if self.event_idx:
            vr_store16(
                self.avail + used_event_at(self.size), <uint16_t>(self.next_used + after - 1)
            )
        else:
            vr_store16(self.avail + AVAIL_FLAGS, 0)
        vr_fence()
        return <uint16_t>(vr_load16(self.used + USED_INDEX) - self.next_used) >= after

    def disable_notifications(self):
        """Tell the device that notifications are not needed; it may still send some."""
        if self.event_idx:
            # With EVENT_IDX the flag must stay 0 (2.7.7): set the farthest event index.
            vr_store16(self.avail + used_event_at(self.size), <uint16_t>(self.next_used - 1))
        else:
            vr_store16(self.avail + AVAIL_FLAGS, AVAIL_F_NO_INTERRUPT)

    @property
    def avail_index(self):
        """Next available index to publish (0 to 65535)."""
        return self.next_avail

    @property
    def used_index(self):
        """Next used index to take back (0 to 65535)."""
        return self.next_used
