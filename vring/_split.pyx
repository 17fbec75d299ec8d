"""The device's side of split virtqueues in hostile guest memory (virtio 1.3, 2.7)."""

from __future__ import annotations

cimport cython

from vring._core cimport VR_BROKEN
from vring._layout cimport (
    AVAIL_ALIGN, AVAIL_ENTRY, AVAIL_FLAGS, AVAIL_INDEX, AVAIL_RING, DESC_ALIGN, DESC_SIZE,
    USED_ALIGN, USED_ENTRY, USED_FLAGS, USED_INDEX, USED_RING, avail_event_at, avail_size,
    used_event_at, used_size
)
from vring._memory cimport GuestMemory, vr_lookup, vr_region
from vring._walk cimport (
    FAULT_AVAIL_INDEX, FAULT_HEAD, FAULT_INDIRECT_ADDRESS, FAULT_INDIRECT_NESTED, FAULT_NEXT,
    FAULT_NONE, FAULT_ORDER, vr_add_buffer, vr_chain, vr_end_chain, vr_end_readable,
    vr_locate_table, vr_read_scattered, vr_room, vr_single, vr_start_chain, vr_walk
)
from vring._wire cimport (
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, USED_F_NO_NOTIFY, iovec,
    vr_entry, vr_fence, vr_follow, vr_likely, vr_load16, vr_load16_acquire, vr_need_event,
    vr_read_desc, vr_store16, vr_store16_release, vr_unlikely, vr_write_used
)
from vring.errors import LocalMisuseError


cdef struct vr_avail:
    # What a pop takes chains from.
    const uint8_t* heads        # the available ring
    const uint8_t* table        # descriptors
    uint32_t ready              # chains to take
    uint16_t index              # of the first
    bint indirect               # whether indirect tables are negotiated


