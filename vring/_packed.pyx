"""The device's side of packed virtqueues in hostile guest memory (virtio 1.3, 2.8)."""

from __future__ import annotations

cimport cython
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc

from vring._core cimport VR_BROKEN
from vring._dirty cimport log_entries, log_range
from vring._layout cimport DESC_ALIGN, DESC_SIZE, EVENT_ALIGN, EVENT_SIZE, PACKED_FLAGS, WRAP
from vring._memory cimport GuestMemory, vr_lookup, vr_region
from vring._record cimport (
    VR_BOOKED, vr_book, vr_close_record, vr_is_open, vr_read_record, vr_record,
    vr_recorded_bytes, vr_resume_record, vr_set_record
)
from vring._walk cimport (
    FAULT_AVAIL_INDEX, FAULT_INDIRECT_ADDRESS, FAULT_INDIRECT_NESTED, FAULT_INDIRECT_NEXT,
    FAULT_NONE, FAULT_ORDER, FAULT_TOO_LONG, vr_add_buffer, vr_chain, vr_end_chain, vr_end_readable,
    vr_locate_table, vr_read_scattered, vr_room, vr_single, vr_start_chain, vr_walk
)
from vring._wire cimport (
    DESC_F_AVAIL, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_USED, DESC_F_WRITE, EVENT_DESC,
    EVENT_DISABLE, EVENT_ENABLE, iovec, vr_entry, vr_fence, vr_likely, vr_load16_acquire,
    vr_load32, vr_need_event, vr_read_packed, vr_store32, vr_unlikely, vr_write_packed_used
)
from vring.errors import LocalMisuseError


cdef inline bint is_available(uint32_t flags, bint wrap) noexcept nogil:
    """Return whether a descriptor's flags mark it as available (2.8.1)."""
    return ((flags & DESC_F_AVAIL) != 0) == wrap and ((flags & DESC_F_USED) != 0) != wrap


cdef inline int take_buffer(vr_room* room, vr_walk* walk, vr_chain* chain) noexcept nogil:
    """Take the buffer of walk.desc, which is not indirect. Return a vr_fault_code."""
    if (walk.desc.flags & DESC_F_WRITE) != walk.writable:
        if vr_unlikely(walk.writable):
            return FAULT_ORDER
        walk.writable = DESC_F_WRITE
        vr_end_readable(room, walk, chain)
    return vr_add_buffer(room, walk, chain)


cdef uint32_t pop_singles(
    const uint8_t* ring, uint32_t* at, bint* at_wrap, uint32_t limit, vr_chain* chains,
    const vr_room* room, iovec* segments
) noexcept nogil:
    """Pop one-descriptor chains, the commonest kind, up to the first other; return their number.

    Unusual and faulty chains are left to the general loop. Advances the slot and the wrap counter.
    """
    cdef const vr_region* near = room.memory.regions
    cdef uint32_t i, slot = at[0], size = room.size
    cdef bint wrap = at_wrap[0]
    cdef uint32_t expected = DESC_F_AVAIL if wrap else DESC_F_USED
    cdef uint32_t flags
    cdef const uint8_t* entry
    cdef vr_entry desc
    cdef uint64_t offset
    for i in range(limit):
        entry = ring + <size_t>slot * DESC_SIZE
        # The driver writes the flags last, so read them first.
        flags = vr_load16_acquire(entry + PACKED_FLAGS)
        if flags & (DESC_F_AVAIL | DESC_F_USED | DESC_F_NEXT | DESC_F_INDIRECT) != expected:
            limit = i
            break
        desc = vr_read_packed(entry)
        offset = desc.addr - near.guest
        if offset >= near.size:
            near = vr_lookup(room.memory, room.hints, desc.addr)
            if vr_unlikely(near == NULL):
                limit = i
                break
            offset = desc.addr - near.guest
        # length - 1 wraps for a length of 0, which is left to the general loop
        if vr_unlikely(<uint64_t>desc.len - 1 >= near.size - offset):
            limit = i
            break
        segments[i].iov_base = near.host + offset
        segments[i].iov_len = desc.len
        vr_single(&chains[i], desc.id, i, desc.len, flags & DESC_F_WRITE)
        slot += 1
        if vr_unlikely(slot == size):
            slot = 0
            wrap = not wrap
            expected ^= DESC_F_AVAIL | DESC_F_USED
    at[0] = slot
    at_wrap[0] = wrap
    return limit


