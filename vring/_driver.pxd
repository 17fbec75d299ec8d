# The driver's side of a split virtqueue.

cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vring._memory cimport GuestMemory


@cython.final
cdef class SplitDriver:
    cdef readonly GuestMemory memory
    cdef readonly str name
    cdef readonly uint32_t size
    cdef readonly uint32_t num_free
    cdef readonly bint event_idx
    cdef readonly bint indirect
    cdef uint8_t* desc
    cdef uint8_t* avail
    cdef uint8_t* used
    cdef uint16_t free_head         # first of the free descriptors, linked by `next`
    cdef uint16_t next_avail        # available index with all chains added so far
    cdef uint16_t published         # the part of it that the device can see
    cdef uint16_t next_used         # used index up to which chains came back
    cdef uint16_t* next             # private copy of the links: the device could change the shared
    cdef uint16_t* descriptors      # per head in flight, how many descriptors its chain has, else 0

    cdef uint16_t take(self) noexcept nogil
    cdef void give(self, uint16_t head) noexcept nogil
    cdef void offer(self, uint16_t head) noexcept nogil
    cdef int used_ready(self) except -1