cdef int walk_table(
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
        if not vr_read_scattered(room, table, at, entry):
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


cdef int walk_indirect(
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


cdef int walk_chain(
    vr_room* room, vr_walk* walk, vr_chain* chain, const vr_avail* avail
) noexcept nogil:
    """Any chain, from its head in walk.at on. Returns a vr_fault_code."""
    cdef int code
    vr_start_chain(walk, chain, <uint32_t>(walk.segment - room.segments))
    code = walk_table(room, walk, chain, avail.table, room.size)
    if walk.desc.flags & DESC_F_INDIRECT and not code:
        code = walk_indirect(room, walk, chain, avail.indirect)
    return code or vr_end_chain(room, walk, chain)


cdef uint32_t pop_singles(
    const vr_avail* avail, vr_chain* chains, const vr_room* room, iovec** segments
) noexcept nogil:
    """Pops one-descriptor chains, the most common, up to the first of another kind; how many."""
    cdef const vr_region* near = room.memory.regions
    cdef const uint8_t* heads = avail.heads
    cdef const uint8_t* table = avail.table
    cdef iovec* segment = segments[0]
    cdef vr_entry desc
    cdef uint64_t offset
    cdef uint32_t i, at, size = room.size, index = avail.index
    cdef uint32_t ready = min(avail.ready, <uint32_t>(room.end - segment))
    for i in range(ready):
        at = vr_load16(heads + AVAIL_ENTRY * <size_t>((index + i) & (size - 1)))
        if vr_unlikely(at >= size):
            ready = i
            break
        desc = vr_read_desc(table + <size_t>at * DESC_SIZE)
        if desc.flags & (DESC_F_NEXT | DESC_F_INDIRECT):
            ready = i
            break
        offset = desc.addr - near.guest
        if offset >= near.size:
            near = vr_lookup(room.memory, room.hints, desc.addr)
            if vr_unlikely(near == NULL):
                ready = i
                break
            offset = desc.addr - near.guest
        # length - 1 leaves a length of 0 to the other ways
        if vr_unlikely(<uint64_t>desc.len - 1 >= near.size - offset):
            ready = i
            break
        segment[i].iov_base = near.host + offset
        segment[i].iov_len = desc.len
        vr_single(&chains[i], at, i, desc.len, desc.flags & DESC_F_WRITE)
    segments[0] += ready
    return ready


cdef uint32_t pop_plain(
    const vr_avail* avail, uint32_t i, vr_chain* chains, const vr_room* room, iovec** segments,
    uint64_t* max_bytes
) noexcept nogil:
    """Pops chains from number i on, up to the first that has anything unusual or wrong about it:
    that is left to the loop over all kinds. Returns the number of the chain reached.

    Few variables live at a time, so that all of them are in registers.
    """
    cdef const vr_region* near = room.memory.regions
    cdef const uint8_t* table
    cdef iovec* segment = segments[0]
    cdef iovec* first
    cdef const iovec* last
    cdef vr_entry desc
    cdef uint64_t offset, total
    cdef uint32_t at, entries, writable
    cdef bint whole
    cdef vr_chain* chain = chains + i
    while i < avail.ready:
        at = vr_load16(avail.heads + AVAIL_ENTRY * <size_t>((avail.index + i) & (room.size - 1)))
        table = avail.table
        entries = room.size
        if vr_unlikely(at >= entries):
            break
        chain.head = at
        chain.descriptors = 1
        chain.first_segment = <uint32_t>(segment - room.segments)
        desc = vr_read_desc(table + <size_t>at * DESC_SIZE)
        if desc.flags & DESC_F_INDIRECT:
            if vr_unlikely(
                not avail.indirect or desc.flags & DESC_F_NEXT or desc.len % DESC_SIZE
                or desc.len == 0
            ):
                break
            offset = desc.addr - near.guest
            if offset >= near.size:
                near = vr_lookup(room.memory, room.hints, desc.addr)
                if vr_unlikely(near == NULL):
                    break
                offset = desc.addr - near.guest
            if vr_unlikely(desc.len > near.size - offset):
                break
            table = near.host + offset
            entries = desc.len // DESC_SIZE
            at = 0
            desc = vr_read_desc(table)
        first = segment
        # A chain that has no end meets this one.
        last = min(room.end, <const iovec*>segment + room.size)
        total = 0
        writable = 0
        whole = False
        while True:
            if (desc.flags & (DESC_F_WRITE | DESC_F_INDIRECT)) != writable:
                if vr_unlikely(writable or desc.flags & DESC_F_INDIRECT):
                    break
                writable = DESC_F_WRITE
                chain.n_readable = <uint32_t>(segment - first)
                chain.readable_bytes = <uint32_t>total
            offset = desc.addr - near.guest
            if offset >= near.size:
                near = vr_lookup(room.memory, room.hints, desc.addr)
                if vr_unlikely(near == NULL):
                    break
                offset = desc.addr - near.guest
            # length - 1 leaves a length of 0 to the other way
            if vr_unlikely(segment == last or <uint64_t>desc.len - 1 >= near.size - offset):
                break
            segment.iov_base = near.host + offset
            segment.iov_len = desc.len
            segment += 1
            total += desc.len
            if not desc.flags & DESC_F_NEXT:
                whole = True
                break
            if vr_unlikely(desc.next >= entries):
                break
            at = vr_follow(at, desc.next)
            desc = vr_read_desc(table + <size_t>at * DESC_SIZE)
        if vr_unlikely(not whole or total > max_bytes[0] or total >> 32):
            segment = first
            break
        max_bytes[0] -= total
        if writable:
            chain.n_writable = <uint32_t>(segment - first) - chain.n_readable
            chain.writable_bytes = <uint32_t>total - chain.readable_bytes
        else:
            chain.n_readable = <uint32_t>(segment - first)
            chain.n_writable = 0
            chain.readable_bytes = <uint32_t>total
            chain.writable_bytes = 0
        chain += 1
        i += 1
    segments[0] = segment
    return i


@cython.final
cdef class SplitQueue(VirtQueue):
    """The device's side of a split virtqueue (virtio 1.3, 2.7); made as VirtQueue says.

    Its indices are of 16 bits and start at 0.
    """

    def __cinit__(self, *args, index=None, used_index=None, **features):
        if self.size & (self.size - 1):
            raise LocalMisuseError(f"{self.name}: size {self.size} is not a power of two")
        self.next_avail = 0 if index is None else self.check_index(index)
        self.next_used = self.next_avail if used_index is None else self.check_index(used_index)
        self.memory = self._memory

    cdef int locate_rings(self, GuestMemory memory) except -1:
        cdef uint8_t* desc = self.locate(
            memory, self.areas[0], self.size * DESC_SIZE, DESC_ALIGN, "descriptor table"
        )
        cdef uint8_t* avail = self.locate(
            memory, self.areas[1], avail_size(self.size, self.event_idx), AVAIL_ALIGN,
            "available ring"
        )
        cdef uint8_t* used = self.locate(
            memory, self.areas[2], used_size(self.size, self.event_idx), USED_ALIGN, "used ring"
        )
        self.desc = desc
        self.avail = avail
        self.used = used
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
        cdef vr_avail avail
        cdef vr_chain* chain
        cdef vr_room room
        cdef vr_walk walk
        cdef uint32_t i = 0
        cdef int code = 0
        avail.index = self.next_avail
        avail.ready = <uint16_t>(vr_load16_acquire(self.avail + AVAIL_INDEX) - avail.index)
        avail.heads = self.avail + AVAIL_RING
        avail.table = self.desc
        avail.indirect = self.indirect
        if self.fault.code:
            return VR_BROKEN
        # What is in flight still occupies descriptors, so the driver cannot add a whole ring.
        if avail.ready + (self.popped - self.pushed) > self.size:
            return self.fail(FAULT_AVAIL_INDEX, <uint16_t>(avail.index + avail.ready), 0, 0)
        avail.ready = min(avail.ready, max_chains)
        room.memory = &self.map
        room.hints = self.hints
        room.size = self.size
        room.extra = 0
        room.work = 0
        room.odd = False
        room.segments = segments
        room.end = segments + max_segments
        if max_bytes == <uint64_t>-1:
            i = pop_singles(&avail, chains, &room, &segments)
        while i < avail.ready:
            i = pop_plain(&avail, i, chains, &room, &segments, &max_bytes)
            if vr_likely(i == avail.ready):
                break
            walk.at = vr_load16(
                avail.heads + AVAIL_ENTRY * <size_t>((avail.index + i) & (self.size - 1))
            )
            if walk.at < self.size:
                chain = &chains[i]
                chain.head = walk.at
                chain.descriptors = 1
                walk.near = self.map.regions
                walk.segment = segments
                code = walk_chain(&room, &walk, chain, &avail)
            else:
                code = FAULT_HEAD
            if code:
                break
            if walk.bytes > max_bytes:
                if i:
                    break
                max_bytes = walk.bytes
            max_bytes -= walk.bytes
            segments = walk.segment
            i += 1
        # What is sound comes first; the next pop meets the broken chain again, or the bigger table.
        if code and i == 0:
            return self.chain_fault(code, walk.at, walk.desc.addr, walk.desc.len)
        self.next_avail = avail.index + i
        self.popped += i
        return i

    cdef bint push_c(
        self, const vr_chain* chains, const uint32_t* written, uint32_t n
    ) noexcept nogil:
        cdef uint16_t before = self.next_used
        cdef uint16_t after = before + n
        cdef uint32_t mask = self.size - 1
        cdef uint32_t i
        cdef uint8_t* elements = self.used + USED_RING
        for i in range(n):
            vr_write_used(
                elements + USED_ENTRY * <size_t>((before + i) & mask), chains[i].head,
                written[i] if written != NULL else 0
            )
        vr_store16_release(self.used + USED_INDEX, after)
        self.next_used = after
        self.pushed += n
        # The index must be visible before the driver's wish is read, or both sides may sleep.
        vr_fence()
        if self.event_idx:
            return vr_need_event(
                vr_load16(self.avail + used_event_at(self.size)), after, before
            )
        return not vr_load16(self.avail + AVAIL_FLAGS) & AVAIL_F_NO_INTERRUPT

    cdef void unpop_c(self, uint32_t n) noexcept nogil:
        self.next_avail -= n
        self.popped -= n

    cdef bint enable_notifications_c(self) noexcept nogil:
        if self.event_idx:
            vr_store16(self.used + avail_event_at(self.size), self.next_avail)
        else:
            vr_store16(self.used + USED_FLAGS, 0)
        # The wish must be visible before the index is read again: the driver may have added a
        # chain after the last pop and before it could see the wish.
        vr_fence()
        return vr_load16(self.avail + AVAIL_INDEX) != self.next_avail

    cdef bint enable_notifications_after_c(self, uint16_t n) noexcept nogil:
        if n <= 1 or not self.event_idx:
            return self.enable_notifications_c()
        vr_store16(self.used + avail_event_at(self.size), <uint16_t>(self.next_avail + n - 1))
        vr_fence()
        return <uint16_t>(vr_load16(self.avail + AVAIL_INDEX) - self.next_avail) >= n

    cdef void disable_notifications_c(self) noexcept nogil:
        # With EVENT_IDX the event index stays behind, which asks for nothing until it is set.
        if not self.event_idx:
            vr_store16(self.used + USED_FLAGS, USED_F_NO_NOTIFY)

    cdef uint32_t available_c(self) noexcept nogil:
        cdef uint32_t ready = <uint16_t>(
            vr_load16_acquire(self.avail + AVAIL_INDEX) - self.next_avail
        )
        return 0 if self.fault.code or ready > self.size else ready
