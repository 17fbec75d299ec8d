# The device's side of a packed virtqueue.

cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vring._core cimport VirtQueue
from vring._walk cimport vr_chain


@cython.final
cdef class PackedQueue(VirtQueue):
    cdef uint8_t* ring              # descriptors
    cdef uint8_t* driver_event      # the driver's wish for notifications: offset and wrap, flags
    cdef uint8_t* device_event      # ours
    cdef uint32_t next_avail        # slot of the next chain
    cdef uint32_t next_used         # slot where the next used descriptor goes
    cdef bint avail_wrap            # wrap counters (2.8.1)
    cdef bint used_wrap
    cdef uint32_t slots_in_flight
    cdef uint16_t* taken            # slots of the chains popped last, a ring by order of pops
    cdef uint32_t next_taken

    cdef void note_taken(self, uint32_t n, uint16_t slots) noexcept nogil
    cdef int resume(self) except -1
    cdef bint push_recorded(
        self, const vr_chain* chains, const uint32_t* written, uint32_t n
    ) noexcept nogil
    cdef void ask(self, uint32_t event) noexcept nogil
    cdef bint ready(self) noexcept nogil
    cdef bint wanted(self, uint32_t slots) noexcept nogil
