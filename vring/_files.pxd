# Files that peers send for their memory.

from libc.stdint cimport uint32_t, uint64_t

# What mappings of the file are whole multiples of, in bytes. Raises MemoryMapError, which begins
# with `what`, if an access to the file may wait for somebody: a network, or a process (FUSE), which
# may be the peer. Never waits for the file system itself.
cdef uint64_t mapping_page(int fd, what) except 0
