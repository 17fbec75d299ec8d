# Guest memory for nogil code: a sorted, immutable table of regions and the checked translation.

cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef struct vr_region:
    uint64_t guest              # first guest address
    uint64_t size               # bytes
    uint8_t* host               # where the first byte lies in this process

cdef struct vr_map:
    const vr_region* regions    # sorted by guest address, none overlap
    uint32_t count


cdef inline const vr_region* vr_find(const vr_map* memory, uint64_t address) noexcept nogil:
    # The region that holds a guest address, or NULL: binary search for the last start <= address,
    # without branches that hostile or scattered addresses would make unpredictable.
    cdef const vr_region* region = memory.regions
    cdef uint32_t left = memory.count, half
    while left > 1:
        half = left >> 1
        region += half & -<uint32_t>(region[half].guest <= address)
        left -= half
    return region if address - region.guest < region.size else NULL


# Which region (its number) an address lay in last, by bits 20 to 25 of the address: finds the
# region without a search. Each queue has its own; zeroed when its memory changes.
cdef enum:
    VR_HINTS = 64


cdef const vr_region* vr_learn(
    const vr_map* memory, uint16_t* hints, uint64_t address
) noexcept nogil


cdef inline const vr_region* vr_lookup(
    const vr_map* memory, uint16_t* hints, uint64_t address
) noexcept nogil:
    # vr_find with hints
    cdef const vr_region* region = memory.regions + hints[(address >> 20) % VR_HINTS]
    if address - region.guest < region.size:
        return region
    return vr_learn(memory, hints, address)


@cython.final
cdef class Region:
    cdef readonly object buffer
    cdef readonly object user_addr
    cdef vr_region table
    cdef Py_buffer* _held       # the export it holds; on the heap, unseen by the collector


@cython.final
cdef class GuestMemory:
    cdef readonly tuple regions
    cdef vr_map map             # valid as long as this object lives
    # Any thread may look: what one has found out is true for all.
    cdef uint64_t losses        # guard_losses() when is_lost last looked and found nothing
    cdef int was_lost           # whether it found a region
    # Whether a region is lost (Region.lost). Costs nothing as long as no mapping at all is.
    cdef bint is_lost(self) noexcept nogil
    # Host address of a contiguous range, AddressError (NULL) if it is not in one region.
    cdef uint8_t* locate(self, uint64_t address, uint64_t length) except NULL
    # The same for the two bytes of an aligned number of 16 bits.
    cdef uint8_t* locate16(self, object guest_addr) except NULL
    cdef bint holds(self, const uint8_t* start, uint64_t length) noexcept
    cdef int check(self, uint64_t address, uint64_t length) except -1
    cdef void copy(self, uint64_t address, uint8_t* local, uint64_t length, bint write) noexcept
