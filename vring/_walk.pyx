"""Slow paths of the walk over descriptor chains, and copies out of segments."""

from __future__ import annotations

from libc.stddef cimport size_t

from vring._memory cimport vr_find
from vring._wire cimport vr_copy, vr_read_whole
from vring.errors import (
    AvailableIndexError, BufferAddressError, ChainError, ChainOrderError, DescriptorFlagsError,
    HeadError, IndirectError, MemoryLostError
)

_FAULTS = {
    FAULT_AVAIL_INDEX: (AvailableIndexError, "the driver made more available than the queue has"),
    FAULT_HEAD: (HeadError, "the available ring names a head outside the descriptor table"),
    FAULT_NEXT: (ChainError, "next names a descriptor outside its table"),
    FAULT_TOO_LONG: (ChainError, "the chain loops or has more descriptors than the queue"),
    FAULT_TOO_MANY_BYTES: (ChainError, "the chain has more than 2**32 - 1 bytes"),
    FAULT_TOO_MANY_SEGMENTS: (ChainError, "the chain has more segments than the device takes"),
    FAULT_ORDER: (ChainOrderError, "a device-readable descriptor after a device-writable one"),
    FAULT_INDIRECT_FEATURE: (DescriptorFlagsError, "INDIRECT, but the feature is not negotiated"),
    FAULT_INDIRECT_NESTED: (IndirectError, "INDIRECT inside an indirect table"),
    FAULT_INDIRECT_NEXT: (IndirectError, "INDIRECT and NEXT in one descriptor"),
    FAULT_INDIRECT_SIZE: (IndirectError, "the length of an indirect table is 0 or not 16 * n"),
    FAULT_INDIRECT_ADDRESS: (IndirectError, "an indirect table outside guest memory"),
    FAULT_ADDRESS: (BufferAddressError, "a buffer outside guest memory"),
    FAULT_MEMORY_LOST: (MemoryLostError, "guest memory is gone: its file was cut off"),
}


cdef enum:
    # Cost of an entry of a table that crosses region borders, in empty buffers.
    SCATTERED_WORK = 2


cdef int vr_add_slow(
    vr_room* room, const vr_chain* chain, iovec** segment, uint64_t address, uint64_t length,
    uint64_t bytes
) noexcept nogil:
    cdef uint64_t offset, there
    cdef const vr_region* region
    room.odd = True
    room.work += 1
    if room.segments + chain.first_segment == room.end:
        return FAULT_FULL           # from its start on, were it all of empty buffers
    if segment[0] - room.segments - chain.first_segment + room.extra >= room.size:
        return FAULT_TOO_LONG
    room.extra += 1
    while length:
        region = vr_lookup(room.memory, room.hints, address)
        if region == NULL:
            return FAULT_ADDRESS
        if segment[0] == room.end:
            # The table does not grow for a chain that is too long already.
            return FAULT_TOO_MANY_BYTES if bytes >> 32 else FAULT_FULL
        offset = address - region.guest
        there = min(length, region.size - offset)
        segment[0].iov_base = region.host + offset
        segment[0].iov_len = there
        segment[0] += 1
        room.extra -= 1
        address += there
        length -= there
        if address == 0 and length:
            return FAULT_ADDRESS
    return FAULT_NONE


cdef bint vr_read_scattered(
    vr_room* room, uint64_t table, uint32_t i, uint8_t* entry
) noexcept nogil:
    cdef uint64_t at = table + <uint64_t>i * DESC_SIZE
    cdef const vr_region* region = vr_find(room.memory, at)
    cdef int k
    room.odd = True
    room.work += SCATTERED_WORK
    if region == NULL or at < table:
        return False
    if region.size - (at - region.guest) >= DESC_SIZE:
        vr_read_whole(entry, region.host + (at - region.guest))
        return True
    for k in range(DESC_SIZE):
        region = vr_find(room.memory, at)
        if region == NULL or at < table:
            return False
        entry[k] = (<volatile uint8_t*>region.host)[at - region.guest]
        at += 1
    return True


cdef void vr_copy_out(
    const vr_chain* chains, uint32_t n, const iovec* segments, uint8_t* to
) noexcept nogil:
    """Copy segments out of guest memory, adjacent ones with one copy."""
    cdef uint32_t i, _k
    cdef const uint8_t* run = NULL
    cdef size_t length = 0
    cdef const iovec* segment
    for i in range(n):
        segment = segments + chains[i].first_segment
        for _k in range(chains[i].n_readable):
            if segment.iov_base != run + length:
                if length:
                    vr_copy(to, run, length)
                to += length
                run = <const uint8_t*>segment.iov_base
                length = 0
            length += segment.iov_len
            segment += 1
    if length:
        vr_copy(to, run, length)


cdef tuple vr_describe(int code):
    return _FAULTS[code]
