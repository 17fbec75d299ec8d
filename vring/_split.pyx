"""The device's side of split virtqueues in hostile guest memory (virtio 1.3, 2.7)."""

from __future__ import annotations

cimport cython

from vring._chains cimport (
    FAULT_AVAIL_INDEX, FAULT_HEAD, FAULT_INDIRECT_ADDRESS, FAULT_INDIRECT_NESTED, FAULT_NEXT,
    FAULT_NONE, FAULT_ORDER, vr_add_buffer, vr_chain, vr_end_chain, vr_end_readable,
    vr_locate_table, vr_read_scattered, vr_room, vr_single, vr_start_chain, vr_walk
)
from vring._core cimport VR_BROKEN
from vring._memory cimport GuestMemory, vr_lookup, vr_region
from vring._wire cimport (
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE, USED_F_NO_NOTIFY,
    iovec, vr_entry, vr_fence, vr_follow, vr_likely, vr_load16, vr_load16_acquire, vr_need_event,
    vr_read_desc, vr_store16, vr_store16_release, vr_unlikely, vr_write_used
)
from vring.errors import LocalMisuseError


cdef inline int walk_table(
    vr_room* room, vr_walk* walk, vr_chain* chain, const uint8_t* table, uint32_t entries
) noexcept nogil:
    """Takes the buffers of a chain from entry walk.at of a descriptor table on.

    Ends after the last descriptor, at one that names an indirect table, or at a fault; walk.at and
    walk.desc tell where. Returns a vr_fault_code.
    """
    cdef int code
    while True:
        walk.desc = vr_read_desc(table + <size_t>walk.at * DESC_SIZE)
        if (walk.desc.flags & (DESC_F_WRITE | DESC_F_INDIRECT)) != walk.writable:
            if walk.desc.flags & DESC_F_INDIRECT:
                return FAULT_NONE
            if vr_unlikely(walk.writable):
                return FAULT_ORDER
            walk.writable = DESC_F_WRITE
            vr_end_readable(room, walk, chain)
        code = vr_add_buffer(room, walk, chain)
        if vr_unlikely(code) or not walk.desc.flags & DESC_F_NEXT:
            return code
        if vr_unlikely(walk.desc.next >= entries):
            return FAULT_NEXT
        walk.at = vr_follow(walk.at, walk.desc.next)


cdef int walk_scattered(
    vr_room* room, vr_walk* walk, vr_chain* chain, uint64_t table, uint32_t entries
) noexcept nogil:
    """Like walk_table, for an indirect table that crosses region borders: entry by entry."""
    cdef uint8_t[DESC_SIZE] entry
    cdef uint32_t at = 0
    cdef int code
    while True:
        if not vr_read_scattered(room.memory, table, at, entry):
            walk.desc.addr = table
            walk.desc.len = entries * DESC_SIZE
            return FAULT_INDIRECT_ADDRESS
        walk.at = 0
        code = walk_table(room, walk, chain, entry, 0)
        walk.at = at
        # A table of no entries makes every `next` a fault.
        if code != FAULT_NEXT or walk.desc.next >= entries:
            return code
        at = walk.desc.next


cdef inline int walk_indirect(
    vr_room* room, vr_walk* walk, vr_chain* chain, bint negotiated
) noexcept nogil:
    """Goes on in the indirect table that walk.desc names. Returns a vr_fault_code."""
    cdef uint64_t address = walk.desc.addr
    cdef uint32_t entries = walk.desc.len // DESC_SIZE
    cdef const uint8_t* table = NULL
    cdef vr_walk copy
    cdef int code = vr_locate_table(room, walk, negotiated, <uint32_t>-1, &table)
    if vr_unlikely(code):
        return code
    walk.at = 0
    if vr_likely(table != NULL):
        code = walk_table(room, walk, chain, table, entries)
    else:
        copy = walk[0]
        code = walk_scattered(room, &copy, chain, address, entries)
        walk[0] = copy
    if vr_unlikely(walk.desc.flags & DESC_F_INDIRECT and not code):
        return FAULT_INDIRECT_NESTED
    return code


