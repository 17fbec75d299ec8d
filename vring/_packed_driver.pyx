"""The driver's side of packed virtqueues (virtio 1.3, 2.8)."""

from __future__ import annotations

cimport cython
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from vring._driver cimport vr_buffer
from vring._layout cimport (
    DESC_ALIGN, DESC_SIZE, EVENT_ALIGN, EVENT_SIZE, PACKED_FLAGS, PACKED_ID, WRAP
)
from vring._wire cimport (
    DESC_F_AVAIL, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_USED, EVENT_DESC, EVENT_DISABLE,
    EVENT_ENABLE, vr_fence, vr_load16, vr_load16_acquire, vr_load32, vr_need_event,
    vr_read_packed, vr_store16_release, vr_store32, vr_write_desc
)
from vring.errors import LocalMisuseError


@cython.final
cdef class PackedDriver(Driver):
    """The driver's side of a packed virtqueue (virtio 1.3, 2.8); arguments as of Driver."""

    @staticmethod
    def layout(size):
        """Return the sizes of descriptor ring, driver and device event suppression, in bytes."""
        return DESC_SIZE * size, EVENT_SIZE, EVENT_SIZE

    def __cinit__(self, memory, size, desc, avail, used, *, index=None, **features):
        index = self.check_number(WRAP if index is None else index, 0xFFFF, "index")
        if index & ~WRAP >= self.size:
            raise LocalMisuseError(f"{self.name}: index {index:#x} is not in a ring of {self.size}")
        self.ring = self.locate(desc, DESC_SIZE * self.size, DESC_ALIGN)
        self.driver_event = self.locate(avail, EVENT_SIZE, EVENT_ALIGN)
        self.device_event = self.locate(used, EVENT_SIZE, EVENT_ALIGN)
        self.ids = <uint16_t*>calloc(self.size, sizeof(uint16_t))
        if self.ids == NULL:
            raise MemoryError
        self.start(index)

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
        """Write the next descriptor; the first unpublished one keeps its old flags."""
        cdef uint8_t* slot = self.ring + <size_t>self.next_slot * DESC_SIZE
        flags |= DESC_F_AVAIL if self.wrap else DESC_F_USED
        if self.held_slots == 0:
            self.held = self.next_slot
            self.held_flags = flags
            flags = vr_load16(slot + PACKED_FLAGS)
        vr_write_desc(slot, address, length, id, <uint16_t>flags)
        self.advance(1)

    cdef void advance(self, uint32_t slots) noexcept nogil:
        self.held_slots += slots
        self.num_free -= slots
        self.next_slot += slots
        if self.next_slot >= self.size:
            self.next_slot -= self.size
            self.wrap = not self.wrap

    cdef uint16_t put_chain(
        self, const vr_buffer* buffers, uint32_t n, uint64_t table_at, uint8_t* table
    ) noexcept nogil:
        cdef uint32_t i, flags
        cdef uint16_t id
        self.free_ids -= 1
        id = self.ids[self.free_ids]
        for i in range(n):
            flags = buffers[i].flags
            if table != NULL:
                vr_write_desc(
                    table + i * DESC_SIZE, buffers[i].address, buffers[i].length, 0,
                    <uint16_t>flags
                )
            else:
                if i + 1 < n:
                    flags |= DESC_F_NEXT
                self.put(buffers[i].address, buffers[i].length, flags, id)
        if table != NULL:
            self.put(table_at, n * DESC_SIZE, DESC_F_INDIRECT, id)
        return id

    cdef uint16_t put_one(self, uint64_t address, uint32_t length, uint32_t flags) noexcept nogil:
        self.free_ids -= 1
        self.put(address, length, flags, self.ids[self.free_ids])
        return self.ids[self.free_ids]

    def publish(self):
        """Make all added chains available to the device; return whether to kick it (2.8.21.3)."""
        cdef uint32_t slots = self.held_slots, event, flags
        cdef uint16_t offset
        if slots == 0:
            return False
        # The device reads in order: the first descriptor publishes all others, so write it last.
        vr_store16_release(
            self.ring + <size_t>self.held * DESC_SIZE + PACKED_FLAGS, <uint16_t>self.held_flags
        )
        self.held_slots = 0
        # Descriptors must be visible before the device's setting is read, or both may sleep.
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
        cdef uint32_t flags = vr_load16_acquire(self.ring + <size_t>slot * DESC_SIZE + PACKED_FLAGS)
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

    cdef bint used_so_far(self, uint32_t wanted) noexcept nogil:
        """Return whether `wanted` of the descriptors in flight are used.

        It steps from used element to used element: the device does not write the other slots of a
        chain or, with IN_ORDER, of a batch (2.8.7, 2.7.9).
        """
        cdef uint32_t slot = self.next_used, slots = 0, chains = 0, at = self.oldest
        cdef uint16_t head, each
        cdef bint wrap = self.used_wrap
        while slots < wanted:
            if chains == self.flying or not self.is_used(slot, wrap):
                return False
            head = vr_load16(self.ring + <size_t>slot * DESC_SIZE + PACKED_ID)
            if head >= self.size or self.descriptors[head] == 0:
                return True         # get_used tells what is wrong
            while True:
                if chains == self.flying:
                    return True     # as above
                each = self.order[at] if self.in_order else head
                at = at + 1 if at + 1 < self.size else 0
                chains += 1
                slots += self.descriptors[each]
                slot += self.descriptors[each]
                if slot >= self.size:
                    slot -= self.size
                    wrap = not wrap
                if each == head:
                    break
        return True

    def enable_notifications(self, uint16_t after=1):
        """Ask the device to notify of used chains.

        Args:
            after: number of used descriptors after which to notify (2.8.10), counted from the last
                that get_used returned; at most the queue's size. Without EVENT_IDX it counts as 1.

        Returns:
            True if they are used already: they may bring no notification.

        Raises:
            LocalMisuseError: `after` is not 1 to the queue's size.
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
        return self.used_so_far(after if self.event_idx else 1)

    def disable_notifications(self):
        """Tell the device that notifications are not needed; it may still send some."""
        vr_store32(self.driver_event, EVENT_DISABLE << 16)

    @property
    def avail_index(self):
        """Next descriptor to write (bits 0 to 14) and its wrap counter (bit 15)."""
        return self.next_slot | (WRAP if self.wrap else 0)

    @property
    def used_index(self):
        """Next used descriptor to take back (bits 0 to 14) and its wrap counter (bit 15)."""
        return self.next_used | (WRAP if self.used_wrap else 0)
