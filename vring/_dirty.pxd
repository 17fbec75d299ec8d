# Which pages of guest memory the device has written: the bitmap of a migration, without the GIL.
#
# The program that migrates the guest clears bits and copies pages meanwhile. So a bit is always set
# after the bytes that it stands for, also if it seems to be set already.

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vring._memory cimport vr_map
from vring._walk cimport vr_chain
from vring._wire cimport iovec

cdef struct vr_log:
    uint8_t* bits               # page n: bit n % 8 of byte n // 8
    uint64_t pages              # number of pages that have a bit

cdef enum:
    LOG_PAGE_SHIFT = 12         # pages of the log have 4096 bytes, whatever the machine's have

# Mark guest addresses; ignore those beyond the log.
cdef void log_range(const vr_log* log, uint64_t address, uint64_t length) noexcept nogil
# Mark the first `bytes` of segments, which must lie in `memory`.
cdef void log_segments(
    const vr_log* log, const vr_map* memory, const iovec* segments, uint32_t n, uint64_t bytes
) noexcept nogil
# Mark what was written into chains. Takes the arguments of push_c; call it before.
cdef void log_chains(
    const vr_log* log, const vr_map* memory, const vr_chain* chains, const iovec* segments,
    const uint32_t* written, uint32_t n
) noexcept nogil
# Mark n entries from `first` on in a ring of `size` entries of `entry` bytes at a guest address.
cdef void log_entries(
    const vr_log* log, uint64_t ring, uint32_t entry, uint32_t size, uint32_t first, uint32_t n
) noexcept nogil


# Return an address given by a caller; raise LocalMisuseError, which names `what`, if it has more
# than 64 bits.
cdef uint64_t checked_address(object what, object address) except? 0


# Neither cleared nor looked into by the collector, as Region.
@cython.no_gc_clear
@cython.final
cdef class DirtyLog:
    cdef readonly object buffer
    cdef vr_log table
    cdef Py_buffer* _held
