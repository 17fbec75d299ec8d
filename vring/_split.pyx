"""The device's side of split virtqueues in hostile guest memory (virtio 1.3, 2.7)."""

from __future__ import annotations

cimport cython

from vring._core cimport VR_BROKEN
from vring._dirty cimport log_entries, log_range
from vring._layout cimport (
    AVAIL_ALIGN, AVAIL_ENTRY, AVAIL_FLAGS, AVAIL_INDEX, AVAIL_RING, DESC_ALIGN, DESC_SIZE,
    USED_ALIGN, USED_ENTRY, USED_FLAGS, USED_INDEX, USED_RING, avail_event_at, avail_size,
    used_event_at, used_size
)
from vring._memory cimport GuestMemory, vr_lookup, vr_region
from vring._record cimport (
    VR_BOOKED, vr_book, vr_close_record, vr_is_open, vr_left_after, vr_read_record,
    vr_record, vr_recorded_bytes, vr_resume_record, vr_set_record
)
from vring._walk cimport (
    FAULT_AVAIL_INDEX, FAULT_FULL, FAULT_HEAD, FAULT_INDIRECT_ADDRESS, FAULT_INDIRECT_NESTED,
    FAULT_NEXT, FAULT_NONE, FAULT_ORDER, vr_add_buffer, vr_chain, vr_end_chain, vr_end_readable,
    vr_locate_table, vr_read_scattered, vr_room, vr_single, vr_start_chain, vr_walk
)
from vring._wire cimport (
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, USED_F_NO_NOTIFY, iovec,
    vr_entry, vr_fence, vr_follow, vr_likely, vr_load16, vr_load16_acquire, vr_need_event,
    vr_read_desc, vr_store16, vr_store16_release, vr_unlikely, vr_write_used
)
from vring.errors import LocalMisuseError


cdef inline bint take_plain(const vr_room* room, vr_walk* walk) noexcept nogil:
    """Take the buffer of walk.desc if it is one ordinary segment; otherwise change nothing."""
    cdef uint64_t offset = walk.desc.addr - walk.near.guest
    cdef const vr_region* near
    if offset >= walk.near.size:
        near = vr_lookup(room.memory, room.hints, walk.desc.addr)
        if vr_unlikely(near == NULL):
            return False
        walk.near = near
        offset = walk.desc.addr - near.guest
    # length - 1 refuses a length of 0
    if vr_unlikely(
        walk.segment == room.end or <uint64_t>walk.desc.len - 1 >= walk.near.size - offset
    ):
        return False
    walk.segment.iov_base = walk.near.host + offset
    walk.segment.iov_len = walk.desc.len
    walk.segment += 1
    return True


cdef inline int walk_table(
    vr_room* room, vr_walk* walk, vr_chain* chain, const uint8_t* table, uint32_t entries, bint rare
) noexcept nogil:
    """Take the buffers of a chain, starting with walk.desc, which is entry walk.at of a table.

    Stop after the last descriptor, at one that names an indirect table, or at a fault; walk.at and
    walk.desc say where. Return a vr_fault_code.

    `rare` is a constant in every call, so the compiler makes two loops. Without `rare`, a buffer
    that is not one ordinary segment ends the walk like a fault, and walk_rare starts again. That
    loop calls only vr_learn, so the walk stays in registers.
    """
    cdef int code
    while True:
        if (walk.desc.flags & (DESC_F_WRITE | DESC_F_INDIRECT)) != walk.writable:
            if walk.desc.flags & DESC_F_INDIRECT:
                return FAULT_NONE
            if vr_unlikely(walk.writable):
                return FAULT_ORDER
            walk.writable = DESC_F_WRITE
            vr_end_readable(room, walk, chain)
        if rare:
            code = vr_add_buffer(room, walk, chain)
            if code:
                return code
        elif vr_likely(take_plain(room, walk)):
            walk.bytes += walk.desc.len
        else:
            return FAULT_FULL       # of no meaning but that it is a fault
        if not walk.desc.flags & DESC_F_NEXT:
            return FAULT_NONE
        if vr_unlikely(walk.desc.next >= entries):
            return FAULT_NEXT
        walk.at = vr_follow(walk.at, walk.desc.next)
        walk.desc = vr_read_desc(table + <size_t>walk.at * DESC_SIZE)


