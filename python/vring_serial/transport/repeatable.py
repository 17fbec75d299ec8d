"""A connection on which a successor of this process can go on, losing and doubling nothing."""

from __future__ import annotations

import errno
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vring import RECORD_SIZE, receive_recorded, recorded, send_recorded, set_record
from vring_serial import unix_fds
from vring_serial.keeping import Keeping
from vring_serial.proto.framing import share_fds
from vring_serial.saving import check_range
from vring_serial.transport.connection import Connection
from vring_serial.transport.pieces import Pieces
from vring_serial.unix_fds import Received

#: Seconds until a message of which only a part is there is looked at again.
REST_SECONDS = 0.005
#: Linux's number, but on some old architectures; not in every Python.
_SO_PEEK_OFF = getattr(socket, "SO_PEEK_OFF", 42)
#: Bytes of a connection's records.
AREA_SIZE = 2 * RECORD_SIZE
#: Bytes of a message that a unix stream socket takes whole or not at all. Linux makes one buffer of
#: up to 48 KiB, as long as that is less than half of what the socket may hold (212992 by default).
ATOMIC_SIZE = 40 << 10
#: Bytes within which messages that a peer sent at once are told apart.
PIECE_SIZE = 64 << 10
#: Longest message that is looked at: the peer's socket holds it whole, however small its buffer is,
#: and every message with descriptors is shorter.
LOOKED_AT = 8 << 10
#: Bytes before a longer message in the memory for it: its size.
_LONG_HEAD = struct.Struct("<Q")


@dataclass(slots=True)
class Handled:
    """A message that has been handled; what has become of it since, the connection's records say.

    Attributes:
        number: one more than that of the message before.
        message: its bytes; of one that is taken off before it is handled, the header alone.
        answer: the bytes that are to be sent for it.
    """

    number: int = 0
    message: bytes = b""
    answer: bytes = b""


def check_handled(handled: Handled) -> None:
    """Check a message that somebody else wrote down. Raises StateError."""
    check_range("the number of a message", handled.number, 63)


