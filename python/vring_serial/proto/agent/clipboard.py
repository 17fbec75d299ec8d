"""Agent messages of the clipboard: it is offered (GRAB), asked for (REQUEST), sent and given up."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from . import constants as c
from ._base import PLAIN, U32, Message, at_least, check_size, words
from .capabilities import Layout
from .chunks import Buffer
from .constants import MessageType
from .errors import MessageError

_SELECTION = struct.Struct("<Bxxx")


def _selection(body: Buffer, layout: Layout, name: str) -> tuple[int, int]:
    """Return the selection, and the offset of what follows it."""
    if not layout.selections:
        return c.Selection.CLIPBOARD, 0
    (selection,) = at_least(_SELECTION, body, name)
    if selection > c.Selection.SECONDARY:
        raise MessageError(f"{name}.selection", 0, f"selection {selection}, at most 2")
    return c.Selection(selection), _SELECTION.size


def _selection_head(selection: int, layout: Layout) -> bytes:
    return _SELECTION.pack(selection) if layout.selections else b""


@dataclass(frozen=True, slots=True)
class Clipboard(Message):
    """Clipboard data that were requested (VDAgentClipboard); whoever owns the clipboard sends it.

    Attributes:
        selection: which clipboard, of :class:`Selection`.
        type: of :class:`ClipboardType`; NONE if there are no such data.
        data: the bytes, not copied.
    """

    TYPE = MessageType.CLIPBOARD
    BODY_MAX = 0xFFFFFFFF
    selection: int
    type: int
    data: Buffer = b""

    @property
    def payload(self) -> Buffer:
        return self.data

    def head(self, layout: Layout) -> bytes:
        return _selection_head(self.selection, layout) + U32.pack(self.type)

    def stream_head(self, layout: Layout, size: int) -> bytes:
        """Return the same as ``head``, for ``size`` bytes that follow in pieces."""
        return self.head(layout)

    @classmethod
    def head_size(cls, layout: Layout) -> int:
        """Return how many bytes of the body come before the payload."""
        return 8 if layout.selections else 4

    @classmethod
    def unpack(cls, body: Buffer, layout: Layout = PLAIN) -> Clipboard:
        """Parse a body; ``data`` is a part of it. Raises MessageError."""
        selection, offset = _selection(body, layout, "VDAgentClipboard")
        (kind,) = at_least(U32, body, "VDAgentClipboard", offset)
        return cls(selection, kind, body[offset + 4 :])


@dataclass(frozen=True, slots=True)
class ClipboardGrab(Message):
    """The sender owns a clipboard now and has it in these types (VDAgentClipboardGrab).

    Attributes:
        selection: which clipboard, of :class:`Selection`.
        types: of :class:`ClipboardType`, CLIPBOARD_TYPES_MAX at most.
        serial: counts the grabs of the selection, where both ends have CLIPBOARD_GRAB_SERIAL.
    """

    TYPE = MessageType.CLIPBOARD_GRAB
    BODY_MAX = 8 + 4 * c.CLIPBOARD_TYPES_MAX
    selection: int
    types: tuple[int, ...]
    serial: int = 0

    def head(self, layout: Layout) -> bytes:
        serial = U32.pack(self.serial) if layout.serials else b""
        types = struct.pack(f"<{len(self.types)}I", *self.types)
        return _selection_head(self.selection, layout) + serial + types

    @classmethod
    def unpack(cls, body: Buffer, layout: Layout = PLAIN) -> ClipboardGrab:
        """Parse a body. Raises MessageError, also on more than CLIPBOARD_TYPES_MAX types."""
        name = "VDAgentClipboardGrab"
        selection, offset = _selection(body, layout, name)
        serial = 0
        if layout.serials:
            (serial,) = at_least(U32, body, name, offset)
            offset += U32.size
        types = words(body, offset, c.CLIPBOARD_TYPES_MAX, f"{name}.types")
        return cls(selection, types, serial)


@dataclass(frozen=True, slots=True)
class ClipboardRequest(Message):
    """Asks the owner of a clipboard for its data in one type (VDAgentClipboardRequest).

    Attributes:
        selection: which clipboard, of :class:`Selection`.
        type: of :class:`ClipboardType`.
    """

    TYPE = MessageType.CLIPBOARD_REQUEST
    BODY_MAX = 8
    selection: int
    type: int

    def head(self, layout: Layout) -> bytes:
        return _selection_head(self.selection, layout) + U32.pack(self.type)

    @classmethod
    def unpack(cls, body: Buffer, layout: Layout = PLAIN) -> ClipboardRequest:
        """Parse a body. Raises MessageError."""
        selection, offset = _selection(body, layout, "VDAgentClipboardRequest")
        check_size(offset + U32.size, body, "VDAgentClipboardRequest")
        return cls(selection, *U32.unpack_from(body, offset))


@dataclass(frozen=True, slots=True)
class ClipboardRelease(Message):
    """The sender no longer owns this clipboard (VDAgentClipboardRelease).

    Attributes:
        selection: which clipboard, of :class:`Selection`.
    """

    TYPE = MessageType.CLIPBOARD_RELEASE
    BODY_MAX = 4
    selection: int

    def head(self, layout: Layout) -> bytes:
        return _selection_head(self.selection, layout)

    @classmethod
    def unpack(cls, body: Buffer, layout: Layout = PLAIN) -> ClipboardRelease:
        """Parse a body. Raises MessageError."""
        selection, offset = _selection(body, layout, "VDAgentClipboardRelease")
        check_size(offset, body, "VDAgentClipboardRelease")
        return cls(selection)