cdef int walk_scattered(
    vr_room* room, vr_walk* walk, vr_chain* chain, uint64_t table, uint32_t entries
) noexcept nogil:
    """Do as walk_table, entry by entry, for an indirect table that crosses region borders."""
    cdef uint8_t[DESC_SIZE] entry
    cdef uint32_t at = 0
    cdef int code
    while True:
        if not vr_read_scattered(room, table, at, entry):
            walk.desc.addr = table
            walk.desc.len = entries * DESC_SIZE
            return FAULT_INDIRECT_ADDRESS
        walk.desc = vr_read_desc(entry)
        # With an empty table, every `next` is a fault.
        code = walk_table(room, walk, chain, entry, 0, True)
        walk.at = at
        if code != FAULT_NEXT or walk.desc.next >= entries:
            return code
        at = walk.desc.next


cdef int walk_rare(
    vr_room* room, vr_walk* walk, vr_chain* chain, const uint8_t* table, bint negotiated
) noexcept nogil:
    """Take a chain with an unusual or faulty descriptor, starting from its head walk.at.

    `negotiated`: whether indirect tables are negotiated. Return a vr_fault_code.
    """
    cdef const uint8_t* found = NULL
    cdef uint64_t address
    cdef uint32_t entries
    cdef int code
    walk.desc = vr_read_desc(table + <size_t>walk.at * DESC_SIZE)
    vr_start_chain(walk, chain, <uint32_t>(walk.segment - room.segments))
    code = walk_table(room, walk, chain, table, room.size, True)
    if walk.desc.flags & DESC_F_INDIRECT and not code:
        address = walk.desc.addr
        entries = walk.desc.len // DESC_SIZE
        code = vr_locate_table(room, walk, negotiated, <uint32_t>-1, &found)
        if code:
            return code
        walk.at = 0
        if found != NULL:
            walk.desc = vr_read_desc(found)
            code = walk_table(room, walk, chain, found, entries, True)
        else:
            code = walk_scattered(room, walk, chain, address, entries)
        if walk.desc.flags & DESC_F_INDIRECT and not code:
            return FAULT_INDIRECT_NESTED
    return code or vr_end_chain(room, walk, chain)


cdef uint32_t pop_singles(
    const uint8_t* heads, const uint8_t* table, uint16_t index, uint32_t ready, vr_chain* chains,
    const vr_room* room, uint64_t* max_bytes
) noexcept nogil:
    """Pop one-descriptor chains, the commonest kind, up to the first other; return their number.

    Unusual and faulty chains are left to the general walk.
    """
    cdef const vr_region* near = room.memory.regions
    cdef iovec* segment = room.segments
    cdef vr_entry desc
    cdef uint64_t offset, left = max_bytes[0]
    cdef uint32_t i, at, size = room.size
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
        # length - 1 wraps for a length of 0, which is left to the general walk
        if vr_unlikely(<uint64_t>desc.len - 1 >= near.size - offset or desc.len > left):
            ready = i
            break
        left -= desc.len
        segment[i].iov_base = near.host + offset
        segment[i].iov_len = desc.len
        vr_single(&chains[i], at, i, desc.len, desc.flags & DESC_F_WRITE)
    max_bytes[0] = left
    return ready


