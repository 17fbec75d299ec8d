"""What the other end of an agent channel did wrong."""

from __future__ import annotations

from vring_serial.errors import RemoteProtocolError


class AgentProtocolError(RemoteProtocolError):
    """Base of all misbehaviour on an agent channel.

    Attributes:
        field: what was wrong, as ``STRUCTURE.field`` in the names of vd_agent.h.
        offset: byte offset of that field; what it counts from is said by the subclass.
        cause: what was found and what would be allowed.
    """

    def __init__(self, field: str, offset: int, cause: str) -> None:
        super().__init__(f"SPICE agent: {field} at byte {offset}: {cause}")
        self.field = field
        self.offset = offset
        self.cause = cause


class ChunkError(AgentProtocolError):
    """The framing is lost: nothing after this point can be trusted, the channel must be reset.

    ``offset`` counts from the beginning of the stream.
    """


class MessageError(AgentProtocolError):
    """One message is wrong; it was skipped, and the next one can be read.

    ``offset`` counts from the beginning of the message's body.
    """
