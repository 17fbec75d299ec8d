"""What all agent messages share: their base class and the checks of their lengths."""

from __future__ import annotations

import struct
from typing import Any, ClassVar

from .capabilities import Layout
from .chunks import Buffer
from .errors import MessageError

PLAIN = Layout()

U32 = struct.Struct("<I")
U32_PAIR = struct.Struct("<II")


def exactly(layout: struct.Struct, body: Buffer, name: str) -> tuple[Any, ...]:
    """Return the fields of the structure ``name``, which must fill the body; else MessageError."""
    check_size(layout.size, body, name)
    return layout.unpack(body)


def at_least(layout: struct.Struct, body: Buffer, name: str, offset: int = 0) -> tuple[Any, ...]:
    """Return the fields that begin at ``offset``. Raises MessageError if the body is too short."""
    size = offset + layout.size
    if len(body) < size:
        raise MessageError(f"{name}.size", 0, f"{len(body)} bytes, at least {size} needed")
    return layout.unpack_from(body, offset)


def check_size(size: int, body: Buffer, name: str) -> None:
    """Raise MessageError unless the body has ``size`` bytes."""
    if len(body) != size:
        raise MessageError(f"{name}.size", 0, f"{len(body)} bytes, must be {size}")


def words(body: Buffer, offset: int, most: int, name: str) -> tuple[int, ...]:
    """Return the 32-bit words from ``offset`` to the end of the body, ``most`` at most."""
    count, rest = divmod(len(body) - offset, 4)
    if rest:
        raise MessageError(name, offset, f"{len(body) - offset} bytes are not whole 32-bit words")
    if count > most:
        raise MessageError(name, offset, f"{count} words, at most {most}")
    return struct.unpack_from(f"<{count}I", body, offset)


class Message:
    """Base of all messages. ``type`` is the message type, ``payload`` the bulk data at its end."""

    __slots__ = ()
    TYPE: ClassVar[int] = 0
    BODY_MAX: ClassVar[int] = 0

    @property
    def type_number(self) -> int:
        """Type number that goes into the message header."""
        return self.TYPE

    @property
    def payload(self) -> Buffer:
        """Bulk data at the end of the body, not copied."""
        return b""

    def head(self, layout: Layout) -> bytes:
        """Return the body up to the payload."""
        raise NotImplementedError

    def pack(self, layout: Layout = PLAIN) -> bytes:
        """Return the whole body."""
        return b"".join((self.head(layout), self.payload))
