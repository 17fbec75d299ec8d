"""Registers side by side in one range of addresses, with an answer to every access.

Drivers access a register with its own width, and that is one look-up in a table here. Any other
access is defined as well, since guests are hostile and clients copy whole ranges: reading gives the
bytes of the registers that lie there and zero between them; writing reaches the registers that it
covers whole, lowest address first, and no other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

#: Windows up to this length get a table entry for each aligned access.
_TABLED_WINDOW = 64
_WIDTHS = (1, 2, 4)


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
        self._reads: dict[tuple[int, int], Callable[[], int]] = {}
        self._writes: dict[tuple[int, int], Callable[[int], None]] = {}

    def register(
        self,
        offset: int,
        width: int,
        read: Callable[[], int] | None = None,
        write: Callable[[int], None] | None = None,
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
                self._writes[offset, accepted] = write

        def read_part(at: int, size: int) -> int:
            value = 0 if read is None else read()
            return value >> 8 * at & (1 << 8 * size) - 1

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
        """Place a range that answers accesses itself: ``read(offset, size)`` within it, and
        ``write(offset, value, size)``."""
        self._add(_Entry(offset, offset + length, read, write, whole=False))
        if length <= _TABLED_WINDOW:
            for size in _WIDTHS:
                for at in range(0, length - size + 1, size):
                    self._reads[offset + at, size] = partial(read, at, size)

    def read(self, offset: int, size: int) -> int:
        """``size`` bytes at ``offset`` as a little-endian number."""
        handler = self._reads.get((offset, size))
        if handler is not None:
            return handler()
        value = 0
        for entry, start, end in self._overlapping(offset, size):
            value |= entry.read(start - entry.start, end - start) << 8 * (start - offset)
        return value

    def write(self, offset: int, value: int, size: int) -> None:
        """Write the low ``size`` bytes of ``value`` at ``offset``."""
        handler = self._writes.get((offset, size))
        if handler is not None:
            handler(value & (1 << 8 * size) - 1)
            return
        for entry, start, end in self._overlapping(offset, size):
            if entry.whole and (start, end) != (entry.start, entry.end):
                continue
            part = value >> 8 * (start - offset) & (1 << 8 * (end - start)) - 1
            entry.write(start - entry.start, part, end - start)

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