cdef inline int walk_table(
    vr_room* room, vr_walk* walk, vr_chain* chain, const uint8_t* table, uint32_t entries
) noexcept nogil:
    """Take the buffers of all entries of an indirect table. Return a vr_fault_code."""
    cdef int code
    cdef uint32_t i
    for i in range(entries):
        walk.desc = vr_read_packed(table + <size_t>i * DESC_SIZE)
        # 2.8.19: only WRITE has a meaning in an indirect table
        if vr_unlikely(walk.desc.flags & DESC_F_INDIRECT):
            return FAULT_INDIRECT_NESTED
        code = take_buffer(room, walk, chain)
        if vr_unlikely(code):
            return code
    return FAULT_NONE


cdef int walk_scattered(
    vr_room* room, vr_walk* walk, vr_chain* chain, uint64_t table, uint32_t entries
) noexcept nogil:
    """Do as walk_table, entry by entry, for a table that crosses region borders."""
    cdef uint8_t[DESC_SIZE] entry
    cdef uint32_t i
    cdef int code
    for i in range(entries):
        if not vr_read_scattered(room, table, i, entry):
            walk.desc.addr = table
            walk.desc.len = entries * DESC_SIZE
            return FAULT_INDIRECT_ADDRESS
        code = walk_table(room, walk, chain, entry, 1)
        if code:
            return code
    return FAULT_NONE


cdef inline int walk_indirect(
    vr_room* room, vr_walk* walk, vr_chain* chain, bint negotiated
) noexcept nogil:
    """Take the buffers of the indirect table that walk.desc names. Return a vr_fault_code."""
    cdef uint64_t address = walk.desc.addr
    cdef uint32_t entries = walk.desc.len // DESC_SIZE
    cdef const uint8_t* table = NULL
    cdef vr_walk copy
    cdef int code = vr_locate_table(room, walk, negotiated, room.size, &table)
    if vr_unlikely(code):
        return code
    if vr_likely(table != NULL):
        return walk_table(room, walk, chain, table, entries)
    copy = walk[0]
    code = walk_scattered(room, &copy, chain, address, entries)
    walk[0] = copy
    return code