@cython.final
cdef class SplitQueue(VirtQueue):
    """The device's side of a split virtqueue (virtio 1.3, 2.7); arguments as of VirtQueue.

    Its indices have 16 bits and start at 0.
    """

    def __cinit__(self, *args, index=None, used_index=None, resume=False, **features):
        if self.size & (self.size - 1):
            raise LocalMisuseError(f"{self.name}: size {self.size} is not a power of two")
        self.next_avail = 0 if index is None else self.check_index(index)
        self.next_used = self.next_avail if used_index is None else self.check_index(used_index)
        self.memory = self._memory
        if resume:
            self.resume()
        elif self.record != NULL:
            vr_set_record(self.record, self.next_used, 0)

    cdef void resume(self) noexcept:
        """Continue where the ring ended; the record holds the bytes already moved."""
        cdef uint16_t used = vr_load16(self.used + USED_INDEX)
        cdef vr_record record = vr_read_record(self.record)
        cdef uint64_t left = 0      # a ring that is elsewhere is not the one that was recorded
        self.next_avail = self.next_used = used
        if vr_is_open(&record) and used == <uint16_t>record.position:
            return                  # the end knows more
        if record.state == VR_BOOKED and used == <uint16_t>record.next_position:
            left = record.next_left
        elif used == <uint16_t>record.position:
            left = vr_recorded_bytes(&record)
        vr_resume_record(self.record, &record, used, left)

    cdef int locate_rings(self, GuestMemory memory, uint8_t** rings) except -1:
        rings[0] = self.locate(
            memory, self.areas[0], self.size * DESC_SIZE, DESC_ALIGN, "descriptor table"
        )
        rings[1] = self.locate(
            memory, self.areas[1], avail_size(self.size, self.event_idx), AVAIL_ALIGN,
            "available ring"
        )
        rings[2] = self.locate(
            memory, self.areas[2], used_size(self.size, self.event_idx), USED_ALIGN, "used ring"
        )
        return 0

    cdef void place_rings(self, uint8_t* const* rings) noexcept nogil:
        self.desc, self.avail, self.used = rings[0], rings[1], rings[2]

    cdef void restart(self) noexcept:
        self.next_avail = self.next_used = 0

    @property
    def avail_index(self):
        """Next available index to pop (0 to 65535)."""
        return self.next_avail

    @property
    def used_index(self):
        """Next used index to publish (0 to 65535)."""
        return self.next_used

    cdef int pop_within(
        self, vr_chain* chains, uint32_t max_chains, iovec* segments, uint32_t max_segments,
        uint64_t max_bytes
    ) noexcept nogil:
        cdef const uint8_t* heads = self.avail + AVAIL_RING
        cdef const uint8_t* table = self.desc
        cdef uint32_t size = self.size, i = 0, ready, head, entries
        cdef const uint8_t* found
        cdef iovec* first
        cdef vr_walk copy
        cdef uint16_t index = self.next_avail
        cdef vr_chain* chain
        cdef vr_room room
        cdef vr_walk walk
        cdef int code = 0
        ready = <uint16_t>(vr_load16_acquire(self.avail + AVAIL_INDEX) - index)
        if self.fault.code:
            return VR_BROKEN
        # Chains in flight still occupy descriptors, so the driver cannot add a whole ring.
        if ready + (self.popped - self.pushed) > size:
            return self.fail(FAULT_AVAIL_INDEX, <uint16_t>(index + ready), 0, 0)
        ready = min(ready, max_chains)
        room.memory = &self.map
        room.hints = self.hints
        room.size = size
        room.extra = 0
        room.work = 0
        room.odd = False
        room.segments = segments
        room.end = segments + max_segments
        walk.near = self.map.regions
        i = pop_singles(
            heads, table, index, min(ready, max_segments), chains, &room, &max_bytes
        )
        walk.segment = segments + i
        while i < ready:
            chain = &chains[i]
            head = vr_load16(heads + AVAIL_ENTRY * <size_t>((index + i) & (size - 1)))
            if vr_unlikely(head >= size):
                if i == 0:
                    return self.fail(FAULT_HEAD, head, 0, 0)
                break
            first = walk.segment
            chain.head = head
            chain.descriptors = 1
            vr_start_chain(&walk, chain, <uint32_t>(first - segments))
            walk.at = head
            walk.desc = vr_read_desc(table + <size_t>head * DESC_SIZE)
            found = table
            entries = size
            if walk.desc.flags & DESC_F_INDIRECT:
                found = NULL
                entries = walk.desc.len // DESC_SIZE
                vr_locate_table(&room, &walk, self.indirect, <uint32_t>-1, &found)
                if vr_likely(found != NULL):
                    walk.at = 0
                    walk.desc = vr_read_desc(found)
            code = FAULT_FULL
            if vr_likely(found != NULL):
                code = walk_table(&room, &walk, chain, found, entries, False)
                code |= walk.desc.flags & DESC_F_INDIRECT
            if vr_likely(not code):
                code = vr_end_chain(&room, &walk, chain)
            else:
                # A copy, since the walk of this loop must not leave the registers.
                copy = walk
                copy.at = head
                copy.segment = first
                code = walk_rare(&room, &copy, chain, table, self.indirect)
                walk = copy
            if vr_unlikely(code):
                break
            if vr_unlikely(walk.bytes > max_bytes):
                if i:
                    break
                max_bytes = walk.bytes
            max_bytes -= walk.bytes
            i += 1
        # Valid chains are returned first; the next pop meets the broken chain, or table, again.
        if code and i == 0:
            return self.chain_fault(code, walk.at, walk.desc.addr, walk.desc.len)
        self.next_avail = index + i
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
        if vr_unlikely(self.record != NULL):
            vr_book(self.record, after, vr_left_after(&self.accounted, chains, written, n))
        vr_store16_release(self.used + USED_INDEX, after)
        self.next_used = after
        self.pushed += n
        if vr_unlikely(self.record != NULL):
            vr_close_record(self.record)
        if vr_unlikely(self.log != NULL):
            log_entries(
                self.log, self.log_device + USED_RING, USED_ENTRY, self.size, before & mask, n
            )
            log_range(self.log, self.log_device, USED_RING)
        # The index must be visible before the driver's setting is read, or both sides may sleep.
        vr_fence()
        if self.event_idx:
            return vr_need_event(
                vr_load16(self.avail + used_event_at(self.size)), after, before
            )
        return not vr_load16(self.avail + AVAIL_FLAGS) & AVAIL_F_NO_INTERRUPT

    cdef void unpop_c(self, uint32_t n) noexcept nogil:
        self.next_avail -= n
        self.popped -= n

    cdef void ask(self, uint16_t event, uint16_t flags) noexcept nogil:
        """Write whether kicks are wanted: an event index where that is negotiated, else flags."""
        cdef size_t at = avail_event_at(self.size) if self.event_idx else USED_FLAGS
        vr_store16(self.used + at, event if self.event_idx else flags)
        if vr_unlikely(self.log != NULL):
            log_range(self.log, self.log_device + at, sizeof(uint16_t))

    cdef bint enable_notifications_c(self) noexcept nogil:
        self.ask(self.next_avail, 0)
        # The setting must be visible before the index is read again: the driver may have added a
        # chain after the last pop and before it could see the setting.
        vr_fence()
        return vr_load16(self.avail + AVAIL_INDEX) != self.next_avail

    cdef bint enable_notifications_after_c(self, uint16_t n) noexcept nogil:
        if n <= 1 or not self.event_idx:
            return self.enable_notifications_c()
        self.ask(<uint16_t>(self.next_avail + n - 1), 0)
        vr_fence()
        return <uint16_t>(vr_load16(self.avail + AVAIL_INDEX) - self.next_avail) >= n

    cdef void disable_notifications_c(self) noexcept nogil:
        # With EVENT_IDX the event index stays behind, which asks for no kick until it is set.
        if not self.event_idx:
            self.ask(0, USED_F_NO_NOTIFY)

    cdef uint32_t available_c(self) noexcept nogil:
        cdef uint32_t ready = <uint16_t>(
            vr_load16_acquire(self.avail + AVAIL_INDEX) - self.next_avail
        )
        return 0 if self.fault.code or ready > self.size else ready
