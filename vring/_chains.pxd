# Descriptor chains as the device's side sees them: tables of host segments, filled by the queues.

cimport cython
from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vring._memory cimport GuestMemory
from vring._walk cimport vr_chain
from vring._wire cimport iovec

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject* o)


cdef inline bint held_once(PyObject* o) noexcept:
    # Return whether the caller's structure holds the only reference: then nobody else can see the
    # object, and it may be used again.
    return Py_REFCNT(o) == 1


cdef uint32_t checked_length(object value) except? 0
# Return push_many's `written` in a form whose use runs no code of the caller's: an int, or a numpy
# array of at most `most` uint32.
cdef object plain_lengths(object written, uint32_t most)


@cython.final
cdef class Batch:
    cdef vr_chain* chains       # rows start to count-1 are not completed yet
    cdef iovec* segments
    cdef uint32_t* written      # scratch for push_many, one per chain
    cdef uint32_t start
    cdef uint32_t count
    cdef uint32_t max_chains
    cdef uint32_t max_segments
    cdef uint32_t epoch         # how often its queue had been reset when the chains were popped
    cdef const uint32_t* current_epoch  # how often its owner has been reset by now, if it has one
    cdef uint64_t first         # sequence number (of its queue) of chains[0]
    cdef object owner           # the queue while chains are in flight, else None
    cdef GuestMemory memory     # keeps the buffers alive as long as chains are in flight
    cdef Chain viewed_first     # the first Chain object that gave out memoryviews
    cdef list viewed            # the other ones

    @staticmethod
    cdef Batch make(uint32_t max_chains, uint32_t max_segments)
    cdef int grow(self) except -1
    cdef int take_written(self, object written, uint32_t n) except -1
    cdef int note_viewed(self, Chain chain) except -1
    cdef void forget_views(self) noexcept
    cdef int withdraw_views(self, uint32_t end) except -1
    cdef int finish(self, uint32_t n) except -1
    cdef object chain_column(self, str name)
    cdef object segment_column(self, str name)
    cdef uint64_t readable_total(self) noexcept nogil
    cdef void gather_to(self, uint8_t* to) noexcept nogil
    cdef int check_epoch(self) except -1
    cdef int check_memory(self) except -1


@cython.final
cdef class Chain:
    cdef Batch batch
    cdef uint32_t index
    cdef readonly uint32_t written
    cdef uint32_t exports
    cdef iovec exported
    cdef bint export_writable
    cdef tuple _readable
    cdef tuple _writable

    cdef vr_chain* row(self) except NULL
    cdef int refuse(self) except -1
    cdef tuple views(self, uint32_t first, uint32_t n, bint writable)
    cdef void forget_views(self) noexcept
    cdef int withdraw(self) except -1
