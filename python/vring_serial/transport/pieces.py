"""Descriptors of messages that a peer sent at once, kept until each of the messages was handled.

The kernel has all of them beside the first byte, and gives them away with it: once the first of the
messages has been taken off the socket, nothing there says that there were any. So before it is
handled, they are kept, and it is written down whose they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from vring_serial.errors import StateError
from vring_serial.keeping import Keeping
from vring_serial.proto.framing import MAX_FDS, Share
from vring_serial.saving import StateFormat
from vring_serial.transport.closer import Closer

#: Matches the roles of these descriptors (see Keeping), which are numbered from 0.
ROLES = re.compile(r"beside\.[0-9]+")
_ROLE = "beside.{}"
_SECTION = "pieces"


@dataclass(slots=True)
class PieceState:
    """The last piece of a stream that has several messages and descriptors beside them.

    Attributes:
        first: number of the first descriptor's role.
        last: number of the last message of which a byte is in it; 0: there is no such piece.
        within: bytes of that message in the piece; 0: all that it has.
        shares: how many of the descriptors are a message's, by its number; ascending, no zeros.
    """

    first: int = 0
    last: int = 0
    within: int = 0
    shares: dict[int, int] = field(default_factory=dict)


_FORM = StateFormat("descriptors of messages", 1, PieceState)


class Pieces:
    """Has the descriptors of one piece of a stream after the other.

    Args:
        keeping: where they outlive the process.
        closer: closes them.
        handled: number of the message that was handled last.

    Attributes:
        damage: why what a predecessor left is of no use; None: it is, or there is nothing.
    """

    def __init__(self, keeping: Keeping, closer: Closer, handled: int) -> None:
        self.damage: str | None = None
        self._keeping = keeping
        self._closer = closer
        self._state = PieceState()
        self._fds: list[int] = []  # of messages that were not handled
        self._kept = range(0)  # roles in use
        try:
            self._resume(handled)
        except StateError as error:
            self.damage = str(error)
            self.close()
            forget_pieces(keeping, closer)

    def begin(self, number: int, shares: Sequence[Share], fds: Sequence[int]) -> None:
        """Keep the descriptors of a piece; they are taken over.

        Args:
            number: of the message that the piece begins with.
            shares: of that and all others.
            fds: in the order of the messages, as many as ``shares`` say.
        """
        # Until this is written down, what there was counts.
        before, first = self._kept, self._kept.stop
        self._kept = range(first, first + len(fds))
        self._fds = list(fds)
        for role, fd in zip(self._kept, fds, strict=True):
            self._keeping.keep(_ROLE.format(role), fd)
        self._state = PieceState(
            first,
            number + len(shares) - 1,
            0 if shares[-1].whole else shares[-1].size,
            {number + i: share.fds for i, share in enumerate(shares) if share.fds},
        )
        self._keeping.write(_SECTION, _FORM.pack(self._state))
        self._drop(before)

    def covers(self, number: int) -> bool:
        """Return whether a byte of this message, which was not handled, is in the piece."""
        return number <= self._state.last

    def within(self, number: int) -> int:
        """Return how many bytes of this message are in the piece, if that ends in it; else 0."""
        return self._state.within if number == self._state.last else 0

    def count(self, number: int) -> int:
        """Return how many descriptors are this message's."""
        return self._state.shares.get(number, 0)

    def take(self, number: int) -> tuple[int, ...]:
        """Return the descriptors of the next message; the caller's from now on, and still kept."""
        count = self.count(number)
        taken, self._fds = self._fds[:count], self._fds[count:]
        return tuple(taken)

    def handled(self, number: int) -> None:
        """Note that it was written down that this message was handled."""
        if self._kept and number >= self._state.last:
            self.close()

    def close(self) -> None:
        """Keep nothing any more, and close what was not taken. Safe to call twice."""
        if self._kept:
            self._keeping.write(_SECTION, b"")
        self._drop(self._kept)
        self._kept = range(0)
        self._state = PieceState()
        self._closer.close(self._fds)
        self._fds = []

    def _drop(self, roles: range) -> None:
        for role in roles:
            self._keeping.drop(_ROLE.format(role))

    def _resume(self, handled: int) -> None:
        saved = self._keeping.read(_SECTION)
        state = PieceState() if not saved else _FORM.unpack(saved)
        if state.last <= handled:  # there is none, or it died while it dropped them
            forget_pieces(self._keeping, self._closer)
            return
        numbers, counts = list(state.shares), list(state.shares.values())
        if (
            not numbers
            or numbers != sorted(numbers)
            or not 0 < numbers[0] <= numbers[-1] <= state.last
            or min(counts) < 1
            or sum(counts) > MAX_FDS
            or state.within < 0
            or state.first < 0
        ):
            raise StateError(f"descriptors of messages: {state} cannot be")
        self._kept = range(state.first, state.first)
        for number, count in state.shares.items():
            for role in range(self._kept.stop, self._kept.stop + count):
                if (fd := self._keeping.take(_ROLE.format(role))) is None:
                    raise StateError(f"the descriptor {_ROLE.format(role)} is not there")
                self._kept = range(state.first, role + 1)
                if number <= handled:
                    self._closer.close([fd])
                else:
                    self._fds.append(fd)
        _drop_left(self._keeping, self._closer)  # it died while it kept those of the next piece
        self._state = state


def forget_pieces(keeping: Keeping, closer: Closer) -> None:
    """Drop what was left of a session that has ended, or of a piece that was handled."""
    try:
        is_left = bool(keeping.read(_SECTION))
    except StateError:
        is_left = True
    if is_left:
        keeping.write(_SECTION, b"")
    _drop_left(keeping, closer)


def _drop_left(keeping: Keeping, closer: Closer) -> None:
    for role in keeping.roles():
        if ROLES.fullmatch(role):
            fd = keeping.take(role)
            closer.close([-1 if fd is None else fd])
            keeping.drop(role)