class RepeatableConnection(Connection):
    """Takes a message off the socket only after it was handled and answered.

    The steps are: look at one message (MSG_PEEK), handle it, have that written down with a number,
    answer, take it off. Two records (``vring.send_recorded``) say how many bytes of the answer and
    of the message have gone; with another number they speak of the message before. A successor does
    the rest. So no message is lost, none is handled twice once that was written down, and every
    byte of an answer is sent once.

    What is asked of the peer (:meth:`ask`) is not written down, and no message waits until it was
    sent: a peer may want to be read before it reads on.

    A message that the peer's socket may not hold whole is taken off as it comes, into memory that
    outlives the process; the record of what was taken off has its number before it was handled. It
    has no descriptors.

    Each message is sent for itself: the kernel takes one of at most ATOMIC_SIZE bytes whole or not
    at all, so that no successor goes on behind half a message.

    Args:
        size_of: returns the size in bytes of the message that begins with these; of what is no
            beginning, as many as there are.
        header_size: bytes from which on ``size_of`` knows.
        fds_of: returns how many descriptors may be beside this message.
        pieces: has the descriptors of messages that came at once; None: the peer can send none.
        record: writes down what was handled, with all that it led to.
        handled: what a predecessor wrote down.
        area: AREA_SIZE bytes of memory that outlives the process.
        handled_fds: descriptors that go with its answer; taken over.
        room: returns memory that outlives the process, for the longest message; 0 when it is made.
            None: the peer sends no message that is too long for its socket.
        arguments: see Connection.
    """

    _merges = False

    def __init__(
        self,
        sock: socket.socket,
        *,
        size_of: Callable[[bytes], int],
        header_size: int,
        fds_of: Callable[[bytes], range],
        pieces: Pieces | None,
        record: Callable[[Handled], None],
        handled: Handled,
        area: memoryview,
        handled_fds: Sequence[int] = (),
        room: Callable[[], memoryview] | None = None,
        **arguments: Any,
    ) -> None:
        self._room = room
        self._space: memoryview | None = None  # that it returned
        self._long = 0  # bytes of the message that is being handled, if it was taken off before
        self._size_of = size_of
        self._header_size = header_size
        self._fds_of = fds_of
        self._pieces = pieces
        self._record = record
        self._number = handled.number
        self._sending, self._taking = area[:RECORD_SIZE], area[RECORD_SIZE:AREA_SIZE]
        self._handled_fds = list(handled_fds)
        self._message = b""  # what is being handled, or waits to be taken off
        self._asked: deque[bytes] = deque()  # not sent yet
        super().__init__(sock, **arguments)
        self._look_from(-1)  # the predecessor may have died while it looked farther
        answered = self._gone(self._sending)
        if self._takes_long:  # so all that was before has gone
            self._forget_fds()
            # Perhaps all of it is there, and no more comes. Not in the loop's next turn, in which
            # the session takes over what a predecessor left.
            self._loop.call_soon(self._loop.call_soon, self._readable)
            return
        taken = self._gone(self._taking)
        self._begin(answered, taken)
        if answered:
            self._forget_fds()  # they went with the first byte
        if taken < len(handled.message) or answered < len(handled.answer):
            if taken > len(handled.message):
                self._long, taken = taken, 0
            self._message = handled.message[taken:]
            self._loop.call_soon(self._finish, handled.answer[answered:])

    def ask(self, data: bytes) -> None:
        """See Connection."""
        if not self.closed:
            self._asked.append(data)
            if not self._handling:
                self._flush()

    def close(self) -> None:
        """See Connection."""
        self._message = b""
        self._asked.clear()
        self._forget_fds()
        if self._pieces is not None:
            self._pieces.close()
        super().close()

    def _gone(self, record: memoryview) -> int:
        """Return how many bytes of this message, or of its answer, have gone."""
        number, length = recorded(record)
        return length if number == self._number else 0

    def _begin(self, answered: int = 0, taken: int = 0) -> None:
        """Have the records speak of this message."""
        set_record(self._taking, self._number, taken)
        set_record(self._sending, self._number, answered)

    def _finish(self, answer: bytes) -> None:
        """Do what is left to do for the message that a predecessor handled."""
        fds, self._handled_fds = self._handled_fds, []
        if not self.closed:
            self.send(answer, fds)

    def _readable(self) -> None:
        if self.closed:
            return
        try:
            received = self._take_long() if self._takes_long else self._look()
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        if received is None:
            self._wait_for_rest()
        elif not received.data:
            self._fail(None)
        else:
            self._message = received.data[: self._header_size if self._long else None]
            self._handle(partial(self._receive_one, received))

    def _receive_one(self, received: Received) -> bool:
        """Have a message handled; it was the only one, and another turn would count as one more."""
        self._received(received)
        return False

    def _look(self) -> Received | None:
        """Look at the next message, with its descriptors.

        None: not all of it is there. Without bytes: the peer has gone, perhaps within a message.
        Raises BlockingIOError if nothing is there, or a long message that is not whole; or OSError.
        """
        head = self._sock.recv(self._header_size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        if not head:
            return Received(b"")
        size = self._message_size(head)
        if self._is_long(size):
            return self._begin_long(size)
        seen = Received(self._look_into_piece(size))
        while len(seen.data) < size:
            before = len(seen.data)
            try:
                seen = self._peek(size, seen)
            except BlockingIOError:
                self._closer.close(seen.fds)
                return None
            if len(seen.data) == before:
                self._closer.close(seen.fds)
                return Received(b"")
            size = self._message_size(seen.data)
            if self._is_long(size):
                self._closer.close(seen.fds)
                return self._begin_long(size)
        fds = self._take_from_piece() + seen.fds
        return Received(seen.data, fds, seen.truncated or len(fds) > self._max_fds)

    def _message_size(self, data: bytes) -> int:
        """Return the size of the message that begins with these bytes, as far as they tell."""
        whole = len(data) >= self._header_size
        return self._size_of(data[: self._header_size]) if whole else self._header_size

    def _is_long(self, size: int) -> bool:
        return size > LOOKED_AT and self._room is not None

    @property
    def _takes_long(self) -> bool:
        """Whether a part of the next message may have been taken off.

        Before the first one the record is of the connection before.
        """
        has_room = self._room is not None and self._number > 0
        return has_room and recorded(self._taking)[0] == self._number + 1

    def _begin_long(self, size: int) -> Received:
        if not self._number:
            raise OSError(errno.EMSGSIZE, f"its first message has {size} bytes")
        _LONG_HEAD.pack_into(self._long_room(), 0, size)
        set_record(self._taking, self._number + 1)
        return self._take_long()

    def _long_room(self) -> memoryview:
        if self._space is None:
            assert self._room is not None
            self._space = self._room()
        return self._space

    def _take_long(self) -> Received:
        """Take off what is there of a long message; return it when it is whole.

        Raises BlockingIOError if it is not whole yet, or OSError.
        """
        room = self._long_room()
        (size,) = _LONG_HEAD.unpack_from(room)
        space, taken = room[_LONG_HEAD.size :], recorded(self._taking)[1]
        if not taken <= size <= len(space):
            raise OSError(errno.EBADMSG, f"{taken} bytes were kept of a message of {size}")
        while taken < size:
            more = receive_recorded(self._sock.fileno(), space[taken:size], self._taking)
            if not more:
                return Received(b"")
            taken += more
        self._long = size
        return Received(bytes(space[:size]), self._take_from_piece())

    def _look_from(self, offset: int) -> None:
        """Have looks begin behind so many bytes; -1: at the first again."""
        self._sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, offset)

    def _peek(self, size: int, seen: Received) -> Received:
        """Look at the next message of ``size`` bytes behind what was ``seen`` of it.

        A look goes on into the next piece of the stream, even when it has room for no byte of it,
        and brings that one's descriptors. It ends behind the first piece that has some: so there is
        a byte more if they are another message's, or the peer has sent several in one piece.
        """
        at = len(seen.data)
        room = size - at + 1
        received = self._peek_at(at, room)
        data = (seen.data + received.data)[:size]
        if len(received.data) == room and received.fds and not received.truncated:
            self._closer.close(received.fds)
            return self._begin_piece(data, seen)
        return Received(data, seen.fds + received.fds, seen.truncated or received.truncated)

    def _peek_at(self, offset: int, size: int) -> Received:
        """Look at so many bytes, of which ``offset`` others are to be taken off before."""
        if not offset:
            return unix_fds.receive(self._sock, size, self._max_fds, peek=True)
        self._look_from(offset)
        try:
            return unix_fds.receive(self._sock, size, self._max_fds, peek=True)
        finally:
            self._look_from(-1)

    def _begin_piece(self, message: bytes, seen: Received) -> Received:
        """Look at all messages up to the end of a piece with descriptors, and share these out.

        Args:
            message: the first of them.
            seen: what of that was in pieces before, with its descriptors.

        Returns:
            The message, with the descriptors that it has if it is in no piece with others.
        """
        at = len(seen.data)
        ahead = self._peek_at(at, PIECE_SIZE)
        if self._pieces is None or ahead.truncated or len(ahead.data) == PIECE_SIZE:
            if seen.fds or 0 in self._fds_of(message):
                self._closer.close(ahead.fds)
                return Received(message, seen.fds, seen.truncated or ahead.truncated)
            return Received(message, ahead.fds, seen.truncated or ahead.truncated)
        had = self._take_from_piece() + seen.fds
        shares = share_fds(
            seen.data + ahead.data,
            len(ahead.fds),
            header_size=self._header_size,
            size_of=self._size_of,
            fds_of=self._fds_of,
            had=len(had),
        )
        shares[0] = replace(shares[0], fds=len(had) + shares[0].fds)
        self._pieces.begin(self._number + 1, shares, had + ahead.fds)
        return Received(message, truncated=seen.truncated)

    def _look_into_piece(self, size: int) -> bytes:
        """Return the bytes of the next message that are in a piece with others.

        Descriptors that are still beside them are the same as those that are kept.
        """
        number = self._number + 1
        data = b""
        if self._pieces is None or not self._pieces.covers(number):
            return data
        end = min(self._pieces.within(number) or size, size)
        try:
            while len(data) < end:
                self._look_from(len(data))
                how = socket.MSG_PEEK | socket.MSG_DONTWAIT
                if not (more := self._sock.recv(end - len(data), how)):
                    break
                data += more
        finally:
            self._look_from(-1)
        return data

    def _take_from_piece(self) -> tuple[int, ...]:
        return () if self._pieces is None else self._pieces.take(self._number + 1)

    def _forget_fds(self) -> None:
        unix_fds.close_all(self._handled_fds)
        self._handled_fds = []

    def _wait_for_rest(self) -> None:
        """Look again in a while: the socket is readable all the time."""
        self._loop.remove_reader(self._sock)
        self._reads = False
        self._rest = self._loop.call_later(REST_SECONDS, self._listen)

    def _before_answer(self) -> None:
        self._number += 1
        answer = b"".join(bytes(data) for data, _ in self._unsent)
        self._record(Handled(self._number, self._message, answer))
        self._begin(0, self._long)
        if self._pieces is not None:
            self._pieces.handled(self._number)

    def _send_unsent(self) -> None:
        super()._send_unsent()
        while self._asked:
            unix_fds.send(self._sock, self._asked[0])
            self._asked.popleft()

    def _send_some(self, data: bytes, fds: Sequence[int]) -> int:
        return send_recorded(self._sock.fileno(), data, self._sending, fds) if data else 0

    def _may_read(self) -> bool:
        return not self._message

    def _listen(self) -> None:
        if self.closed:
            return
        if self._message and not self._unsent:
            self._take_off()
        if not self.closed:
            super()._listen()

    def _take_off(self) -> None:
        """Take the message off the socket, with its descriptors, which nobody wants twice."""
        left = bytearray(b"" if self._long else self._message)
        try:
            while left:
                taken = receive_recorded(self._sock.fileno(), left, self._taking)
                if not taken:
                    self._fail(None)
                    return
                del left[:taken]
        except OSError as error:
            self._fail(error)
            return
        self._message = b""
        self._long = 0


def long_room(keeping: Keeping, longest: int) -> Callable[[], memoryview]:
    """Return what makes room for messages of at most so many bytes, when it is first called."""
    return lambda: keeping.area("message", _LONG_HEAD.size + longest)