cdef uint32_t pop_singles(
    const uint8_t* heads, const uint8_t* table, uint16_t index, uint32_t ready, vr_chain* chains,
    const vr_room* room, iovec* segments
) noexcept nogil:
    """Pops one-descriptor chains, the most common, up to the first of another kind; how many.

    What is unusual about a chain or wrong with it is left to the loop over all kinds.
    """
    cdef const vr_region* near = room.memory.regions
    cdef vr_entry desc
    cdef uint64_t offset
    cdef uint32_t i, at, size = room.size
    for i in range(ready):
        at = vr_load16(heads + 2 * <size_t>((index + i) & (size - 1)))
        if vr_unlikely(at >= size):
            return i
        desc = vr_read_desc(table + <size_t>at * DESC_SIZE)
        if desc.flags & (DESC_F_NEXT | DESC_F_INDIRECT):
            return i
        offset = desc.addr - near.guest
        if offset >= near.size:
            near = vr_lookup(room.memory, room.hints, desc.addr)
            if vr_unlikely(near == NULL):
                return i
            offset = desc.addr - near.guest
        if vr_unlikely(<uint64_t>desc.len - 1 >= near.size - offset):
            return i
        segments[i].iov_base = near.host + offset
        segments[i].iov_len = desc.len
        vr_single(&chains[i], at, i, desc.len, desc.flags & DESC_F_WRITE)
    return ready


