"""What came for several front ends of one back end, and which of them has got how much of it."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import struct
import termios

from vring import RECORD_SIZE, receive_recorded, recorded, send_recorded, set_record
from vring_serial.chardev.base import DescriptorEnd
from vring_serial.chardev.options import FRONTS_MAX
from vring_serial.chardev.relay import Relay

#: The key after which a command follows: Ctrl-A, as in QEMU.
ESCAPE = 1
#: Bytes that are taken from a back end before its front ends have them.
CAPACITY = 1 << 14

#: Where the input is: bytes handled, bytes sent to each front end, focus (FRONTS_MAX: none), and
#: whether the last byte handled was the escape.
_PLACE = struct.Struct(f"<Q{FRONTS_MAX}QBB6x")
#: Bytes for the name of a front end.
_NAME = 48
#: What a terminal gives at once.
_SPLICE_BYTES = 4096
#: Which place counts; where a call on a relay began, and what the relay held, 0: no call is open.
_WHICH, _BEGUN, _HELD = range(3)
_PLACES = 3 * 8
_NAMES = _PLACES + 2 * _PLACE.size
_RECORDS = (_NAMES + FRONTS_MAX * _NAME + 7) // 8 * 8
_RING = _RECORDS + (FRONTS_MAX + 1) * RECORD_SIZE
#: Bytes of memory for a MuxInput.
AREA_SIZE = _RING + CAPACITY


class MuxInput:
    """The bytes that a back end gave, on their way to the front end that has the focus.

    A front end has a number, below FRONTS_MAX, and a name, by which a successor knows it again.
    Every step is one that a process can be killed before or after: the kernel counts what sockets
    took and gave (``vring.send_recorded``), what a relay gave is what it no longer holds, and where
    the input is stands in one of two places, of which one store says which counts. So a successor
    goes on with the same focus, and neither loses nor doubles a byte.

    Args:
        area: AREA_SIZE bytes, aligned to 8; zeros, or what a predecessor left.
    """

    def __init__(self, area: memoryview) -> None:
        self._head = area[:_PLACES].cast("Q")
        self._places = area[_PLACES:_NAMES]
        self._names = area[_NAMES : _NAMES + FRONTS_MAX * _NAME]
        self._records = [
            area[_RECORDS + i * RECORD_SIZE : _RECORDS + (i + 1) * RECORD_SIZE]
            for i in range(FRONTS_MAX + 1)
        ]
        self._ring = area[_RING : _RING + CAPACITY]
        parsed, *sent, focus, escaped = _PLACE.unpack_from(
            self._places, (self._head[_WHICH] & 1) * _PLACE.size
        )
        self._parsed: int = parsed
        self._sent: list[int] = sent
        self._focus: int = min(focus, FRONTS_MAX)
        self._escaped = bool(escaped)
        if not any(self.names):
            self._focus = FRONTS_MAX
        elif self._focus < FRONTS_MAX:
            self._note_sent(recorded(self._records[self._focus])[1] - self._sent[self._focus])

    # --- front ends

    @property
    def names(self) -> list[str]:
        """The front ends' names by number; "" for a number that is free."""
        return [
            bytes(self._names[i * _NAME : (i + 1) * _NAME]).rstrip(b"\0").decode("ascii", "replace")
            for i in range(FRONTS_MAX)
        ]

    @property
    def focus(self) -> int | None:
        """Number of the front end that the input is for; None: of none."""
        return self._focus if self._focus < FRONTS_MAX else None

    def add(self, name: str, number: int) -> None:
        """Give a front end a number. It has the focus then, unless it had the number already."""
        if self.names[number] == name:
            return
        set_record(self._records[number], 0)
        self._sent[number] = 0
        self._name(number, name)
        self.set_focus(number)

    def remove(self, number: int, focus: int | None) -> None:
        """Free a number; if it has the focus, another one gets it, or none."""
        if self._focus == number:
            self.set_focus(focus)
        self._name(number, "")

    def set_focus(self, number: int | None) -> None:
        """Have the input be for a front end from here on."""
        self._focus = FRONTS_MAX if number is None else number
        self._note()

    # --- what came

    @property
    def pending(self) -> int:
        """How many bytes wait."""
        return self._received - self._parsed

    def receive(self, end: DescriptorEnd) -> int:
        """Take what a back end has, without waiting; return how many bytes, 0 at its end.

        For a ring with room. Raises OSError, BlockingIOError if there is nothing.
        """
        received = self._received
        at = received % CAPACITY
        room = self._ring[at : at + CAPACITY - (received - self._parsed)]
        if end.read_relay is not None:
            return self._receive_through(end.read_fd, end.read_relay, room)
        try:
            return receive_recorded(end.read_fd, room, self._records[-1])
        except OSError as error:
            if error.errno != errno.ENOTSOCK:
                raise
        count = os.readv(end.read_fd, [room])
        set_record(self._records[-1], 0, received + count)
        return count

    def forget(self) -> None:
        """Drop what waits: whoever sent it has left."""
        self._parsed, self._escaped = self._received, False
        self._note()

    # --- what is done with it

    def command(self) -> int | None:
        """Take the byte after an escape; None if the next bytes are for a front end, or none are.

        The escape twice is one for the front end.
        """
        while self.pending:
            byte = self._ring[self._parsed % CAPACITY]
            if self._escaped and byte != ESCAPE:
                self._parsed, self._escaped = self._parsed + 1, False
                self._note()
                return byte
            if self._escaped or byte != ESCAPE:
                return None
            self._parsed, self._escaped = self._parsed + 1, True
            self._note()
        return None

    def send(self, fd: int) -> None:
        """Send the next bytes to the front end that has the focus, after ``command`` gave None.

        Args:
            fd: its socket.

        Raises BlockingIOError, OSError.
        """
        at = self._parsed % CAPACITY
        run = self._ring[at : at + min(self.pending, 1 if self._escaped else CAPACITY)]
        escape = -1 if self._escaped else bytes(run).find(ESCAPE)
        self._note_sent(send_recorded(fd, run[:escape] if escape > 0 else run, self._record))

    # --- internals

    @property
    def _received(self) -> int:
        return recorded(self._records[-1])[1]

    @property
    def _record(self) -> memoryview:
        return self._records[self._focus]

    def _receive_through(self, fd: int, relay: Relay, room: memoryview) -> int:
        """Take what the relay of a pipe or terminal holds, or what that has, through the relay."""
        if self._head[_HELD]:  # of a predecessor, who died in the call
            gone = self._head[_HELD] - _held(relay)
            set_record(self._records[-1], 0, self._head[_BEGUN] + max(gone, 0))
            self._head[_HELD] = 0
            if gone > 0:
                return gone
        received = self._received
        if not _held(relay):
            try:
                flags = os.SPLICE_F_NONBLOCK
                if not os.splice(fd, relay.write_fd, _SPLICE_BYTES, flags=flags):
                    return 0
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # It cannot be spliced from: what a predecessor died with may be lost.
                count = os.readv(fd, [room])
                set_record(self._records[-1], 0, received + count)
                return count
        self._head[_BEGUN] = received
        self._head[_HELD] = _held(relay)
        count = os.readv(relay.read_fd, [room])
        set_record(self._records[-1], 0, received + count)
        self._head[_HELD] = 0
        return count

    def _note_sent(self, count: int) -> None:
        """Note that the front end with the focus has got ``count`` bytes more."""
        if count > 0:
            self._parsed += count
            self._sent[self._focus] += count
            self._escaped = False
            self._note()

    def _note(self) -> None:
        """Write down where the input is; it counts with the last store."""
        other = ~self._head[_WHICH] & 1
        place = (self._parsed, *self._sent, self._focus, self._escaped)
        _PLACE.pack_into(self._places, other * _PLACE.size, *place)
        self._head[_WHICH] = other

    def _name(self, number: int, name: str) -> None:
        encoded = name.encode().ljust(_NAME, b"\0")
        assert len(encoded) == _NAME, "the names of controllers are short"
        self._names[number * _NAME : (number + 1) * _NAME] = encoded


def _held(relay: Relay) -> int:
    """Return how many bytes a relay holds."""
    count = array.array("i", [0])
    fcntl.ioctl(relay.read_fd, termios.FIONREAD, count)
    return count[0]
