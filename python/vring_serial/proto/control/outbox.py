"""Control messages that wait for a buffer of the receiver."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from vring_serial.proto.console import ControlEvent, ControlMessage


class Outbox:
    """Messages waiting for a buffer, first in, first out, at most MAX_PER_ID about one port.

    What waits about a port is its life in short: that an earlier port of this number went, that it
    is there, its description, and its last open or close. :meth:`add` keeps it so:

    - a message that waits already is not queued again;
    - of PORT_OPEN the last two that differ stay, so that the receiver sees the change;
    - a RESIZE takes the place of the earlier one, as does a PORT_NAME;
    - a PORT_REMOVE makes everything else that waits about the port pointless.

    Args:
        messages: what waits already, by number of order, the first first; kept up to date here.
            Ordered so that taking the first is cheap.
    """

    #: A device sends PORT_REMOVE, PORT_ADD, CONSOLE_PORT, PORT_NAME, RESIZE and twice PORT_OPEN; a
    #: driver no more than PORT_READY and twice PORT_OPEN.
    MAX_PER_ID = 7

    def __init__(self, messages: OrderedDict[int, ControlMessage] | None = None) -> None:
        self._messages = OrderedDict() if messages is None else messages
        self._of_id: dict[int, list[int]] = {}
        for number, message in self._messages.items():
            self._of_id.setdefault(message.id, []).append(number)
        self._next = next(reversed(self._messages), -1) + 1

    def __len__(self) -> int:
        return len(self._messages)

    def __iter__(self) -> Iterator[ControlMessage]:
        return iter(self._messages.values())

    def waits(self, id: int, event: ControlEvent) -> bool:
        """Whether a message about ``id`` with this event waits."""
        return any(self._messages[number].event == event for number in self._of_id.get(id, ()))

    def add(self, message: ControlMessage) -> None:
        """Queue a message, as the class says."""
        waiting = [(n, self._messages[n]) for n in self._of_id.get(message.id, ())]
        same = [(n, earlier) for n, earlier in waiting if earlier.event == message.event]
        if message.event == ControlEvent.PORT_REMOVE:
            self.forget(message.id)
        if message.event == ControlEvent.PORT_OPEN:
            if same and same[-1][1].value == message.value:
                return
            if len(same) == 2:
                self._drop(message.id, same[0][0])
        elif same:
            self._messages[same[0][0]] = message
            return
        self._messages[self._next] = message
        self._of_id.setdefault(message.id, []).append(self._next)
        self._next += 1

    def peek(self) -> bytes | None:
        """Return the bytes of the first message, or None. It stays until :meth:`sent`."""
        for message in self._messages.values():
            return message.pack()
        return None

    def sent(self) -> None:
        """Drop the first message, which is on its way."""
        number = next(iter(self._messages))
        self._drop(self._messages[number].id, number)

    def forget(self, id: int) -> None:
        """Drop what waits about ``id``, but not that an earlier port of this number went."""
        for number in list(self._of_id.get(id, ())):
            if self._messages[number].event != ControlEvent.PORT_REMOVE:
                self._drop(id, number)

    def clear(self) -> None:
        """Drop everything: the receiver starts anew."""
        self._messages.clear()
        self._of_id.clear()

    def _drop(self, id: int, number: int) -> None:
        del self._messages[number]
        self._of_id[id].remove(number)
        if not self._of_id[id]:
            del self._of_id[id]
