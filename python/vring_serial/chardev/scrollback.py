"""The newest bytes of a stream, with their positions, in memory that may outlive the process."""

from __future__ import annotations

import os

from vring import RECORD_SIZE, receive_recorded, recorded

#: Bytes before the ring: the stream's number, and the record of what a socket gave.
_HEAD = 16
#: Most bytes that one call receives.
_RECEIVE_MAX = 1 << 18
#: How far the start of a line is looked for.
_LINE_MAX = 1 << 16


class Scrollback:
    """A ring of the newest bytes that a socket gave. A position counts from the stream's beginning.

    The kernel writes the length of each call into the memory (``vring.receive_recorded``), so that
    a successor of a process that was killed at any instruction finds whole bytes in order and loses
    or doubles none.

    Args:
        area: :meth:`area_size` bytes, aligned to 8; zeros, or what a predecessor left.

    Attributes:
        stream: a number that no other stream has.
        end: position behind the newest byte.
    """

    def __init__(self, area: memoryview) -> None:
        self._head = area[:8].cast("Q")
        self._record = area[_HEAD : _HEAD + RECORD_SIZE]
        self._ring = area[_HEAD + RECORD_SIZE :]
        if not self._head[0]:
            self._head[0] = int.from_bytes(os.urandom(8), "little") | 1
        self.stream = self._head[0]
        self.end = recorded(self._record)[1]

    @staticmethod
    def area_size(capacity: int) -> int:
        """Return the bytes of memory for a ring of ``capacity`` bytes."""
        return _HEAD + RECORD_SIZE + capacity

    @property
    def capacity(self) -> int:
        """Bytes that it holds at most."""
        return len(self._ring)

    @property
    def start(self) -> int:
        """Position of the oldest byte."""
        return max(0, self.end - len(self._ring))

    def receive(self, fd: int) -> int:
        """Add what a socket has, without waiting; return how many bytes, 0 for end of file.

        Raises OSError, BlockingIOError if there is nothing.
        """
        at = self.end % len(self._ring)
        count = receive_recorded(fd, self._ring[at : at + _RECEIVE_MAX], self._record)
        self.end = recorded(self._record)[1]
        return count

    def read(self, position: int, most: int) -> memoryview:
        """Return bytes from a position between start and end, as far as they lie in one piece.

        They are valid until the next :meth:`receive`.
        """
        at = position % len(self._ring)
        return self._ring[at : at + min(most, self.end - position)]

    def line_start(self, position: int) -> int:
        """Return where a line begins, at a position between start and end or soon after it.

        A position without a line's end near it is returned as it is.
        """
        if position <= 0 or position >= self.end:
            return position
        before = position - 1 if position > self.start else position
        at = before
        while at < self.end and at - before < _LINE_MAX:
            piece = bytes(self.read(at, _LINE_MAX))
            if (found := piece.find(b"\n")) >= 0:
                return at + found + 1
            at += len(piece)
        return position
