"""Guest memory: an immutable table of regions over any writable buffers."""

from __future__ import annotations

import os

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.number cimport PyNumber_Index
from libc.errno cimport errno
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from vring._files cimport mapping_page
from vring._guard cimport (
    MemoryWatch, guard_add, guard_lost, guard_lost_at, guard_losses, guard_remove, vr_guarded
)
from vring._linux cimport vr_counted, vr_get_flag, vr_note, vr_set_flag
from vring._wire cimport (
    UINT64_MAX, vr_copy, vr_fence, vr_load16_acquire, vr_store16_release
)
from vring.errors import AddressError, LocalMisuseError, MemoryMapError

cdef extern from "<sys/mman.h>" nogil:
    void* mmap(void* addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void* addr, size_t length)
    int madvise(void* addr, size_t length, int advice)
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MADV_DONTDUMP
    void* MAP_FAILED

#: More than any frontend uses: QEMU has 509 slots for memory, vfio-user allows 65535 maps.
MAX_REGIONS = 65536


cdef const vr_region* vr_learn(
    const vr_map* memory, uint16_t* hints, uint64_t address
) noexcept nogil:
    """Do as vr_find, and leave a hint for the next vr_lookup."""
    cdef const vr_region* region = vr_find(memory, address)
    if region != NULL:
        hints[(address >> 20) % VR_HINTS] = <uint16_t>(region - memory.regions)
    return region


cdef uint64_t as_address(object value, str what) except? 0:
    """Convert a caller's address; raise MemoryMapError unless it is 0 to 2**64 - 1."""
    if isinstance(value, int):
        value = PyNumber_Index(value)       # a plain one, whose comparisons are ours
        if 0 <= value <= UINT64_MAX:
            return value
    raise MemoryMapError(f"{what}: {value!r} is not an address of 64 bits")


@cython.final
cdef class _Mapping:
    """A mapping of a file; unmapped when the last buffer over it is released."""

    cdef void* base
    cdef size_t length          # whole pages
    cdef size_t start
    cdef size_t size
    cdef vr_guarded* guarded
    cdef MemoryWatch watch

    def __cinit__(
        self, int fd, uint64_t size, uint64_t offset, bint private, uint64_t page,
        MemoryWatch watch
    ):
        self.base = NULL
        self.start = offset % page
        self.size = size
        self.length = (size + self.start + page - 1) // page * page
        self.watch = watch
        cdef void* base = mmap(
            NULL,
            self.length,
            PROT_READ | PROT_WRITE,
            MAP_PRIVATE if private else MAP_SHARED,
            fd,
            <long>(offset - self.start),
        )
        if base == MAP_FAILED:
            raise MemoryMapError(
                f"cannot map {size:#x} bytes at offset {offset:#x}: {os.strerror(errno)}"
            )
        self.base = base
        # Guest memory does not belong in core dumps of this process.
        madvise(base, self.length, MADV_DONTDUMP)
        self.guarded = guard_add(base, self.length, -1 if watch is None else watch.fd)
        if self.guarded == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.guarded != NULL:
            guard_remove(self.guarded)
        if self.base != NULL:
            munmap(self.base, self.length)

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(
            view, self, <char*>self.base + self.start, self.size, 0, flags
        )


