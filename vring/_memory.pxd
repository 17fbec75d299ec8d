# Guest memory for nogil code: a sorted, immutable table of regions and the checked translation.

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef struct vr_region:
    uint64_t guest              # first guest address
    uint64_t size               # bytes
    uint8_t* host               # where the first byte lies in this process

cdef struct vr_map:
    const vr_region* regions    # sorted by guest address, none overlap
    uint32_t count


cdef inline const vr_region* vr_find(const vr_map* memory, uint64_t address) noexcept nogil:
    # The region that holds a guest address, or NULL: binary search for the last start <= address.
    cdef uint32_t low = 0, high = memory.count, middle
    cdef const vr_region* region
    while low < high:
        middle = (low + high) >> 1
        if memory.regions[middle].guest <= address:
            low = middle + 1
        else:
            high = middle
    if low == 0:
        return NULL
    region = &memory.regions[low - 1]
    return region if address - region.guest < region.size else NULL


cdef inline uint8_t* vr_translate(
    const vr_map* memory, const vr_region** last, uint64_t address, uint64_t length
) noexcept nogil:
    # Host address of `length` (> 0) bytes at guest `address`, NULL unless they lie in one region.
    # `last` is the region of the previous success and tried first; it may start as any region of
    # the table. Unsigned wrap-around makes an address below the region a huge offset.
    cdef const vr_region* region = last[0]
    cdef uint64_t offset = address - region.guest
    if offset < region.size and length <= region.size - offset:
        return region.host + offset
    region = vr_find(memory, address)
    if region == NULL or length > region.size - (address - region.guest):
        return NULL
    last[0] = region
    return region.host + (address - region.guest)


@cython.final
cdef class Region:
    cdef readonly object buffer
    cdef readonly object user_addr
    cdef vr_region table
    cdef Py_buffer _held


@cython.final
cdef class GuestMemory:
    cdef readonly tuple regions
    cdef vr_map map             # valid as long as this object lives
    # Host address of a contiguous range, AddressError (NULL) if it is not in one region.
    cdef uint8_t* locate(self, uint64_t address, uint64_t length) except NULL
    cdef int check(self, uint64_t address, uint64_t length) except -1
    cdef void copy(self, uint64_t address, uint8_t* local, uint64_t length, bint write) noexcept