@cython.final
cdef class PackedQueue(VirtQueue):
    """The device's side of a packed virtqueue (virtio 1.3, 2.8); arguments as of VirtQueue.

    Its indices hold a slot of the ring (bits 0 to 14) and a wrap counter (bit 15). They start at
    0x8000: slot 0, wrap counter 1.
    """

    def __cinit__(self, *args, index=None, used_index=None, resume=False, **features):
        cdef uint32_t avail_at = WRAP if index is None else self.check_index(index)
        cdef uint32_t used_at = avail_at if used_index is None else self.check_index(used_index)
        self.next_avail = avail_at & ~<uint32_t>WRAP
        self.next_used = used_at & ~<uint32_t>WRAP
        self.avail_wrap = (avail_at & WRAP) != 0
        self.used_wrap = (used_at & WRAP) != 0
        if max(self.next_avail, self.next_used) >= self.size:
            raise LocalMisuseError(
                f"{self.name}: index {avail_at:#x} or {used_at:#x} is not in a ring of {self.size}"
            )
        self.taken = <uint16_t*>PyMem_RawMalloc(self.size * sizeof(uint16_t))
        if self.taken == NULL:
            raise MemoryError
        self.memory = self._memory
        if resume:
            self.resume()
        elif self.record != NULL:
            vr_set_record(self.record, self.used_index, 0)

    cdef int resume(self) except -1:
        """Continue where the record says, if the ring confirms it."""
        cdef vr_record record = vr_read_record(self.record)
        cdef uint64_t at = record.position, left = vr_recorded_bytes(&record)
        cdef uint32_t flags
        if at > 0xFFFF or (at & ~<uint64_t>WRAP) >= self.size:
            raise LocalMisuseError(f"{self.name}: the record says {at:#x}, which is no place in it")
        if record.state == VR_BOOKED:
            flags = vr_load16_acquire(
                self.ring + <size_t>(at & ~<uint64_t>WRAP) * DESC_SIZE + PACKED_FLAGS
            )
            if record.next_position == at or not is_available(flags, (at & WRAP) != 0):
                at = record.next_position
                left = record.next_left
        if at > 0xFFFF or (at & ~<uint64_t>WRAP) >= self.size:
            raise LocalMisuseError(f"{self.name}: the record says {at:#x}, which is no place in it")
        self.next_avail = self.next_used = at & ~<uint64_t>WRAP
        self.avail_wrap = self.used_wrap = (at & WRAP) != 0
        if not vr_is_open(&record):     # else the end knows more
            vr_resume_record(self.record, &record, at, left)
        return 0

    def __dealloc__(self):
        PyMem_RawFree(self.taken)

    cdef int locate_rings(self, GuestMemory memory, uint8_t** rings) except -1:
        rings[0] = self.locate(
            memory, self.areas[0], self.size * DESC_SIZE, DESC_ALIGN, "descriptor ring"
        )
        rings[1] = self.locate(
            memory, self.areas[1], EVENT_SIZE, EVENT_ALIGN, "driver event area"
        )
        rings[2] = self.locate(
            memory, self.areas[2], EVENT_SIZE, EVENT_ALIGN, "device event area"
        )
        return 0

    cdef void place_rings(self, uint8_t* const* rings) noexcept nogil:
        self.ring, self.driver_event, self.device_event = rings[0], rings[1], rings[2]

    cdef void restart(self) noexcept:
        self.next_avail = self.next_used = self.slots_in_flight = self.next_taken = 0
        self.avail_wrap = self.used_wrap = True

    @property
    def avail_index(self):
        """Next descriptor to pop (bits 0 to 14) and available wrap counter (bit 15)."""
        return self.next_avail | (WRAP if self.avail_wrap else 0)

    @property
    def used_index(self):
        """Next descriptor to use (bits 0 to 14) and used wrap counter (bit 15)."""
        return self.next_used | (WRAP if self.used_wrap else 0)

    @property
    def vring_base(self):
        """`avail_index` in bits 0 to 15, `used_index` in bits 16 to 31 (GET_VRING_BASE)."""
        return self.avail_index | self.used_index << 16

    cdef int pop_within(
        self, vr_chain* chains, uint32_t max_chains, iovec* segments, uint32_t max_segments,
        uint64_t max_bytes
    ) noexcept nogil:
        cdef uint32_t slot = self.next_avail, size = self.size, i = 0, slots, room_left, flags
        cdef uint32_t after
        cdef bint wrap = self.avail_wrap, after_wrap
        cdef const uint8_t* ring = self.ring
        cdef vr_chain* chain
        cdef vr_room room
        cdef vr_walk walk
        cdef int code = 0
        if self.fault.code:
            return VR_BROKEN
        room.memory = &self.map
        room.hints = self.hints
        room.size = size
        room.extra = 0
        room.work = 0
        room.odd = False
        room.segments = segments
        room.end = segments + max_segments
        room_left = size - self.slots_in_flight
        if max_bytes == <uint64_t>-1:
            i = pop_singles(
                ring, &slot, &wrap, min(max_chains, min(max_segments, room_left)), chains, &room,
                segments
            )
            room_left -= i
            self.note_taken(i, 1)
        walk.near = self.map.regions
        walk.segment = segments + i
        while i < max_chains:
            # The flags of a chain's first descriptor are written last: read them first.
            flags = vr_load16_acquire(ring + <size_t>slot * DESC_SIZE + PACKED_FLAGS)
            if not is_available(flags, wrap):
                break
            chain = &chains[i]
            vr_start_chain(&walk, chain, <uint32_t>(walk.segment - segments))
            after = slot
            after_wrap = wrap
            slots = 0
            while True:
                walk.at = after
                walk.desc = vr_read_packed(ring + <size_t>after * DESC_SIZE)
                if slots == 0:
                    walk.desc.flags = flags
                # Chains in flight still occupy their slots.
                if vr_unlikely(slots == room_left):
                    code = FAULT_TOO_LONG if slots else FAULT_AVAIL_INDEX
                    break
                slots += 1
                after += 1
                if after == size:
                    after = 0
                    after_wrap = not after_wrap
                flags = walk.desc.flags
                chain.head = <uint16_t>walk.desc.id
                if flags & DESC_F_INDIRECT:
                    if slots > 1:
                        code = FAULT_INDIRECT_NEXT
                    else:
                        code = walk_indirect(&room, &walk, chain, self.indirect)
                    break
                code = take_buffer(&room, &walk, chain)
                if vr_unlikely(code) or not flags & DESC_F_NEXT:
                    break
            if vr_likely(not code):
                code = vr_end_chain(&room, &walk, chain)
            if vr_unlikely(code):
                break
            if vr_unlikely(walk.bytes > max_bytes):
                if i:
                    break
                max_bytes = walk.bytes
            max_bytes -= walk.bytes
            chain.descriptors = <uint16_t>slots
            self.note_taken(1, <uint16_t>slots)
            room_left -= slots
            slot = after
            wrap = after_wrap
            i += 1
        # Valid chains are returned first; the next pop meets the broken chain, or table, again.
        if code and i == 0:
            return self.chain_fault(code, walk.at, walk.desc.addr, walk.desc.len)
        self.next_avail = slot
        self.avail_wrap = wrap
        self.slots_in_flight = size - room_left
        self.popped += i
        return i

    cdef void note_taken(self, uint32_t n, uint16_t slots) noexcept nogil:
        """Record for unpop that n chains of `slots` slots each were popped."""
        cdef uint16_t* taken = self.taken
        cdef uint32_t at = self.next_taken, size = self.size, i
        cdef uint32_t straight = min(n, size - at)
        for i in range(straight):
            taken[at + i] = slots
        for i in range(n - straight):
            taken[i] = slots
        at += n
        self.next_taken = at if at < size else at - size

    cdef bint push_c(
        self, const vr_chain* chains, const uint32_t* written, uint32_t n
    ) noexcept nogil:
        cdef uint32_t first = self.next_used, slot = first, size = self.size, i, length
        cdef uint32_t slots = 0
        cdef uint8_t* ring = self.ring
        cdef bint wrap = self.used_wrap, first_wrap = wrap
        if n == 0:
            return False
        if vr_unlikely(self.record != NULL):
            return self.push_recorded(chains, written, n)
        for i in range(n):
            if i:
                length = written[i] if written != NULL else 0
                vr_write_packed_used(
                    ring + <size_t>slot * DESC_SIZE, length, chains[i].head,
                    used_flags(wrap, length)
                )
            slots += chains[i].descriptors
            slot += chains[i].descriptors
            if slot >= size:
                slot -= size
                wrap = not wrap
        # The driver reads in order: the first descriptor publishes all others, so write it last.
        length = written[0] if written != NULL else 0
        vr_write_packed_used(
            ring + <size_t>first * DESC_SIZE, length, chains[0].head,
            used_flags(first_wrap, length)
        )
        self.next_used = slot
        self.used_wrap = wrap
        self.slots_in_flight -= slots
        self.pushed += n
        if vr_unlikely(self.log != NULL):
            log_entries(self.log, self.areas[0], DESC_SIZE, size, first, slots)
        # Used descriptors must be visible before the driver's setting is read, or both may sleep.
        vr_fence()
        return self.wanted(slots)

    cdef bint push_recorded(
        self, const vr_chain* chains, const uint32_t* written, uint32_t n
    ) noexcept nogil:
        """Do as push_c, chain by chain.

        A successor could not pop the rest of a half-published batch again, since used descriptors
        overwrite those of the driver.
        """
        cdef uint32_t first = self.next_used, slot = first, size = self.size, slots = 0, i
        cdef uint32_t length, after
        cdef bint wrap = self.used_wrap, after_wrap
        cdef uint64_t left = self.accounted, bytes
        self.accounted = 0
        for i in range(n):
            length = written[i] if written != NULL else 0
            bytes = length if written != NULL else chains[i].readable_bytes
            left -= min(left, bytes)
            slots += chains[i].descriptors
            after = slot + chains[i].descriptors
            after_wrap = wrap
            if after >= size:
                after -= size
                after_wrap = not wrap
            vr_book(self.record, after | (WRAP if after_wrap else 0), left)
            vr_write_packed_used(
                self.ring + <size_t>slot * DESC_SIZE, length, chains[i].head,
                used_flags(wrap, length)
            )
            vr_close_record(self.record)
            slot = after
            wrap = after_wrap
        self.next_used = slot
        self.used_wrap = wrap
        self.slots_in_flight -= slots
        self.pushed += n
        if vr_unlikely(self.log != NULL):
            log_entries(self.log, self.areas[0], DESC_SIZE, size, first, slots)
        vr_fence()
        return self.wanted(slots)

    cdef bint wanted(self, uint32_t slots) noexcept nogil:
        """Return whether the driver wants a notification for the last `slots` slots (2.8.14)."""
        cdef uint32_t event = vr_load32(self.driver_event)
        cdef uint32_t flags = event >> 16 & 3
        cdef uint16_t offset = event & 0x7FFF
        if not self.event_idx or flags != EVENT_DESC:
            return flags != EVENT_DISABLE
        if ((event & WRAP) != 0) != self.used_wrap:
            offset -= self.size
        return vr_need_event(offset, self.next_used, <uint16_t>(self.next_used - slots))

    cdef void unpop_c(self, uint32_t n) noexcept nogil:
        cdef uint32_t slots
        self.popped -= n
        while n:
            n -= 1
            self.next_taken = (self.next_taken or self.size) - 1
            slots = self.taken[self.next_taken]
            self.slots_in_flight -= slots
            if slots > self.next_avail:
                self.next_avail += self.size
                self.avail_wrap = not self.avail_wrap
            self.next_avail -= slots

    cdef bint ready(self) noexcept nogil:
        return is_available(
            vr_load16_acquire(self.ring + <size_t>self.next_avail * DESC_SIZE + PACKED_FLAGS),
            self.avail_wrap
        )

    cdef void ask(self, uint32_t event) noexcept nogil:
        """Write whether kicks are wanted: the device event suppression structure (2.8.14)."""
        vr_store32(self.device_event, event)
        if vr_unlikely(self.log != NULL):
            log_range(self.log, self.log_device, EVENT_SIZE)

    cdef bint enable_notifications_c(self) noexcept nogil:
        cdef uint32_t event = EVENT_ENABLE << 16
        if self.event_idx:
            event = EVENT_DESC << 16 | self.next_avail | (WRAP if self.avail_wrap else 0)
        self.ask(event)
        # The setting must be visible before the ring is read again: the driver may have added a
        # chain after the last pop and before it could see the setting.
        vr_fence()
        return self.ready()

    cdef void disable_notifications_c(self) noexcept nogil:
        self.ask(EVENT_DISABLE << 16)

    cdef uint32_t available_c(self) noexcept nogil:
        return 0 if self.fault.code else self.ready()


cdef inline uint16_t used_flags(bint wrap, uint32_t length) noexcept nogil:
    return (DESC_F_AVAIL | DESC_F_USED if wrap else 0) | (DESC_F_WRITE if length else 0)
