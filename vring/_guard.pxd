# Mappings of files that others can cut off: what is gone reads as zeros and is marked, instead of
# ending the process with SIGBUS.

cimport cython
from libc.stdint cimport uint64_t

from vring._wire cimport iovec

cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>

    /* A guarded mapping. */
    typedef struct vr_guarded {
        unsigned version;               /* odd while the slot changes */
        uintptr_t base;                 /* 0: free */
        size_t length;
        int event_fd;
        int lost;
    } vr_guarded;
    """
    ctypedef struct vr_guarded:
        pass

# Guards a mapping, which must be whole pages of its file system; NULL without memory or handler.
# Whenever it is lost, 8 bytes are written to event_fd (-1: none), which must stay open as long.
# With the GIL.
cdef vr_guarded* guard_add(void* base, size_t length, int event_fd) noexcept
# Before the mapping is unmapped. With the GIL.
cdef void guard_remove(vr_guarded* guarded) noexcept
cdef bint guard_lost(const vr_guarded* guarded) noexcept nogil
# Grows whenever a mapping is lost: nothing needs to be looked at while this is the same.
cdef uint64_t guard_losses() noexcept nogil
# Whether the mapping that an address is in, if it is guarded, is lost.
cdef bint guard_lost_at(const void* address) noexcept nogil
# After a system call failed with EFAULT on these segments: touches those that are guarded, since a
# system call gets no SIGBUS; whether any of their mappings is lost.
cdef bint guard_probe(const iovec* segments, uint64_t n) noexcept nogil


@cython.final
cdef class MemoryWatch:
    cdef readonly int fd
