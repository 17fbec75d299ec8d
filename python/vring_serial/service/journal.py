"""What a worker must not forget, in shared memory that outlives it.

The journal is a memfd that the keeper holds too. Named *sections* hold one saved state each
(``vring_serial.saving``) and are written whole; named *areas* are plain memory, for whoever has a
layout of its own. Numbers are little-endian, offsets count from the start of the file:

======  ====  ==================================================================================
offset  size  contents
======  ====  ==================================================================================
0       8     ``VRINGJRN``
8       4     version of this layout: 1
12      4     entries of the directory: 2048
16      8     where unused space begins
64            the directory, 64 bytes an entry: extent (8), kind (1, 0: free), length of the name
              (1), name (54)
131136        extents
======  ====  ==================================================================================

An extent is a power of two in size and is named by one number, so that a section moves to a larger
one by a single store: its offset shifted left by 8, plus the logarithm of its size. A section's
extent has two halves, each with a sequence number (8), the length of the state (4), its CRC-32 (4)
and the state. The half with the higher number counts. The number is stored last, so a writer that
dies at any instruction leaves the state before it or the new one, and never a mixture.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import zlib

from vring_serial.errors import ResourceError, StateError
from vring_serial.lifetime import Closing

MAGIC = b"VRINGJRN"
LAYOUT_VERSION = 1
ENTRIES = 2048
#: Size of the file in bytes. Only what was written takes memory.
JOURNAL_SIZE = 1 << 30

_HEADER = struct.Struct("<8sIIQ")
_ENTRY = struct.Struct("<QBB54s")
_HALF = struct.Struct("<QII")
_NUMBER = struct.Struct("<Q")
_DIRECTORY = 64
_FIRST_EXTENT = _DIRECTORY + ENTRIES * _ENTRY.size
#: A :func:`checksum` is of so many bytes.
_CHECKED = 16 << 20
_PIECE = 1 << 16
_SMALLEST = 12  # logarithm: a page
_LARGEST = 29
_FREE, _SECTION, _AREA = range(3)


class Journal(Closing):
    """A mapped journal.

    One process writes at a time; see :meth:`lock`.

    Args:
        fd: from :meth:`create` or a predecessor; stays the caller's.
        read_only: another process may be writing, and is not disturbed.

    Raises:
        StateError: it is no journal, or of a layout that is not known.
    """

    def __init__(self, fd: int, *, read_only: bool = False) -> None:
        size = os.fstat(fd).st_size
        if size != JOURNAL_SIZE:
            raise StateError(f"the journal has {size} bytes, not {JOURNAL_SIZE}")
        self._fd = fd
        self._map = mmap.mmap(fd, size, access=mmap.ACCESS_READ if read_only else mmap.ACCESS_WRITE)
        # Guest memory and the journal are of no use in a core dump, and large.
        self._map.madvise(mmap.MADV_DONTDUMP)
        self._names: dict[str, int] = {}
        self._areas: list[memoryview] = []
        self._free: dict[int, list[int]] = {}  # logarithm -> offsets, zeroed
        try:
            self._load()
            if not read_only:
                self._find_gaps()
        except BaseException:
            self._map.close()
            raise

    @staticmethod
    def create() -> int:
        """Return the descriptor of a new, empty journal. Raises ResourceError."""
        try:
            fd = os.memfd_create("vring-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise ResourceError(f"no memory for a journal: {error.strerror}") from None
        try:
            os.ftruncate(fd, JOURNAL_SIZE)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            os.pwrite(fd, _HEADER.pack(MAGIC, LAYOUT_VERSION, ENTRIES, _FIRST_EXTENT), 0)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def close(self) -> None:
        """Unmap the journal, once nobody uses its areas any more."""
        with contextlib.suppress(BufferError):  # a queue has one: it goes with the queue
            for area in self._areas:
                area.release()
            self._map.close()
        self._areas.clear()

    def lock(self) -> None:
        """Become the one process that writes. The lock goes with the process.

        Raises StateError if another one has it: that one may still write.
        """
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StateError("another process still uses the journal") from None

    def unlock(self) -> None:
        """Write no more, for another process does from now on."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN)

    @property
    def sections(self) -> list[str]:
        """The names of the sections, sorted."""
        return sorted(n for n, at in self._names.items() if self._entry(at)[1] == _SECTION)

    def read(self, name: str) -> bytes | None:
        """Return what was last written to a section; None if there is none.

        Raises StateError if both halves are damaged.
        """
        found = self._newest(name)
        return None if found is None else found[1]

    def write(self, name: str, state: bytes) -> None:
        """Write a section, which is made if need be; from then on a successor reads it.

        What is there already is not written again, so that a process that changes nothing leaves
        the journal as it was (see :func:`checksum`).

        Raises:
            ResourceError: the journal is full.
        """
        needed = _HALF.size + len(state)
        at = self._names.get(name)
        if at is None:
            at = self._add(name, _SECTION, 2 * needed)
        offset, size = self._extent(at, name)
        halves = [_HALF.unpack_from(self._map, offset + i * (size // 2)) for i in range(2)]
        sequence = max(half[0] for half in halves) + 1
        with contextlib.suppress(StateError):  # a damaged one is written anew
            if sequence > 2 and self.read(name) == state:
                return
        if needed > size // 2:
            self._move(at, 2 * needed, sequence, state)
            return
        into = offset + (size // 2 if halves[0][0] > halves[1][0] else 0)
        self._fill(into, sequence, state)

    def drop(self, name: str) -> None:
        """Remove a section or an area, if it is there."""
        at = self._names.pop(name, None)
        if at is not None:
            extent = self._entry(at)[0]
            _NUMBER.pack_into(self._map, at, 0)
            _ENTRY.pack_into(self._map, at, 0, _FREE, 0, b"")
            self._discard(extent)

    def clear(self) -> None:
        """Remove all sections and areas."""
        for name in list(self._names):
            self.drop(name)

    def area(self, name: str, size: int) -> memoryview:
        """Return ``size`` bytes of shared memory, zeroed when they are made; aligned to a page.

        Valid until :meth:`close`. Raises ResourceError if the journal is full, and StateError if a
        predecessor's area of this name has another size.
        """
        at = self._names.get(name)
        if at is None:
            at = self._add(name, _AREA, size)
        offset, there = self._extent(at, name)
        if self._entry(at)[1] != _AREA or there != 1 << _logarithm(size):
            raise StateError(f"journal: {name} is not an area of {size} bytes")
        whole = memoryview(self._map)
        view = whole[offset : offset + size]
        whole.release()
        self._areas.append(view)
        return view

    # --- internals; `at` is an entry's offset

    def _load(self) -> None:
        magic, layout, entries, _ = _HEADER.unpack_from(self._map)
        if magic != MAGIC:
            raise StateError("the journal does not begin as one")
        if layout != LAYOUT_VERSION or entries != ENTRIES:
            raise StateError(f"the journal has layout {layout}; {LAYOUT_VERSION} is known")
        for i in range(ENTRIES):
            at = _DIRECTORY + i * _ENTRY.size
            _, kind, length, name = self._entry(at)
            if kind == _FREE:
                continue
            try:
                text = name[:length].decode()
            except UnicodeDecodeError:
                raise StateError(f"journal: entry {i} has no name") from None
            if kind not in (_SECTION, _AREA) or not text or text in self._names:
                raise StateError(f"journal: entry {i} ({text!r}) is damaged")
            self._extent(at, text)
            self._names[text] = at

    def _find_gaps(self) -> None:
        """Note what lies free between extents. Raises StateError if some overlap."""
        used = sorted((self._extent(at, name), name) for name, at in self._names.items())
        end = _FIRST_EXTENT + -_FIRST_EXTENT % 4096
        free = max(_HEADER.unpack_from(self._map)[3], end)
        for (offset, size), name in [*used, ((free, 0), "unused space")]:
            if offset < end:
                raise StateError(f"journal: {name} is damaged")
            while end < offset:
                logarithm = min((offset - end).bit_length() - 1, _LARGEST)
                if logarithm < _SMALLEST:
                    break
                self._discard(end << 8 | logarithm)
                end += 1 << logarithm
            end = offset + size

    def _entry(self, at: int) -> tuple[int, int, int, bytes]:
        entry: tuple[int, int, int, bytes] = _ENTRY.unpack_from(self._map, at)
        return entry

    def _extent(self, at: int, name: str) -> tuple[int, int]:
        """Return offset and size of an entry's extent. Raises StateError."""
        (extent,) = _NUMBER.unpack_from(self._map, at)
        offset, logarithm = extent >> 8, extent & 0xFF
        if not _SMALLEST <= logarithm <= _LARGEST:
            raise StateError(f"journal: {name} is damaged")
        if offset < _FIRST_EXTENT or offset % 4096 or offset + (1 << logarithm) > JOURNAL_SIZE:
            raise StateError(f"journal: {name} is damaged")
        return offset, 1 << logarithm

    def _newest(self, name: str) -> tuple[int, bytes] | None:
        at = self._names.get(name)
        if at is None or self._entry(at)[1] != _SECTION:
            return None
        offset, size = self._extent(at, name)
        found = []
        for start in (offset, offset + size // 2):
            sequence, length, checksum = _HALF.unpack_from(self._map, start)
            if not sequence or length > size // 2 - _HALF.size:
                continue
            state = self._map[start + _HALF.size : start + _HALF.size + length]
            if zlib.crc32(state) == checksum:
                found.append((sequence, state))
        if not found:
            raise StateError(f"journal: {name} is damaged")
        return max(found)

    def _fill(self, start: int, sequence: int, state: bytes) -> None:
        body = start + _HALF.size
        self._map[body : body + len(state)] = state
        struct.pack_into("<II", self._map, start + 8, len(state), zlib.crc32(state))
        _NUMBER.pack_into(self._map, start, sequence)

    def _add(self, name: str, kind: int, size: int) -> int:
        encoded = name.encode()
        if not 1 <= len(encoded) <= 54:
            raise StateError(f"journal: {name!r} cannot be a name")
        for i in range(ENTRIES):
            at = _DIRECTORY + i * _ENTRY.size
            if self._entry(at)[1] == _FREE:
                break
        else:
            raise ResourceError(f"the journal has room for {ENTRIES} names, and {name} is one more")
        extent = self._allocate(name, size)
        # The kind makes it an entry, and is stored last.
        _ENTRY.pack_into(self._map, at, extent, _FREE, len(encoded), encoded)
        if kind == _SECTION:
            self._fill(extent >> 8, 1, b"")
        self._map[at + 8] = kind
        self._names[name] = at
        return at

    def _move(self, at: int, size: int, sequence: int, state: bytes) -> None:
        """Put a section into a larger extent."""
        before = self._entry(at)[0]
        extent = self._allocate("a section", size)
        self._fill(extent >> 8, sequence, state)
        _NUMBER.pack_into(self._map, at, extent)
        self._discard(before)

    def _allocate(self, name: str, size: int) -> int:
        logarithm = _logarithm(size)
        free: int
        if gaps := self._free.get(logarithm):
            return gaps.pop() << 8 | logarithm
        _, _, _, free = _HEADER.unpack_from(self._map)
        offset = -(-free // 4096) * 4096
        if logarithm > _LARGEST or offset + (1 << logarithm) > JOURNAL_SIZE:
            raise ResourceError(f"the journal is full: {name} needs {size} bytes")
        _NUMBER.pack_into(self._map, 16, offset + (1 << logarithm))
        return offset << 8 | logarithm

    def _discard(self, extent: int) -> None:
        """Give an extent's memory back, and its addresses to the next one of its size."""
        offset, logarithm = extent >> 8, extent & 0xFF
        self._map.madvise(mmap.MADV_REMOVE, offset, 1 << logarithm)
        self._free.setdefault(logarithm, []).append(offset)


def checksum(fd: int) -> int:
    """Return a number that is another one, as good as always, after the journal was written to."""
    used = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))[3]
    found = 0
    for start in range(0, min(used, _CHECKED), _PIECE):
        found = zlib.crc32(os.pread(fd, _PIECE, start), found)
    return found


def _logarithm(size: int) -> int:
    return max(_SMALLEST, (size - 1).bit_length())
