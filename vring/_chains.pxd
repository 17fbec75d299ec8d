# Descriptor chains as the device's side sees them: tables of host segments, filled by the queues.

cimport cython
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from vring._memory cimport GuestMemory, vr_lookup, vr_map, vr_region
from vring._wire cimport (
    DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE, iovec, vr_entry, vr_likely, vr_store_one_of, vr_unlikely
)

cdef struct vr_chain:
    uint16_t head               # split: head descriptor; packed: buffer id. Goes into the used ring
    uint16_t descriptors        # packed: ring slots the chain takes; split: 1
    uint32_t first_segment      # index of the chain's first segment in the segment table
    uint32_t n_readable         # its device-readable segments come first
    uint32_t n_writable
    uint32_t readable_bytes
    uint32_t writable_bytes

cdef struct vr_walk:
    # Where a walk over the descriptors of a chain stands. Fast loops keep it in registers: there it
    # must not escape to functions that are not inlined.
    const vr_region* near       # region of the last translation, tried first
    iovec* segment              # the next free one of the segment table
    uint64_t bytes              # of the chain so far
    uint32_t writable           # DESC_F_WRITE once a device-writable descriptor was met, else 0
    uint32_t at                 # index of the descriptor reached
    vr_entry desc               # and the descriptor

cdef struct vr_room:
    # What a walk works in.
    const vr_map* memory
    uint16_t* hints
    iovec* segments             # the caller's segment table
    const iovec* end
    uint32_t size               # of the queue: a chain has at most so many descriptors
    int32_t extra               # descriptors of the chain less its segments, 0 but for rare chains

cdef enum vr_fault_code:
    FAULT_NONE
    FAULT_FULL                  # no fault of the driver: the segment table has no room
    FAULT_AVAIL_INDEX
    FAULT_HEAD
    FAULT_NEXT
    FAULT_TOO_LONG
    FAULT_TOO_MANY_BYTES
    FAULT_TOO_MANY_SEGMENTS
    FAULT_ORDER
    FAULT_INDIRECT_FEATURE
    FAULT_INDIRECT_NESTED
    FAULT_INDIRECT_NEXT
    FAULT_INDIRECT_SIZE
    FAULT_INDIRECT_ADDRESS
    FAULT_ADDRESS
    FAULT_MEMORY_LOST


# A buffer of no bytes or in several regions (a segment for each), or one that is too much; moves
# `segment` on. Returns a vr_fault_code.
cdef int vr_add_slow(
    vr_room* room, const vr_chain* chain, iovec** segment, uint64_t address, uint64_t length
) noexcept nogil


cdef inline void vr_start_chain(vr_walk* walk, vr_chain* chain, uint32_t segment) noexcept nogil:
    chain.first_segment = segment
    walk.bytes = 0
    walk.writable = 0


cdef inline int vr_add_buffer(vr_room* room, vr_walk* walk, const vr_chain* chain) noexcept nogil:
    # The buffer of walk.desc, as a segment of the table. Returns a vr_fault_code.
    cdef uint64_t offset = walk.desc.addr - walk.near.guest
    cdef const vr_region* near
    cdef iovec* segment
    cdef int code
    walk.bytes += walk.desc.len
    if offset >= walk.near.size:
        near = vr_lookup(room.memory, room.hints, walk.desc.addr)
        if vr_likely(near != NULL):
            walk.near = near
            offset = walk.desc.addr - near.guest
        elif walk.desc.len:
            return FAULT_ADDRESS
    # length - 1 sends a length of 0 the slow way
    if vr_likely(
        walk.segment != room.end and <uint64_t>walk.desc.len - 1 < walk.near.size - offset
    ):
        walk.segment.iov_base = walk.near.host + offset
        walk.segment.iov_len = walk.desc.len
        walk.segment += 1
        return FAULT_NONE
    segment = walk.segment
    code = vr_add_slow(room, chain, &segment, walk.desc.addr, walk.desc.len)
    walk.segment = segment
    return code


cdef inline void vr_end_readable(
    const vr_room* room, const vr_walk* walk, vr_chain* chain
) noexcept nogil:
    chain.n_readable = <uint32_t>(walk.segment - room.segments) - chain.first_segment
    chain.readable_bytes = <uint32_t>walk.bytes


