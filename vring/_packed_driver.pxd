# The driver's side of a packed virtqueue.

cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vring._driver cimport Driver


@cython.final
cdef class PackedDriver(Driver):
    cdef uint8_t* ring
    cdef uint8_t* driver_event      # our wish for notifications: offset and wrap, flags
    cdef uint8_t* device_event      # the device's
    cdef uint32_t next_slot         # where the next descriptor goes
    cdef uint32_t next_used         # slot of the next used descriptor
    cdef bint wrap                  # wrap counters (2.8.1)
    cdef bint used_wrap
    cdef uint32_t held              # slot of the first chain that is not published
    cdef uint32_t held_flags
    cdef uint32_t held_slots        # slots that are not published
    cdef uint16_t* ids              # free buffer ids
    cdef uint32_t free_ids

    cdef void start(self, uint32_t index) noexcept
    cdef void put(
        self, uint64_t address, uint32_t length, uint32_t flags, uint16_t id
    ) noexcept nogil
    cdef bint is_used(self, uint32_t slot, bint wrap) noexcept nogil
    cdef bint used_so_far(self, uint32_t wanted) noexcept nogil
    cdef void advance(self, uint32_t slots) noexcept nogil
