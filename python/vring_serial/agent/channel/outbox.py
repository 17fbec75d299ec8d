"""Short messages that wait until a link can be written to, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import cast

from vring_serial.proto.agent import Buffer, Message
from vring_serial.proto.agent.capabilities import Layout

MESSAGE_COST = 256
"""About how many bytes of objects a waiting message takes besides its text and payload."""
_LONGEST = Layout(selections=True, serials=True)

Maker = Callable[[], Message | None]


def held_bytes(data: Buffer) -> int:
    """Return how many bytes ``data`` keeps in memory: a view keeps all that it views."""
    return len(cast(bytes, data.obj)) if isinstance(data, memoryview) else len(data)


def kept(data: Buffer) -> Buffer:
    """Return ``data`` to keep for longer: a copy if it is a small part of what it views."""
    return bytes(data) if held_bytes(data) > 2 * len(data) else data


def message_cost(message: Message) -> int:
    """About how many bytes of memory a message takes while it waits."""
    return MESSAGE_COST + len(message.head(_LONGEST)) + held_bytes(message.payload)


@dataclass(slots=True)
class _Waiting:
    make: Maker
    cost: int
    key: Hashable = None


class Outbox:
    """The messages that wait for one port of a link, in order.

    A message with a key is made when its turn comes, so it says what is true then. It waits once,
    however often it is put in.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Waiting] = deque()
        self._keyed: dict[Hashable, _Waiting] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, message: Message) -> None:
        """Add a message at the end."""
        self._add(_Waiting(lambda: message, message_cost(message)))

    def put_latest(self, key: Hashable, make: Maker) -> None:
        """Have ``make`` called for a message (None: for nothing) in the place of this key."""
        waiting = self._keyed.get(key)
        if waiting is None:
            waiting = self._keyed[key] = _Waiting(make, MESSAGE_COST, key)
            self._add(waiting)
        waiting.make = make

    def _add(self, waiting: _Waiting) -> None:
        self._waiting.append(waiting)
        self.bytes += waiting.cost

    def take(self) -> Message | None:
        """Remove the first of them; None if there is nothing to say any more."""
        waiting = self._waiting.popleft()
        self.bytes -= waiting.cost
        if waiting.key is not None:
            del self._keyed[waiting.key]
        return waiting.make()

    def clear(self) -> None:
        """Drop all."""
        self._waiting.clear()
        self._keyed.clear()
        self.bytes = 0