# Cython's tp_clear would drop the buffer under pointers still in use. The collector must not see
# all references to the exporter either: in a cycle it would clear it while it is exported.
@cython.no_gc_clear
@cython.final
cdef class Region:
    """A region of guest memory: a range of guest addresses backed by a writable buffer.

    The region keeps the buffer exported as long as it lives. Sizes and addresses are in bytes.

    Args:
        guest_addr: first guest address.
        buffer: any contiguous, writable buffer: mmap, numpy array, bytearray. Not copied.
        user_addr: the frontend's virtual address of the first byte (vhost-user), if there is one.

    Attributes:
        buffer, user_addr: as given; read-only.

    Raises:
        MemoryMapError: the buffer is empty, or the region wraps around 2**64.
    """

    def __cinit__(self, guest_addr, buffer, *, user_addr=None):
        self.table.guest = as_address(guest_addr, "guest address of a region")
        cdef uint64_t user = 0
        if user_addr is not None:
            user = as_address(user_addr, "user address of a region")
        self._held = <Py_buffer*>calloc(1, sizeof(Py_buffer))
        if self._held == NULL:
            raise MemoryError
        try:
            PyObject_GetBuffer(buffer, self._held, PyBUF_SIMPLE | PyBUF_WRITABLE)
        except (BufferError, TypeError, ValueError) as error:
            raise MemoryMapError(
                f"region at {self.table.guest:#x}: its buffer is not writable and contiguous"
            ) from error
        self.buffer = buffer
        self.user_addr = None if user_addr is None else user
        self.table.host = <uint8_t*>self._held.buf
        self.table.size = self._held.len
        if self.table.size == 0:
            raise MemoryMapError(f"region at {self.table.guest:#x}: no bytes")
        for address, what in ((self.table.guest, "guest"), (user, "user")):
            if address + self._held.len - 1 > UINT64_MAX:
                raise MemoryMapError(
                    f"region at {what} address {address:#x}, {self._held.len:#x} bytes: "
                    "wraps around 2**64"
                )

    def __init__(self, guest_addr, buffer, *, user_addr=None):
        pass

    def __dealloc__(self):
        if self._held != NULL:
            PyBuffer_Release(self._held)
            free(self._held)

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.table.host, self.table.size, 0, flags)

    @property
    def guest_addr(self):
        """First guest address, in bytes."""
        return self.table.guest

    @property
    def size(self):
        """Length in bytes."""
        return self.table.size

    @property
    def lost(self):
        """Whether the file behind the region was truncated and an access met the lost part.

        A peer may truncate the file of a mapped region (`map`) at any time. The first access to the
        lost part replaces the whole region by private memory, initially zeros, for good.
        """
        return isinstance(self.buffer, _Mapping) and guard_lost((<_Mapping>self.buffer).guarded)

    @classmethod
    def map(
        cls, fd, size, *, offset=0, guest_addr, user_addr=None, private=False,
        MemoryWatch watch=None, name=None
    ):
        """Map a file (memfd, shared memory) that a peer sent, readable, writable and shared.

        The descriptor is neither kept nor closed. `offset` need not be page-aligned. With `private`
        the file need not be writable, and writes do not change it. If the file is truncated later,
        see `lost`; `watch` becomes readable. Core dumps leave the mapping out. Errors call the
        region `name`; by default they name its address.

        The first call installs a SIGBUS handler, which passes on signals not about regions.

        Raises:
            MemoryMapError: `size` is 0, the file is shorter than offset + size, it is not on a
                local file system, so that an access may block for ever, or the system refuses.
        """
        what = name or f"region at {guest_addr:#x}"
        size, offset = PyNumber_Index(size), PyNumber_Index(offset)
        if size <= 0 or offset < 0 or offset + size > 2**63 - 1:
            raise MemoryMapError(
                f"{what}: cannot map {size:#x} bytes at offset {offset:#x}"
            )
        page = mapping_page(fd, what)
        try:
            length = os.fstat(fd).st_size
        except OSError as error:
            raise MemoryMapError(f"{what}: {error.strerror}") from error
        if length < offset + size:
            raise MemoryMapError(
                f"{what}: its file has {length:#x} bytes, "
                f"the region needs {offset:#x} + {size:#x}"
            )
        mapping = _Mapping(fd, size, offset, private, page, watch)
        return cls(guest_addr, mapping, user_addr=user_addr)

    def __repr__(self):
        user = "" if self.user_addr is None else f", user_addr={self.user_addr:#x}"
        return f"Region(guest_addr={self.guest_addr:#x}, size={self.size:#x}{user})"


