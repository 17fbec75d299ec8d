"""Registers in one range of addresses, with a defined result for every access.

Drivers access a register with its own width, which takes one look-up in a table. All other accesses
are defined as well, since guests are hostile and clients copy whole ranges: a read returns the
bytes of the registers in the range, with zeros between them; a write changes the registers that it
covers whole, in the order of their addresses. The handlers of such an access are determined once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

#: Accesses of at most this size are remembered, as long as there are no more of them than that: a
#: guest must not fill its emulator's memory.
_REMEMBERED_SIZE = 8
_REMEMBERED_MAX = 4096

ReadHandler = Callable[[], int]
WriteHandler = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A register, or a window whose ``read`` and ``write`` take the offset in it themselves."""

    start: int
    end: int
    read: Callable[[int, int], int]
    write: Callable[[int, int, int], None]
    whole: bool


class RegisterBank:
    """A range of little-endian registers.

    Args:
        size: bytes of the range; what lies outside reads as zero and ignores writes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._starts: list[int] = []
        self._entries: list[_Entry] = []
        # By offset and size; with what takes a write, the bits that such an access has.
        self._reads: dict[tuple[int, int], ReadHandler] = {}
        self._writes: dict[tuple[int, int], tuple[WriteHandler, int]] = {}

    def register(
        self,
        offset: int,
        width: int,
        read: ReadHandler | None = None,
        write: WriteHandler | None = None,
        *,
        also_written_as: Sequence[int] = (),
    ) -> None:
        """Place a register of ``width`` bytes.

        Args:
            read: returns the value, which must fit; None: reads as zero.
            write: takes the value; None: ignores writes.
            also_written_as: widths of narrower writes at ``offset`` that count too.
        """
        if read is not None:
            self._reads[offset, width] = read
        if write is not None:
            for accepted in (width, *also_written_as):
                self._writes[offset, accepted] = write, _ones(accepted)

        def read_part(at: int, size: int) -> int:
            value = 0 if read is None else read()
            return value >> 8 * at & _ones(size)

        def write_whole(at: int, value: int, size: int) -> None:
            if write is not None:
                write(value)

        self._add(_Entry(offset, offset + width, read_part, write_whole, whole=True))

    def window(
        self,
        offset: int,
        length: int,
        read: Callable[[int, int], int],
        write: Callable[[int, int, int], None],
    ) -> None:
        """Place a range whose accesses ``read`` and ``write`` handle.

        Args:
            offset, length: bytes.
            read: returns ``size`` bytes at an offset in the range: ``read(offset, size)``.
            write: writes them: ``write(offset, value, size)``.
        """
        self._add(_Entry(offset, offset + length, read, write, whole=False))

    def read(self, offset: int, size: int) -> int:
        """Return ``size`` bytes at ``offset`` as a little-endian number."""
        return (self._reads.get((offset, size)) or self._reader(offset, size))()

    def write(self, offset: int, value: int, size: int) -> None:
        """Write the low ``size`` bytes of ``value`` at ``offset``."""
        handler, mask = self._writes.get((offset, size)) or self._writer(offset, size)
        handler(value & mask)

    # --- accesses that are no register's own

    def _reader(self, offset: int, size: int) -> ReadHandler:
        """Return what reads such an access: each register or window in it, shifted."""
        parts = tuple(
            (partial(entry.read, start - entry.start, end - start), 8 * (start - offset))
            for entry, start, end in self._overlapping(offset, size)
        )

        def read_parts() -> int:
            value = 0
            for read, shift in parts:
                value |= read() << shift
            return value

        alone = len(parts) == 1 and not parts[0][1]
        handler: ReadHandler = parts[0][0] if alone else read_parts
        if size <= _REMEMBERED_SIZE and len(self._reads) < _REMEMBERED_MAX:
            self._reads[offset, size] = handler
        return handler

    def _writer(self, offset: int, size: int) -> tuple[WriteHandler, int]:
        """Return what handles such a write: windows in it, and registers that it covers whole."""
        parts = tuple(
            (entry.write, start - entry.start, 8 * (start - offset), end - start)
            for entry, start, end in self._overlapping(offset, size)
            if not entry.whole or (start, end) == (entry.start, entry.end)
        )

        def write_parts(value: int) -> None:
            for write, at, shift, length in parts:
                write(at, value >> shift & _ones(length), length)

        handler = write_parts, _ones(size)
        if size <= _REMEMBERED_SIZE and len(self._writes) < _REMEMBERED_MAX:
            self._writes[offset, size] = handler
        return handler

    def _add(self, entry: _Entry) -> None:
        at = bisect_right(self._starts, entry.start)
        self._starts.insert(at, entry.start)
        self._entries.insert(at, entry)

    def _overlapping(self, offset: int, size: int) -> list[tuple[_Entry, int, int]]:
        """Each entry in the range, with the first and the end offset of the common part."""
        end = min(offset + size, self.size)
        at = max(bisect_right(self._starts, offset) - 1, 0)
        found = []
        while at < len(self._entries) and self._starts[at] < end:
            entry = self._entries[at]
            if entry.end > offset:
                found.append((entry, max(offset, entry.start), min(end, entry.end)))
            at += 1
        return found


def _ones(size: int) -> int:
    """Return the largest number of ``size`` bytes."""
    return (1 << 8 * size) - 1
