# The device's side of a split virtqueue.

cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vring._core cimport VirtQueue


@cython.final
cdef class SplitQueue(VirtQueue):
    cdef uint8_t* desc
    cdef uint8_t* avail
    cdef uint8_t* used
    cdef uint16_t next_avail
    cdef uint16_t next_used

    cdef void resume(self) noexcept
    cdef void ask(self, uint16_t event, uint16_t flags) noexcept nogil