cdef inline int vr_end_chain(vr_room* room, vr_walk* walk, vr_chain* chain) noexcept nogil:
    # Returns a vr_fault_code.
    cdef uint32_t segments = <uint32_t>(walk.segment - room.segments) - chain.first_segment
    if not walk.writable:
        chain.n_readable = segments
        chain.n_writable = 0
        chain.readable_bytes = <uint32_t>walk.bytes
        chain.writable_bytes = 0
    else:
        chain.n_writable = segments - chain.n_readable
        chain.writable_bytes = <uint32_t>walk.bytes - chain.readable_bytes
    if vr_unlikely(room.extra):
        segments += room.extra
        room.extra = 0
    # Segments end the loops; whether there were too many descriptors is checked once.
    if vr_unlikely(segments > room.size):
        return FAULT_TOO_LONG
    return FAULT_TOO_MANY_BYTES if vr_unlikely(walk.bytes >> 32) else FAULT_NONE


# Entry i of an indirect table that crosses region borders, byte by byte, once each; whether all of
# it is in memory.
cdef bint vr_read_scattered(
    const vr_map* memory, uint64_t table, uint32_t i, uint8_t* entry
) noexcept nogil


cdef inline int vr_locate_table(
    const vr_room* room, const vr_walk* walk, bint negotiated, uint32_t most, const uint8_t** table
) noexcept nogil:
    # Where the indirect table of at most so many entries lies that walk.desc names; stays NULL if
    # it crosses region borders. Returns a vr_fault_code.
    cdef const vr_region* region = walk.near
    cdef uint64_t offset = walk.desc.addr - region.guest
    if vr_unlikely(not negotiated):
        return FAULT_INDIRECT_FEATURE
    if vr_unlikely(walk.desc.flags & DESC_F_NEXT):
        return FAULT_INDIRECT_NEXT
    if vr_unlikely(walk.desc.len == 0 or walk.desc.len % DESC_SIZE):
        return FAULT_INDIRECT_SIZE
    if vr_unlikely(walk.desc.len // DESC_SIZE > most):
        return FAULT_TOO_LONG
    if offset >= region.size:
        region = vr_lookup(room.memory, room.hints, walk.desc.addr)
        if vr_unlikely(region == NULL):
            return FAULT_INDIRECT_ADDRESS
        offset = walk.desc.addr - region.guest
    if vr_likely(walk.desc.len <= region.size - offset):
        table[0] = region.host + offset
    return FAULT_NONE


cdef inline void vr_single(
    vr_chain* chain, uint32_t head, uint32_t segment, uint32_t length, bint writable
) noexcept nogil:
    # A chain of one descriptor in one segment, without a branch on which kind it is.
    chain.head = head
    chain.descriptors = 1
    chain.first_segment = segment
    vr_store_one_of(&chain.n_readable, 1, writable)         # and n_writable
    vr_store_one_of(&chain.readable_bytes, length, writable)  # and writable_bytes


@cython.final
cdef class Batch:
    cdef vr_chain* chains       # rows start to count-1 are not completed yet
    cdef iovec* segments
    cdef uint32_t* written      # scratch for push_many, one per chain
    cdef uint32_t start
    cdef uint32_t count
    cdef uint32_t max_chains
    cdef uint32_t max_segments
    cdef uint32_t epoch         # of its queue: how often that was reset
    cdef uint64_t first         # sequence number (of its queue) of chains[0]
    cdef object owner           # the queue while chains are in flight, else None
    cdef GuestMemory memory     # keeps the buffers alive as long as chains are in flight
    cdef Chain viewed_first     # the first Chain object that gave out memoryviews
    cdef list viewed            # and the others

    @staticmethod
    cdef Batch make(uint32_t max_chains, uint32_t max_segments)
    cdef int grow(self) except -1
    cdef int take_written(self, object written, uint32_t n) except -1
    cdef int note_viewed(self, Chain chain) except -1
    cdef void forget_views(self) noexcept
    cdef int withdraw_views(self, uint32_t end) except -1
    cdef int finish(self, uint32_t n) except -1
    cdef object chain_column(self, str name)
    cdef object segment_column(self, str name)
    cdef uint64_t readable_total(self) noexcept nogil
    cdef void gather_to(self, uint8_t* to) noexcept nogil
    cdef int check_memory(self) except -1


@cython.final
cdef class Chain:
    cdef Batch batch
    cdef uint32_t index
    cdef readonly uint32_t written
    cdef uint32_t exports
    cdef iovec exported
    cdef bint export_writable
    cdef tuple _readable
    cdef tuple _writable

    cdef vr_chain* row(self) except NULL
    cdef tuple views(self, uint32_t first, uint32_t n, bint writable)
    cdef void forget_views(self) noexcept
    cdef int withdraw(self) except -1
