# The driver's side of a split virtqueue.

cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vring._driver cimport Driver


@cython.final
cdef class SplitDriver(Driver):
    cdef uint8_t* desc
    cdef uint8_t* avail
    cdef uint8_t* used
    cdef uint16_t free_head         # first of the free descriptors, linked by `next`
    cdef uint16_t next_avail        # available index with all chains added so far
    cdef uint16_t published         # the part of it that the device can see
    cdef uint16_t next_used         # used index up to which chains came back
    cdef uint16_t* next             # private copy of the links: the device could change the shared

    cdef uint16_t take(self) noexcept nogil
    cdef void start(self, uint16_t index) noexcept
    cdef void offer(self, uint16_t head) noexcept nogil
