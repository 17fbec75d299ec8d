"""How much of one turn of the event loop one peer may have."""

from __future__ import annotations

import time

#: Messages of one peer in one turn, and seconds from which on it begins no more.
MESSAGES = 64
SECONDS = 0.002


class Turn:
    """One peer's turn, from now on: ``while turn.another():`` handle a message.

    A peer that has more to say goes on in the next turn of the loop, after everybody else. A single
    message is not interrupted: what it may ask for is bounded where it is handled.
    """

    __slots__ = ("_end", "_left")

    def __init__(self) -> None:
        self._left = MESSAGES
        self._end = time.monotonic() + SECONDS

    def another(self) -> bool:
        """Whether one more message may be handled now; the first always."""
        self._left -= 1
        return self._left == MESSAGES - 1 or (self._left >= 0 and time.monotonic() < self._end)