@cython.final
cdef class SplitQueue(VirtQueue):
    """The device's side of a split virtqueue (virtio 1.3, 2.7); made as VirtQueue says.

    Its indices are of 16 bits and start at 0.
    """

    def __cinit__(self, *args, index=None, used_index=None, **features):
        if self.size & (self.size - 1):
            raise LocalMisuseError(f"{self.name}: size {self.size} is not a power of two")
        index = 0 if index is None else index
        used_index = index if used_index is None else used_index
        for at in (index, used_index):
            if not 0 <= at <= 0xFFFF:
                raise LocalMisuseError(f"{self.name}: index {at} is not of 16 bits")
        self.next_avail = index
        self.next_used = used_index
        self.memory = self._memory

    cdef int locate_rings(self, GuestMemory memory) except -1:
        desc_at, avail_at, used_at = self._rings
        # The event indices at the ends exist only with EVENT_IDX.
        cdef uint64_t event = 2 if self.event_idx else 0
        cdef uint8_t* desc = self.locate(
            memory, desc_at, self.size * DESC_SIZE, 16, "descriptor table"
        )
        cdef uint8_t* avail = self.locate(
            memory, avail_at, 4 + self.size * 2 + event, 2, "available ring"
        )
        self.used = self.locate(memory, used_at, 4 + self.size * 8 + event, 4, "used ring")
        self.desc = desc
        self.avail = avail
        return 0

    cdef void restart(self) noexcept:
        self.next_avail = self.next_used = 0

    @property
    def avail_index(self):
        """The next available index to pop (0 to 65535)."""
        return self.next_avail

    @property
    def used_index(self):
        """The next used index to publish (0 to 65535)."""
        return self.next_used

    cdef int pop_within(
        self, vr_chain* chains, uint32_t max_chains, iovec* segments, uint32_t max_segments,
        uint64_t max_bytes
    ) noexcept nogil:
        cdef uint16_t index = self.next_avail
        cdef uint32_t size = self.size, mask = self.size - 1
        cdef uint32_t ready = <uint16_t>(vr_load16_acquire(self.avail + 2) - index)
        cdef uint32_t i = 0
        cdef const uint8_t* heads = self.avail + 4
        cdef const uint8_t* table = self.desc
        cdef bint indirect = self.indirect
        cdef vr_chain* chain
        cdef vr_room room
        cdef vr_walk walk
        cdef int code = 0
        if self.fault.code:
            return VR_BROKEN
        # What is in flight still occupies descriptors, so the driver cannot add a whole ring.
        if ready + (self.popped - self.pushed) > size:
            return self.fail(FAULT_AVAIL_INDEX, <uint16_t>(index + ready), 0, 0)
        if ready > max_chains:
            ready = max_chains
        room.memory = &self.map
        room.hints = self.hints
        room.size = size
        room.extra = 0
        room.segments = segments
        room.end = segments + max_segments
        if max_bytes == <uint64_t>-1:
            i = pop_singles(
                heads, table, index, min(ready, max_segments), chains, &room, segments
            )
        walk.near = self.map.regions
        walk.segment = segments + i
        while i < ready:
            walk.at = vr_load16(heads + 2 * <size_t>((index + i) & mask))
            if vr_unlikely(walk.at >= size):
                code = self.fail(FAULT_HEAD, walk.at, 0, 0)
                break
            chain = &chains[i]
            chain.head = walk.at
            chain.descriptors = 1
            vr_start_chain(&walk, chain, <uint32_t>(walk.segment - segments))
            code = walk_table(&room, &walk, chain, table, size)
            if walk.desc.flags & DESC_F_INDIRECT and not code:
                code = walk_indirect(&room, &walk, chain, indirect)
            if vr_likely(not code):
                code = vr_end_chain(&room, &walk, chain)
            if vr_unlikely(code):
                code = self.chain_fault(code, walk.at, walk.desc.addr, walk.desc.len)
                break
            if vr_unlikely(walk.bytes > max_bytes):
                i = max(i, 1)
                break
            max_bytes -= walk.bytes
            i += 1
        if code and i:
            # Deliver what is sound; the next pop meets the broken chain again, or the bigger table.
            self.fault.code = FAULT_NONE
            code = 0
        self.next_avail = index + i
        self.popped += i
        return code if code else <int>i

    cdef bint push_c(
        self, const vr_chain* chains, const uint32_t* written, uint32_t n
    ) noexcept nogil:
        cdef uint16_t before = self.next_used
        cdef uint16_t after = before + n
        cdef uint32_t mask = self.size - 1
        cdef uint32_t i
        cdef uint8_t* elements = self.used + 4
        for i in range(n):
            vr_write_used(
                elements + 8 * <size_t>((before + i) & mask), chains[i].head,
                written[i] if written != NULL else 0
            )
        vr_store16_release(self.used + 2, after)
        self.next_used = after
        self.pushed += n
        # The index must be visible before the driver's wish is read, or both sides may sleep.
        vr_fence()
        if self.event_idx:
            return vr_need_event(
                vr_load16(self.avail + 4 + 2 * <size_t>self.size), after, before
            )
        return not vr_load16(self.avail) & AVAIL_F_NO_INTERRUPT

    cdef void unpop_c(self, uint32_t n) noexcept nogil:
        self.next_avail -= n
        self.popped -= n

    cdef bint enable_notifications_c(self) noexcept nogil:
        if self.event_idx:
            vr_store16(self.used + 4 + 8 * <size_t>self.size, self.next_avail)
        else:
            vr_store16(self.used, 0)
        # The wish must be visible before the index is read again: the driver may have added a
        # chain after the last pop and before it could see the wish.
        vr_fence()
        return vr_load16(self.avail + 2) != self.next_avail

    cdef bint enable_notifications_after_c(self, uint16_t n) noexcept nogil:
        if n <= 1 or not self.event_idx:
            return self.enable_notifications_c()
        vr_store16(self.used + 4 + 8 * <size_t>self.size, <uint16_t>(self.next_avail + n - 1))
        vr_fence()
        return <uint16_t>(vr_load16(self.avail + 2) - self.next_avail) >= n

    cdef void disable_notifications_c(self) noexcept nogil:
        # With EVENT_IDX the event index stays behind, which asks for nothing until it is set.
        if not self.event_idx:
            vr_store16(self.used, USED_F_NO_NOTIFY)

    cdef uint32_t available_c(self) noexcept nogil:
        cdef uint32_t ready = <uint16_t>(vr_load16_acquire(self.avail + 2) - self.next_avail)
        return 0 if self.fault.code or ready > self.size else ready
