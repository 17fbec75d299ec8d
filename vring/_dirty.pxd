# Which pages of guest memory the device has written: the bitmap of a migration, without the GIL.
#
# Whoever migrates the guest clears bits and copies pages meanwhile. So a bit is set after the bytes
# that it stands for, always, also if it seems to be set already.

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vring._memory cimport vr_map
from vring._walk cimport vr_chain
from vring._wire cimport iovec

cdef struct vr_log:
    uint8_t* bits               # page n: bit n % 8 of byte n // 8
    uint64_t pages              # how many it has bits for

cdef enum:
    LOG_PAGE_SHIFT = 12         # pages of the log have 4096 bytes, whatever the machine's have

# Marks guest addresses; what is beyond the log is left out.
cdef void log_range(const vr_log* log, uint64_t address, uint64_t length) noexcept nogil
# Marks the first `bytes` of segments, which are of the memory given.
cdef void log_segments(
    const vr_log* log, const vr_map* memory, const iovec* segments, uint32_t n, uint64_t bytes
) noexcept nogil
# Marks what was written into chains: as for push_c, and before it.
cdef void log_chains(
    const vr_log* log, const vr_map* memory, const vr_chain* chains, const iovec* segments,
    const uint32_t* written, uint32_t n
) noexcept nogil
# Marks entries `first` to `first + n` of a ring of `size` entries at a guest address.
cdef void log_entries(
    const vr_log* log, uint64_t ring, uint32_t entry, uint32_t size, uint32_t first, uint32_t n
) noexcept nogil


# An address of 64 bits from outside; LocalMisuseError names `what`.
cdef uint64_t checked_address(object what, object address) except? 0


# Neither cleared nor looked into by the collector, as Region.
@cython.no_gc_clear
@cython.final
cdef class DirtyLog:
    cdef readonly object buffer
    cdef vr_log table
    cdef Py_buffer* _held
