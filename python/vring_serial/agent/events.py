"""What happens on an agent channel, as :class:`HostAgent` tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from vring_serial.proto.agent import AgentProtocolError, Capabilities, TypedMessage, UnknownMessage


@dataclass(frozen=True, slots=True)
class AgentReady:
    """An agent announced its capabilities: for the first time, again, or after a restart."""

    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class AgentGone:
    """The channel closed; ``reason`` says why, or is empty for an orderly end."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class ClipboardGrabbed:
    """The guest owns this clipboard now and has it in these types."""

    selection: int
    types: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClipboardReleased:
    """The guest has nothing on this clipboard any more."""

    selection: int


@dataclass(frozen=True, slots=True)
class OtherMessage:
    """A message that needs no action of ours, of a known or an unknown type."""

    message: TypedMessage | UnknownMessage


@dataclass(frozen=True, slots=True)
class AgentTrouble:
    """The agent sent something wrong, or an answer of ours failed; the channel goes on if it can.

    After a ChunkError it cannot, and AgentGone follows.
    """

    error: AgentProtocolError | BaseException


AgentEvent: TypeAlias = (
    AgentReady | AgentGone | ClipboardGrabbed | ClipboardReleased | OtherMessage | AgentTrouble
)
