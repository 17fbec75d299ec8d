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


cdef inline const vr_region* vr_last(const vr_map* memory, uint64_t address) noexcept nogil:
    # Return the last region that starts at or before a guest address; the first if there is none.
    # Binary search without branches, which hostile or scattered addresses would make unpredictable.
    cdef const vr_region* region = memory.regions
    cdef uint32_t left = memory.count, half
    while left > 1:
        half = left >> 1
        region += half & -<uint32_t>(region[half].guest <= address)
        left -= half
    return region


cdef inline const vr_region* vr_find(const vr_map* memory, uint64_t address) noexcept nogil:
    # Return the region that contains a guest address, or NULL.
    cdef const vr_region* region = vr_last(memory, address)
    return region if address - region.guest < region.size else NULL


# A hint is the number of the region in which an address was found last, by bits 20 to 25 of the
# address; it saves the search. Each queue has its own table, zeroed when its memory changes.
cdef enum:
    VR_HINTS = 64


cdef const vr_region* vr_learn(
    const vr_map* memory, uint16_t* hints, uint64_t address
) noexcept nogil


cdef inline const vr_region* vr_lookup(
    const vr_map* memory, uint16_t* hints, uint64_t address
) noexcept nogil:
    # Do as vr_find, with hints.
    cdef const vr_region* region = memory.regions + hints[(address >> 20) % VR_HINTS]
    if address - region.guest < region.size:
        return region
    return vr_learn(memory, hints, address)


@cython.final
cdef class Region:
    cdef readonly object buffer
    cdef readonly object user_addr
    cdef vr_region table
    cdef Py_buffer* _held       # the export it holds; on the heap, hidden from the collector


@cython.final
cdef class GuestMemory:
    cdef readonly tuple regions
    cdef vr_map map             # valid as long as this object lives
    # For is_lost, from any thread: what one thread has found is true for all.
    cdef uint64_t losses        # guard_losses() when it last found no lost region
    cdef int was_lost           # whether it found one
    # Return whether a region is lost (Region.lost). Costs nothing while no mapping at all is lost.
    cdef bint is_lost(self) noexcept nogil
    # Return the host address of a contiguous range; raise AddressError if it is not in one region.
    cdef uint8_t* locate(self, uint64_t address, uint64_t length) except NULL
    # Do the same for the two bytes of an aligned 16-bit number.
    cdef uint8_t* locate16(self, object guest_addr) except NULL
    cdef bint holds(self, const uint8_t* start, uint64_t length) noexcept
    # Return the place of the first region behind `address`.
    cdef uint32_t place_after(self, uint64_t address) noexcept
    # Return a table with `added` instead of `left_out` regions from place `at` on, unchecked.
    cdef GuestMemory spliced(self, uint32_t at, uint32_t left_out, tuple added)
    cdef int check(self, uint64_t address, uint64_t length) except -1
    cdef void copy(self, uint64_t address, uint8_t* local, uint64_t length, bint write) noexcept
