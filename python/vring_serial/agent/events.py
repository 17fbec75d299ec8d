"""What happens on an agent channel, as :class:`HostAgent` tells it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, replace
from typing import Self, TypeAlias

from vring_serial.agent.channel.outbox import kept, message_cost
from vring_serial.lifetime import Closing
from vring_serial.proto.agent import AgentProtocolError, Capabilities, TypedMessage, UnknownMessage


@dataclass(frozen=True, slots=True)
class AgentReady:
    """The agent announced its capabilities: for the first time, again, or after a restart.

    Attributes:
        capabilities: the agent's capabilities.
    """

    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class AgentGone:
    """There is no agent any more.

    Attributes:
        reason: why, or empty for an orderly end.
        closed: the channel closed. If not, it is shared, and AgentReady tells of the next agent.
    """

    reason: str = ""
    closed: bool = True


@dataclass(frozen=True, slots=True)
class ClipboardGrabbed:
    """The guest owns a clipboard now and has it in these types.

    Attributes:
        selection: which clipboard, of ``Selection``.
        types: of ``ClipboardType``.
    """

    selection: int
    types: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClipboardReleased:
    """The guest has nothing on a clipboard any more.

    Attributes:
        selection: which clipboard, of ``Selection``.
    """

    selection: int


@dataclass(frozen=True, slots=True)
class OtherMessage:
    """A message, of a known or an unknown type, that needs no action.

    Attributes:
        message: the message.
    """

    message: TypedMessage | UnknownMessage


@dataclass(frozen=True, slots=True)
class AgentTrouble:
    """The agent sent something invalid, or an answer to it failed; the channel continues if it can.

    After a ChunkError it cannot, and AgentGone follows.

    Attributes:
        error: the violation of the protocol, or the exception with which the answer failed.
    """

    error: AgentProtocolError | BaseException


AgentEvent: TypeAlias = (
    AgentReady | AgentGone | ClipboardGrabbed | ClipboardReleased | OtherMessage | AgentTrouble
)

EVENTS_MAX = 1024
"""Events that are kept for an iterator that does not take them."""
EVENTS_BYTES = 4 << 20
"""Bytes of the messages in them."""


def _to_keep(event: AgentEvent) -> tuple[AgentEvent, int]:
    """Return an event that keeps only itself in memory, and about how many bytes that is."""
    if not isinstance(event, OtherMessage):
        return event, 0
    message = event.message
    if isinstance(message, UnknownMessage):
        message = replace(message, data=kept(message.data))
    return OtherMessage(message), message_cost(message)


class EventStream(Closing):
    """Events as an asynchronous iterator, for as long as its ``with`` block runs.

    It ends, after what it still has, when the agent is closed.

    Args:
        listening: gets every event; this is in it within the block.
    """

    def __init__(self, listening: set[EventStream]) -> None:
        self._listening = listening
        self._events: deque[tuple[AgentEvent, int]] = deque()
        self._bytes = 0
        self._ended = False
        self._changed = asyncio.Event()

    def __enter__(self) -> Self:
        self._listening.add(self)
        return self

    def close(self) -> None:
        """Take no more events. Safe to call twice."""
        self._listening.discard(self)

    def put(self, event: AgentEvent) -> None:
        """Add an event (for the agent)."""
        event, size = _to_keep(event)
        self._events.append((event, size))
        self._bytes += size
        while len(self._events) > EVENTS_MAX or self._bytes > EVENTS_BYTES:
            self._take()
        self._changed.set()

    def end(self) -> None:
        """End the iteration behind what is left (for the agent)."""
        self._ended = True
        self._changed.set()

    def _take(self) -> AgentEvent:
        event, size = self._events.popleft()
        self._bytes -= size
        return event

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> AgentEvent:
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._take()
