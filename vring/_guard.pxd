# Mappings of files that others can truncate: missing pages read as zeros and the mapping is marked
# lost, instead of SIGBUS ending the process.

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

# Guard a mapping, which must be whole pages of its file system; return NULL without memory or
# handler. Each time it is lost, 8 bytes are written to event_fd (-1: none), which must stay open
# until guard_remove. With the GIL.
cdef vr_guarded* guard_add(void* base, size_t length, int event_fd) noexcept
# End the guard; call it before the mapping is unmapped. With the GIL.
cdef void guard_remove(vr_guarded* guarded) noexcept
cdef bint guard_lost(const vr_guarded* guarded) noexcept nogil
# Return how many mappings were lost so far: while it is the same, none needs to be checked.
cdef uint64_t guard_losses() noexcept nogil
# Return whether the guarded mapping that contains an address is lost; 0 if there is none.
cdef bint guard_lost_at(const void* address) noexcept nogil
# After a system call failed with EFAULT on these segments: touch those that are guarded, since a
# system call raises no SIGBUS; return whether any of their mappings is lost.
cdef bint guard_probe(const iovec* segments, uint64_t n) noexcept nogil


@cython.final
cdef class MemoryWatch:
    cdef readonly int fd
