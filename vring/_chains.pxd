# Descriptor chains as the device's side sees them: tables of host segments, filled by the queues.

cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vring._memory cimport GuestMemory, vr_find, vr_map, vr_region, vr_translate
from vring._wire cimport iovec

cdef struct vr_chain:
    uint16_t head               # split: head descriptor; packed: buffer id. Goes into the used ring
    uint16_t descriptors        # packed: ring slots the chain takes; split: 1
    uint32_t first_segment      # index of the chain's first segment in the segment table
    uint32_t n_readable         # its device-readable segments come first
    uint32_t n_writable
    uint32_t readable_bytes
    uint32_t writable_bytes

cdef struct vr_walk:
    # where a walk over descriptors stands
    const vr_map* memory
    const vr_region* last       # region of the last translation
    iovec* segments             # the caller's table
    uint32_t filled             # segments of it in use
    uint32_t limit              # segments in all
    uint64_t readable           # bytes of the chain so far
    uint64_t writable

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
    FAULT_INCOMPLETE
    FAULT_EVENT


cdef inline int vr_add_scattered(
    vr_walk* walk, vr_chain* chain, uint64_t address, uint64_t length, bint writable
) noexcept nogil:
    # A buffer that crosses region borders: one segment per region it touches.
    cdef uint64_t there
    cdef const vr_region* region
    while length:
        region = vr_find(walk.memory, address)
        if region == NULL:
            return FAULT_ADDRESS
        if walk.filled == walk.limit:
            return FAULT_FULL
        there = min(length, region.size - (address - region.guest))
        walk.segments[walk.filled].iov_base = region.host + (address - region.guest)
        walk.segments[walk.filled].iov_len = there
        walk.filled += 1
        if writable:
            chain.n_writable += 1
            walk.writable += there
        else:
            chain.n_readable += 1
            walk.readable += there
        address += there
        length -= there
        if address == 0 and length:
            return FAULT_ADDRESS
    return FAULT_NONE


cdef inline int vr_add_buffer(
    vr_walk* walk, vr_chain* chain, uint64_t address, uint32_t length, bint writable
) noexcept nogil:
    # One more buffer of the chain, as a segment of the table (several across region borders).
    cdef uint8_t* host
    if chain.n_writable and not writable:
        return FAULT_ORDER
    if length == 0:
        return FAULT_NONE
    host = vr_translate(walk.memory, &walk.last, address, length)
    if host == NULL:
        return vr_add_scattered(walk, chain, address, length, writable)
    if walk.filled == walk.limit:
        return FAULT_FULL
    walk.segments[walk.filled].iov_base = host
    walk.segments[walk.filled].iov_len = length
    walk.filled += 1
    if writable:
        chain.n_writable += 1
        walk.writable += length
    else:
        chain.n_readable += 1
        walk.readable += length
    return FAULT_NONE


@cython.final
cdef class Batch:
    cdef vr_chain* chains       # rows start to count-1 are not completed yet
    cdef iovec* segments
    cdef uint32_t* written      # scratch for push_many, one per chain
    cdef uint32_t start
    cdef uint32_t count
    cdef uint32_t max_chains
    cdef uint32_t max_segments
    cdef uint64_t first         # sequence number (of its queue) of chains[0]
    cdef object owner           # the queue while chains are in flight, else None
    cdef GuestMemory memory     # keeps the buffers alive as long as chains are in flight
    cdef list viewed            # Chain objects that gave out memoryviews

    @staticmethod
    cdef Batch make(uint32_t max_chains, uint32_t max_segments)
    cdef int grow(self) except -1
    cdef int take_written(self, object written, uint32_t n) except -1
    cdef int withdraw_views(self, uint32_t end) except -1
    cdef int finish(self, uint32_t n) except -1
    cdef object chain_column(self, str name)
    cdef object segment_column(self, str name)
    cdef uint64_t readable_total(self) noexcept nogil
    cdef void gather_to(self, uint8_t* to) noexcept nogil


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
    cdef int withdraw(self) except -1