@cython.final
cdef class GuestMemory:
    """An immutable table of regions. A new memory map is a new object; old ones stay valid.

    The object keeps the buffers of all its regions alive.

    Args:
        regions: in any order; they may touch but not overlap.

    Attributes:
        regions: a tuple of them, by guest address; read-only.

    Raises:
        MemoryMapError: two regions overlap, or there are more than MAX_REGIONS.
    """

    def __cinit__(self, regions=()):
        cdef Region region, before = None
        cdef uint32_t i
        ordered = sorted(regions, key=_guest_addr)
        if len(ordered) > MAX_REGIONS:
            raise MemoryMapError(f"{len(ordered)} regions; at most {MAX_REGIONS} are possible")
        self.regions = tuple(ordered)
        # One more, empty region: a lookup can always start from a region.
        cdef vr_region* table = <vr_region*>calloc(len(ordered) + 1, sizeof(vr_region))
        if table == NULL:
            raise MemoryError
        self.map.regions = table
        self.map.count = len(ordered)
        for i, region in enumerate(ordered):
            if before is not None and region.table.guest - before.table.guest < before.table.size:
                raise MemoryMapError(f"{before!r} and {region!r} overlap")
            table[i] = region.table
            before = region

    def __init__(self, regions=()):
        pass

    def __dealloc__(self):
        free(<void*>self.map.regions)

    cdef bint is_lost(self) noexcept nogil:
        # Before the check: a loss meanwhile is seen next time.
        cdef uint64_t losses = guard_losses()
        cdef uint32_t i
        if vr_get_flag(&self.was_lost):
            return True
        if losses == vr_counted(&self.losses):
            return False
        for i in range(self.map.count):
            if guard_lost_at(self.map.regions[i].host):
                vr_set_flag(&self.was_lost, True)
                return True
        vr_note(&self.losses, losses)
        return False

    @property
    def lost(self):
        """Whether a region is lost; see Region.lost."""
        return self.is_lost()

    def with_region(self, Region region not None):
        """Return a new table with one more region.

        Raises:
            MemoryMapError: the region overlaps another, or there are MAX_REGIONS already.
        """
        cdef uint64_t start = region.table.guest
        cdef uint32_t at = self.place_after(start)
        cdef const vr_region* table = self.map.regions
        if self.map.count >= MAX_REGIONS:
            raise MemoryMapError(f"there are {MAX_REGIONS} regions already")
        if at and start - table[at - 1].guest < table[at - 1].size:
            raise MemoryMapError(f"{self.regions[at - 1]!r} and {region!r} overlap")
        if at < self.map.count and table[at].guest - start < region.table.size:
            raise MemoryMapError(f"{region!r} and {self.regions[at]!r} overlap")
        return self.spliced(at, 0, (region,))

    def without_region(self, guest_addr, size):
        """Return a new table without the region of exactly this guest address and size.

        Raises:
            MemoryMapError: there is no such region.
        """
        cdef uint64_t start = as_address(guest_addr, "guest address of a region")
        cdef uint32_t at = self.place_after(start)
        if (
            at == 0 or self.map.regions[at - 1].guest != start
            or self.map.regions[at - 1].size != size
        ):
            raise MemoryMapError(f"no region at {guest_addr:#x} of {size:#x} bytes")
        return self.spliced(at - 1, 1, ())

    cdef uint32_t place_after(self, uint64_t address) noexcept:
        cdef const vr_region* last = vr_last(&self.map, address)
        if self.map.count == 0 or last.guest > address:
            return 0
        return <uint32_t>(last - self.map.regions) + 1

    cdef GuestMemory spliced(self, uint32_t at, uint32_t left_out, tuple added):
        cdef GuestMemory made = GuestMemory.__new__(GuestMemory)
        cdef uint32_t rest = at + left_out, i = at
        cdef Region region
        cdef vr_region* table = <vr_region*>calloc(
            self.map.count - left_out + len(added) + 1, sizeof(vr_region)
        )
        if table == NULL:
            raise MemoryError
        memcpy(table, self.map.regions, at * sizeof(vr_region))
        for region in added:
            table[i] = region.table
            i += 1
        memcpy(table + i, self.map.regions + rest, (self.map.count - rest) * sizeof(vr_region))
        free(<void*>made.map.regions)
        made.map.regions = table
        made.map.count = i + self.map.count - rest
        made.regions = (*self.regions[:at], *added, *self.regions[rest:])
        return made

    def user_to_guest(self, user_addr, length=1):
        """Return the guest address of `length` bytes at a virtual address of the frontend.

        Raises:
            AddressError: no region with a user address holds all of these bytes.
        """
        user_addr, length = PyNumber_Index(user_addr), PyNumber_Index(length)
        for region in self.regions:
            if region.user_addr is not None:
                offset = user_addr - region.user_addr
                if 0 <= offset < region.size and 0 <= length <= region.size - offset:
                    return region.guest_addr + offset
        raise AddressError(user_addr, length, "no region has this user address")

    cdef uint8_t* locate(self, uint64_t address, uint64_t length) except NULL:
        cdef const vr_region* region = vr_find(&self.map, address)
        if region == NULL or length > region.size - (address - region.guest):
            raise AddressError(address, length, "not in one region of guest memory")
        return region.host + (address - region.guest)

    def view(self, guest_addr, length):
        """Return a writable memoryview of guest memory, which it keeps alive. Not a copy.

        Raises:
            AddressError: the range is not wholly in one region.
        """
        cdef uint64_t at = 0, n = 0, offset
        read_range(guest_addr, length, &at, &n)
        cdef const vr_region* region = vr_find(&self.map, at)
        self.locate(at, n)
        offset = at - region.guest
        return memoryview(self.regions[region - self.map.regions])[offset:offset + n]

    cdef uint8_t* locate16(self, object guest_addr) except NULL:
        cdef uint64_t address = 0, size = 0
        read_range(guest_addr, 2, &address, &size)
        cdef uint8_t* at = self.locate(address, size)
        if <size_t>at & 1:
            raise AddressError(guest_addr, 2, "not aligned to 2 bytes")
        return at

    def load16(self, guest_addr):
        """Load a little-endian 16-bit number that another thread or process may be changing.

        The load is atomic, unlike `read`, and has acquire order: later reads are at least as new.
        For indices and flags of rings.

        Raises:
            AddressError: the two bytes are not in one region, or not aligned.
        """
        return vr_load16_acquire(self.locate16(guest_addr))

    def store16(self, guest_addr, uint16_t value):
        """Store a little-endian 16-bit number for another thread or process to load.

        The store is atomic. Earlier writes are visible before it (release), and it is visible
        before any later read (full fence): after publishing an event index, a caller may check the
        index again.

        Raises:
            AddressError: the two bytes are not in one region, or not aligned.
        """
        vr_store16_release(self.locate16(guest_addr), value)
        vr_fence()

    cdef int check(self, uint64_t address, uint64_t length) except -1:
        """Raise AddressError unless all bytes are in memory (adjacent regions count as one)."""
        cdef uint64_t at = address, left = length, there
        cdef const vr_region* region
        while left:
            region = vr_find(&self.map, at)
            if region == NULL:
                raise AddressError(address, length)
            there = region.size - (at - region.guest)
            if there >= left:
                return 0
            at += there
            left -= there
            if at == 0:
                raise AddressError(address, length, "wraps around 2**64")
        return 0

    cdef void copy(self, uint64_t address, uint8_t* local, uint64_t length, bint write) noexcept:
        """Copy a checked range out of (or into) guest memory, region by region."""
        cdef const vr_region* region
        cdef uint64_t offset, there
        while length:
            region = vr_find(&self.map, address)
            offset = address - region.guest
            there = min(length, region.size - offset)
            if write:
                vr_copy(region.host + offset, local, there)
            else:
                vr_copy(local, region.host + offset, there)
            address += there
            local += there
            length -= there

    def read(self, guest_addr, length):
        """Return a copy of guest memory as bytes; the range may cross adjacent regions.

        Raises:
            AddressError: a byte of the range is in no region.
        """
        cdef uint64_t at = 0, n = 0
        read_range(guest_addr, length, &at, &n)
        self.check(at, n)
        out = PyBytes_FromStringAndSize(NULL, n)
        self.copy(at, <uint8_t*>PyBytes_AS_STRING(out), n, False)
        return out

    cdef bint holds(self, const uint8_t* start, uint64_t length) noexcept:
        """Return whether a range of this process's memory overlaps a region."""
        cdef uint32_t i
        for i in range(self.map.count):
            if (
                <uint64_t>start - <uint64_t>self.map.regions[i].host < self.map.regions[i].size
                or <uint64_t>self.map.regions[i].host - <uint64_t>start < length
            ):
                return True
        return False

    def write(self, guest_addr, data):
        """Copy data into guest memory; the range may cross adjacent regions.

        Data in guest memory is copied aside first, so source and destination may overlap, even
        through two mappings of one file.

        Raises:
            AddressError: a byte of the range is in no region; nothing is written then.
        """
        cdef uint64_t at = 0, n = 0
        cdef Py_buffer held
        PyObject_GetBuffer(data, &held, PyBUF_SIMPLE)
        try:
            read_range(guest_addr, held.len, &at, &n)
            self.check(at, n)
            if n and self.holds(<const uint8_t*>held.buf, n):
                aside = PyBytes_FromStringAndSize(<char*>held.buf, n)
                self.copy(at, <uint8_t*>PyBytes_AS_STRING(aside), n, True)
            else:
                self.copy(at, <uint8_t*>held.buf, n, True)
        finally:
            PyBuffer_Release(&held)

    def __repr__(self):
        return f"GuestMemory({list(self.regions)!r})"


def _guest_addr(Region region not None):
    return region.table.guest


cdef int read_range(
    object guest_addr, object length, uint64_t* address, uint64_t* size
) except -1:
    """Convert both numbers once; raise AddressError unless they fit 64 bits and do not wrap."""
    guest_addr, length = PyNumber_Index(guest_addr), PyNumber_Index(length)
    if length < 0:
        raise LocalMisuseError(f"length {length} of guest memory is negative")
    if not 0 <= guest_addr <= UINT64_MAX or guest_addr + max(length, 1) - 1 > UINT64_MAX:
        raise AddressError(guest_addr, length, "wraps around 2**64")
    if length > UINT64_MAX:
        raise AddressError(guest_addr, length)
    address[0] = guest_addr
    size[0] = length
    return 0
