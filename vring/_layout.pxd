# Offsets and sizes of the parts of a ring, in bytes (virtio 1.3, 2.7 and 2.8): declared once.
# Python has them as vring.layout.

from libc.stdint cimport uint32_t

cpdef enum:
    QUEUE_SIZE_MAX = 32768      # descriptors of a queue, either layout (2.7, 2.8)
    # a descriptor of either layout, in a ring or in an indirect table (2.7.5, 2.8.13)
    DESC_SIZE = 16
    DESC_ALIGN = 16             # of the descriptor area (2.7, 2.8)
    # split: the available ring, the driver area (2.7.6)
    AVAIL_ALIGN = 2
    AVAIL_FLAGS = 0             # offset of the flags
    AVAIL_INDEX = 2             # offset of the index
    AVAIL_RING = 4              # offset of the first entry
    AVAIL_ENTRY = 2             # bytes of an entry
    # split: the used ring, the device area (2.7.8)
    USED_ALIGN = 4
    USED_FLAGS = 0
    USED_INDEX = 2
    USED_RING = 4
    USED_ENTRY = 8
    EVENT_INDEX_SIZE = 2        # at the end of each of these rings, with EVENT_IDX (2.7.7, 2.7.10)
    # packed: offsets in a descriptor (2.8.13)
    PACKED_ID = 12
    PACKED_FLAGS = 14
    # packed: an event suppression structure, which is the driver area and the device area (2.8.14)
    EVENT_SIZE = 4
    EVENT_ALIGN = 4
    # packed: the wrap counter beside an offset of 15 bits, in such a structure and in the state of
    # a ring (2.8.1, 2.8.14)
    WRAP = 1 << 15


cdef inline size_t used_event_at(uint32_t size) noexcept nogil:
    # Return the offset of used_event in the available ring of `size` descriptors.
    return AVAIL_RING + AVAIL_ENTRY * <size_t>size


cdef inline size_t avail_event_at(uint32_t size) noexcept nogil:
    # Return the offset of avail_event in the used ring of `size` descriptors.
    return USED_RING + USED_ENTRY * <size_t>size


cdef inline size_t avail_size(uint32_t size, bint event_idx) noexcept nogil:
    return used_event_at(size) + (EVENT_INDEX_SIZE if event_idx else 0)


cdef inline size_t used_size(uint32_t size, bint event_idx) noexcept nogil:
    return avail_event_at(size) + (EVENT_INDEX_SIZE if event_idx else 0)
