# Walks over the descriptors of chains, which turn a driver's buffers into segments of this
# process's memory.

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from vring._layout cimport DESC_SIZE
from vring._memory cimport vr_lookup, vr_map, vr_region
from vring._wire cimport (
    DESC_F_NEXT, DESC_F_WRITE, iovec, vr_copy, vr_entry, vr_likely, vr_store_one_of, vr_unlikely
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
    # The position of a walk over the descriptors of a chain. Fast loops keep it in registers: its
    # address must not be passed to functions that are not inlined.
    const vr_region* near       # region of the last translation, tried first
    iovec* segment              # the next free segment of the table
    uint64_t bytes              # bytes of the chain so far
    uint32_t writable           # DESC_F_WRITE once a device-writable descriptor was met, else 0
    uint32_t at                 # index of the current descriptor
    vr_entry desc               # the current descriptor

cdef struct vr_room:
    # The limits and tables of a walk.
    const vr_map* memory
    uint16_t* hints
    iovec* segments             # the caller's segment table
    const iovec* end
    uint32_t size               # of the queue: a chain has at most so many descriptors
    int32_t extra               # descriptors of the chain minus its segments; rarely not 0
    bint odd                    # a descriptor of the chain did not become exactly one segment
    uint32_t work               # done in this pop for odd descriptors: see VR_WORK_MAX

cdef enum:
    # A pop ends when the segment table is full, or after a chain when it has done this much work
    # on descriptors without bytes or across a region border, and on tables that cross one.
    VR_WORK_MAX = 1024
    # A chain of more segments (indirect, across many region borders) breaks the ring.
    VR_SEGMENTS_MAX = 1 << 17

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


# Return the class of RingError of a fault, and its cause as text.
cdef tuple vr_describe(int code)


# Add a buffer of no bytes, one in several regions (a segment for each), or one for which there is
# no room; advance `segment`. `bytes`: of the chain so far, this buffer included. Return a
# vr_fault_code.
cdef int vr_add_slow(
    vr_room* room, const vr_chain* chain, iovec** segment, uint64_t address, uint64_t length,
    uint64_t bytes
) noexcept nogil


cdef inline void vr_start_chain(vr_walk* walk, vr_chain* chain, uint32_t segment) noexcept nogil:
    chain.first_segment = segment
    walk.bytes = 0
    walk.writable = 0


cdef inline int vr_add_buffer(vr_room* room, vr_walk* walk, const vr_chain* chain) noexcept nogil:
    # Add the buffer of walk.desc to the table as a segment. Return a vr_fault_code.
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
    # length - 1: a length of 0 takes the slow way
    if vr_likely(
        walk.segment != room.end and <uint64_t>walk.desc.len - 1 < walk.near.size - offset
    ):
        walk.segment.iov_base = walk.near.host + offset
        walk.segment.iov_len = walk.desc.len
        walk.segment += 1
        return FAULT_NONE
    segment = walk.segment
    code = vr_add_slow(room, chain, &segment, walk.desc.addr, walk.desc.len, walk.bytes)
    walk.segment = segment
    return code


cdef inline void vr_end_readable(
    const vr_room* room, const vr_walk* walk, vr_chain* chain
) noexcept nogil:
    chain.n_readable = <uint32_t>(walk.segment - room.segments) - chain.first_segment
    chain.readable_bytes = <uint32_t>walk.bytes


cdef inline int vr_end_chain(vr_room* room, vr_walk* walk, vr_chain* chain) noexcept nogil:
    # Finish the chain's numbers. Return a vr_fault_code.
    cdef uint32_t segments = <uint32_t>(walk.segment - room.segments) - chain.first_segment
    if not walk.writable:
        chain.n_readable = segments
        chain.n_writable = 0
        chain.readable_bytes = <uint32_t>walk.bytes
        chain.writable_bytes = 0
    else:
        chain.n_writable = segments - chain.n_readable
        chain.writable_bytes = <uint32_t>walk.bytes - chain.readable_bytes
    if vr_unlikely(room.odd):
        segments += room.extra
        room.extra = 0
        room.odd = False
        if room.work >= VR_WORK_MAX:
            room.end = walk.segment     # no room for another chain
    # The loops are bounded by segments; too many descriptors are detected once, here.
    if vr_unlikely(segments > room.size):
        return FAULT_TOO_LONG
    return FAULT_TOO_MANY_BYTES if vr_unlikely(walk.bytes >> 32) else FAULT_NONE


# Read entry i of an indirect table that crosses region borders, each byte once; return whether all
# of it is in memory.
cdef bint vr_read_scattered(
    vr_room* room, uint64_t table, uint32_t i, uint8_t* entry
) noexcept nogil

# Copy out the device-readable bytes of n chains.
cdef void vr_copy_out(
    const vr_chain* chains, uint32_t n, const iovec* segments, uint8_t* to
) noexcept nogil


cdef inline uint64_t vr_copy_in(
    const iovec* segments, uint32_t n, uint64_t skip, const uint8_t* data, uint64_t length
) noexcept nogil:
    # Fill n segments from their byte `skip` on until data or room ends; return the bytes copied.
    cdef uint32_t i
    cdef uint64_t done = 0, there
    for i in range(n):
        if skip >= segments[i].iov_len:
            skip -= segments[i].iov_len
            continue
        if done == length:
            break
        there = min(segments[i].iov_len - skip, length - done)
        vr_copy(<uint8_t*>segments[i].iov_base + skip, data + done, there)
        done += there
        skip = 0
    return done


cdef inline int vr_locate_table(
    const vr_room* room, const vr_walk* walk, bint negotiated, uint32_t most, const uint8_t** table
) noexcept nogil:
    # Find the indirect table that walk.desc refers to, of at most `most` entries; `table` keeps its
    # value if it crosses region borders. Return a vr_fault_code.
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
    # Describe a chain of one descriptor in one segment, without a branch on its direction.
    chain.head = head
    chain.descriptors = 1
    chain.first_segment = segment
    vr_store_one_of(&chain.n_readable, 1, writable)         # and n_writable
    vr_store_one_of(&chain.readable_bytes, length, writable)  # and writable_bytes
