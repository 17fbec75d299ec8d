"""Records of queues in memory that a peer can write to."""

from __future__ import annotations

import os

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t

from vring._record cimport VR_RECORD_PRIVATE, vr_record
from vring.errors import LocalMisuseError, MemoryMapError

cdef extern from "<sys/mman.h>" nogil:
    void* mmap(void* addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void* addr, size_t length)
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED
    void* MAP_FAILED


@cython.final
cdef class SharedRecords:
    """Records of `count` queues (see VirtQueue), each in a page of a file that a peer has, too.

    The kernel takes addresses from one part of a record, and only stores a number into the other.
    The first part is in private memory right before the page, so that nobody else chooses the
    addresses. What the peer writes into the page harms its own stream of bytes alone.

    Args:
        fd: of a file that cannot shrink (a sealed memfd); it stays the caller's.
        offset: of the first page in the file, bytes; a multiple of the page size.
        count: pages, one for each queue.

    Raises:
        MemoryMapError: it cannot be mapped so.
    """

    cdef char* base
    cdef size_t length
    cdef size_t page
    cdef readonly uint32_t count

    def __cinit__(self, int fd, uint64_t offset, uint32_t count):
        cdef uint32_t i
        self.page = os.sysconf("SC_PAGE_SIZE")
        self.count = count
        self.length = 2 * count * self.page
        cdef void* base = mmap(
            NULL, self.length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
        )
        if base == MAP_FAILED:
            raise MemoryMapError(f"no memory for {count} records: {os.strerror(errno)}")
        self.base = <char*>base
        for i in range(count):
            base = mmap(
                self.base + (2 * <size_t>i + 1) * self.page, self.page, PROT_READ | PROT_WRITE,
                MAP_SHARED | MAP_FIXED, fd, <long>(offset + i * self.page)
            )
            if base == MAP_FAILED:
                raise MemoryMapError(f"cannot map a record: {os.strerror(errno)}")

    def __dealloc__(self):
        if self.base != NULL:
            munmap(self.base, self.length)

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.base, self.length, 0, flags)

    def record(self, uint32_t index):
        """Return the record of one queue, RECORD_SIZE bytes; it keeps the mapping alive.

        Raises LocalMisuseError if there is none.
        """
        if index >= self.count:
            raise LocalMisuseError(f"record {index} of {self.count}")
        start = (2 * <size_t>index + 1) * self.page - VR_RECORD_PRIVATE
        return memoryview(self)[start : start + sizeof(vr_record)]
