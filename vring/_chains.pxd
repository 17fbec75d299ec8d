# Descriptor chains as the device's side sees them: tables of host segments, filled by the queues.

cimport cython
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from vring._memory cimport GuestMemory, vr_lookup, vr_map, vr_region
from vring._wire cimport iovec, vr_likely, vr_unlikely

cdef struct vr_chain:
    uint16_t head               # split: head descriptor; packed: buffer id. Goes into the used ring
    uint16_t descriptors        # packed: ring slots the chain takes; split: 1
    uint32_t first_segment      # index of the chain's first segment in the segment table
    uint32_t n_readable         # its device-readable segments come first
    uint32_t n_writable
    uint32_t readable_bytes
    uint32_t writable_bytes

cdef struct vr_walk:
    # Where a walk over descriptors stands. The hot loops keep it in registers: it must not escape,
    # so the functions for rare cases get the address of a copy.
    const vr_map* memory
    uint16_t* hints
    const vr_region* near       # region of the last translation, tried first
    const iovec* end            # of the caller's segment table
    iovec* segment              # the next free one of it
    iovec* first                # of the chain
    const iovec* stop           # where `segment` meets the end of the table or of the chain's budget
    int32_t extra               # descriptors of the chain less its segments
    uint64_t bytes              # of the chain so far
    bint writable               # whether a device-writable descriptor was met

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


cdef int vr_add_slow(
    vr_walk* walk, uint32_t size, uint64_t address, uint64_t length
) noexcept nogil


cdef inline void vr_start_chain(vr_walk* walk, uint32_t size) noexcept nogil:
    # A chain has at most `size` descriptors, which mostly are as many segments.
    walk.first = walk.segment
    walk.stop = walk.end if walk.end - walk.first < size else walk.first + size
    walk.extra = 0
    walk.bytes = 0
    walk.writable = False


cdef inline void vr_end_readable(const vr_walk* walk, vr_chain* chain) noexcept nogil:
    chain.n_readable = <uint32_t>(walk.segment - walk.first)
    chain.readable_bytes = <uint32_t>walk.bytes


cdef inline int vr_add_buffer(
    vr_walk* walk, vr_chain* chain, uint32_t size, uint64_t address, uint32_t length, bint writable
) noexcept nogil:
    # One more buffer of the chain, as a segment of the table. Returns a vr_fault_code.
    cdef uint64_t offset = address - walk.near.guest
    cdef const vr_region* near
    cdef vr_walk copy
    cdef int code
    if writable != walk.writable:
        if vr_unlikely(walk.writable):
            return FAULT_ORDER
        walk.writable = True
        vr_end_readable(walk, chain)
    walk.bytes += length
    if offset >= walk.near.size:
        near = vr_lookup(walk.memory, walk.hints, address)
        if vr_likely(near != NULL):
            walk.near = near
            offset = address - near.guest
    # length - 1 sends a length of 0 the slow way
    if vr_likely(
        offset < walk.near.size and <uint64_t>length - 1 < walk.near.size - offset
        and walk.segment != walk.stop
    ):
        walk.segment.iov_base = walk.near.host + offset
        walk.segment.iov_len = length
        walk.segment += 1
        return FAULT_NONE
    copy = walk[0]
    code = vr_add_slow(&copy, size, address, length)
    walk[0] = copy
    return code


cdef inline int vr_end_chain(vr_walk* walk, vr_chain* chain) noexcept nogil:
    # Returns a vr_fault_code.
    if not walk.writable:
        vr_end_readable(walk, chain)
    chain.n_writable = <uint32_t>(walk.segment - walk.first) - chain.n_readable
    chain.writable_bytes = <uint32_t>walk.bytes - chain.readable_bytes
    return FAULT_TOO_MANY_BYTES if vr_unlikely(walk.bytes >> 32) else FAULT_NONE


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
