# The driver's side of virtqueues.

cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vring._memory cimport GuestMemory


cdef class Driver:
    cdef readonly GuestMemory memory
    cdef readonly str name
    cdef readonly uint32_t size
    cdef readonly uint32_t num_free
    cdef readonly bint event_idx
    cdef readonly bint indirect
    cdef readonly bint in_order
    cdef uint16_t* descriptors      # per head in flight, how many descriptors its chain has, else 0
    cdef uint32_t* writable         # per head in flight, bytes of its device-writable part
    cdef uint16_t* order            # with IN_ORDER: heads in flight, a ring of `size`
    cdef uint32_t oldest            # where in it the oldest is
    cdef uint32_t youngest          # and where the next goes
    cdef uint32_t flying            # chains in flight

    cdef int allocate(self) except -1
    cdef list check_buffers(self, object readable, object writable, bint indirect_at)
    cdef void note(self, uint16_t head, uint32_t descriptors, uint32_t writable) noexcept nogil
    cdef uint8_t* locate(self, uint64_t address, uint64_t length, uint64_t align) except NULL
    cdef int batch_size(self, uint32_t head) except -1
    cdef tuple collect(self, Py_ssize_t limit)
    # what a layout implements: the next used element; and taking back the oldest of a batch
    cdef bint next_element(self, uint32_t* head, uint32_t* length) except -1
    cdef void take_back(self, uint16_t head) noexcept nogil
    cdef void restart(self) noexcept


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
    cdef void advance(self, uint32_t slots) noexcept nogil
