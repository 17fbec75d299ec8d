# Files that peers send for their memory.

from libc.stdint cimport uint32_t, uint64_t

# Return the number of bytes of which mappings of the file are whole multiples. Raise
# MemoryMapError, which begins with `what`, if an access to the file may wait for a network or a
# process (FUSE), which may be the peer. Never wait for the file system.
cdef uint64_t mapping_page(int fd, what) except 0
