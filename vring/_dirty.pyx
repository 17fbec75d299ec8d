"""The dirty log: a bitmap of the pages of guest memory that the device has written."""

from __future__ import annotations

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.number cimport PyNumber_Index
from libc.stdlib cimport calloc, free

from vring._memory cimport vr_region
from vring._wire cimport UINT64_MAX, vr_or8, vr_take8
from vring.errors import LocalMisuseError

#: Bytes of guest memory that one bit stands for ("Migration", vhost-user).
LOG_PAGE = 1 << LOG_PAGE_SHIFT


cdef void log_range(const vr_log* log, uint64_t address, uint64_t length) noexcept nogil:
    cdef uint64_t page = address >> LOG_PAGE_SHIFT, last
    cdef uint32_t first_bit, n
    if length == 0 or page >= log.pages:
        return
    last = UINT64_MAX if length - 1 > UINT64_MAX - address else address + length - 1
    last = min(last >> LOG_PAGE_SHIFT, log.pages - 1)
    while page <= last:
        first_bit = page & 7
        n = <uint32_t>min(last - page + 1, <uint64_t>(8 - first_bit))
        vr_or8(log.bits + (page >> 3), <uint8_t>(((1 << n) - 1) << first_bit))
        page += n


cdef void log_segments(
    const vr_log* log, const vr_map* memory, const iovec* segments, uint32_t n, uint64_t bytes
) noexcept nogil:
    cdef const vr_region* region
    cdef uint64_t there, offset
    cdef uint32_t i, k
    for i in range(n):
        if bytes == 0:
            return
        there = min(bytes, <uint64_t>segments[i].iov_len)
        bytes -= there
        # A buffer of this process may be several regions: all of them were written.
        for k in range(memory.count):
            region = &memory.regions[k]
            offset = <uint64_t>segments[i].iov_base - <uint64_t>region.host
            if offset < region.size:
                log_range(log, region.guest + offset, there)


cdef void log_chains(
    const vr_log* log, const vr_map* memory, const vr_chain* chains, const iovec* segments,
    const uint32_t* written, uint32_t n
) noexcept nogil:
    cdef uint32_t i
    for i in range(n if written != NULL else 0):
        log_segments(
            log, memory, segments + chains[i].first_segment + chains[i].n_readable,
            chains[i].n_writable, written[i]
        )


cdef void log_entries(
    const vr_log* log, uint64_t ring, uint32_t entry, uint32_t size, uint32_t first, uint32_t n
) noexcept nogil:
    cdef uint32_t straight = min(n, size - first)
    log_range(log, ring + <uint64_t>first * entry, <uint64_t>straight * entry)
    log_range(log, ring, <uint64_t>(n - straight) * entry)


cdef uint64_t checked_address(object what, object address) except? 0:
    address = PyNumber_Index(address)
    if not 0 <= address <= UINT64_MAX:
        raise LocalMisuseError(f"{what}: {address:#x} is not an address of 64 bits")
    return address


@cython.no_gc_clear
@cython.final
cdef class DirtyLog:
    """Which pages of guest memory the device has written, for whoever migrates the guest.

    Page n, of LOG_PAGE bytes of guest addresses from 0 on, is bit n % 8 of byte n // 8
    ("Migration", vhost-user). Queues that have the log set bits (VirtQueue.set_log); others read
    and clear them meanwhile, in this process or another. Pages beyond its end are not marked.

    Args:
        buffer: anything contiguous and writable, a Region among others; held, not copied.

    Attributes:
        buffer: as given; read-only.

    Raises:
        LocalMisuseError: the buffer is not writable and contiguous.
    """

    def __cinit__(self, buffer):
        self._held = <Py_buffer*>calloc(1, sizeof(Py_buffer))
        if self._held == NULL:
            raise MemoryError
        try:
            PyObject_GetBuffer(buffer, self._held, PyBUF_SIMPLE | PyBUF_WRITABLE)
        except (BufferError, TypeError, ValueError) as error:
            raise LocalMisuseError("a log's buffer is not writable and contiguous") from error
        self.buffer = buffer
        self.table.bits = <uint8_t*>self._held.buf
        self.table.pages = <uint64_t>self._held.len * 8

    def __init__(self, buffer):
        pass

    def __dealloc__(self):
        if self._held != NULL:
            PyBuffer_Release(self._held)
            free(self._held)

    @property
    def end(self):
        """The first guest address that has no bit."""
        return int(self.table.pages) << LOG_PAGE_SHIFT

    def mark(self, guest_addr, length):
        """Mark the pages of ``length`` bytes, which have been written; what has no bit is left out.

        Raises LocalMisuseError for what is no address or length of 64 bits.
        """
        cdef uint64_t at = checked_address("log", guest_addr)
        log_range(&self.table, at, checked_address("log, length", length))

    def take(self, guest_addr, length, page_size=LOG_PAGE):
        """Clear the marks of the pages of ``length`` bytes, and return them.

        Each mark is taken once, also while the device goes on marking.

        Args:
            page_size: bytes that a bit of the result stands for, from ``guest_addr`` on.

        Returns:
            bytearray: bit n % 8 of byte n // 8 is set if a byte of the n-th page was written.

        Raises:
            LocalMisuseError: no address, length or page size of 64 bits.
            MemoryError: the result is too large.
        """
        cdef uint64_t at = checked_address("log", guest_addr)
        cdef uint64_t size = checked_address("log, length", length)
        cdef uint64_t unit = checked_address("log, page size", page_size)
        cdef uint64_t page = at >> LOG_PAGE_SHIFT, last, first_unit, last_unit, end
        cdef uint32_t first_bit, n, bit
        cdef uint8_t found
        cdef uint8_t* bits
        if unit == 0:
            raise LocalMisuseError("log: a page size of 0")
        taken = bytearray((size + unit - 1) // unit + 7 >> 3)
        cdef uint8_t* out = taken
        if size == 0 or page >= self.table.pages:
            return taken
        end = UINT64_MAX if size - 1 > UINT64_MAX - at else at + size - 1
        last = min(end >> LOG_PAGE_SHIFT, self.table.pages - 1)
        while page <= last:
            first_bit = page & 7
            n = <uint32_t>min(last - page + 1, <uint64_t>(8 - first_bit))
            bits = self.table.bits + (page >> 3)
            found = vr_take8(bits, <uint8_t>(((1 << n) - 1) << first_bit)) if bits[0] else 0
            for bit in range(first_bit, first_bit + n):
                if found >> bit & 1:
                    first_unit = (max((page - first_bit + bit) << LOG_PAGE_SHIFT, at) - at) // unit
                    last_unit = min(((page - first_bit + bit + 1) << LOG_PAGE_SHIFT) - 1, end) - at
                    last_unit = last_unit // unit
                    while first_unit <= last_unit:
                        out[first_unit >> 3] |= <uint8_t>(1 << (first_unit & 7))
                        first_unit += 1
            page += n
        return taken
