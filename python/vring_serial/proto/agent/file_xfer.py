"""Agent messages of file transfers: START offers a file, STATUS steers, DATA carries."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from . import constants as c
from ._base import PLAIN, U32, U32_PAIR, Message, at_least
from .capabilities import Layout
from .chunks import Buffer
from .constants import MessageType
from .errors import MessageError

_FILE_DATA = struct.Struct("<IQ")


@dataclass(frozen=True, slots=True)
class FileXferStart(Message):
    """Offers a file (VDAgentFileXferStartMessage).

    Attributes:
        id: chosen by the sender of the file; names the transfer in both directions.
        info: the text that describes the file; see :mod:`vring_serial.proto.agent.fileinfo`.
    """

    TYPE = MessageType.FILE_XFER_START
    BODY_MAX = 4 + c.FILE_INFO_MAX
    id: int
    info: bytes

    def head(self, layout: Layout) -> bytes:
        return U32.pack(self.id) + self.info

    @classmethod
    def unpack(cls, body: Buffer, layout: Layout = PLAIN) -> FileXferStart:
        """Parse a body; ``info`` is copied, and not looked at. Raises MessageError."""
        (number,) = at_least(U32, body, "VDAgentFileXferStartMessage")
        return cls(number, bytes(body[U32.size :]))


@dataclass(frozen=True, slots=True)
class FileXferStatus(Message):
    """How a transfer goes on or why not (VDAgentFileXferStatusMessage).

    The receiver of the file sends it; so does its sender, to cancel.

    Attributes:
        id: names the transfer.
        result: of :class:`FileXferResult`.
        detail: what FILE_XFER_DETAILED_ERRORS adds; see :attr:`free_space` and :attr:`glib_error`.
    """

    TYPE = MessageType.FILE_XFER_STATUS
    BODY_MAX = 8 + c.STATUS_DETAIL_MAX
    id: int
    result: int
    detail: bytes = b""

    @property
    def free_space(self) -> int | None:
        """Bytes that are free on the receiver's disk, if NOT_ENOUGH_SPACE says so."""
        if self.result != c.FileXferResult.NOT_ENOUGH_SPACE or len(self.detail) < 8:
            return None
        return int.from_bytes(self.detail[:8], "little")

    @property
    def glib_error(self) -> int | None:
        """The G_IO_ERROR number, if ERROR comes with one."""
        if self.result != c.FileXferResult.ERROR or len(self.detail) < 5 or self.detail[0]:
            return None
        return int.from_bytes(self.detail[1:5], "little")

    def head(self, layout: Layout) -> bytes:
        return U32_PAIR.pack(self.id, self.result) + self.detail

    @classmethod
    def unpack(cls, body: Buffer, layout: Layout = PLAIN) -> FileXferStatus:
        """Parse a body; ``detail`` is copied, and not looked at. Raises MessageError."""
        number, result = at_least(U32_PAIR, body, "VDAgentFileXferStatusMessage")
        return cls(number, result, bytes(body[U32_PAIR.size :]))


@dataclass(frozen=True, slots=True)
class FileXferData(Message):
    """The next bytes of a file (VDAgentFileXferDataMessage), from the file's sender.

    Attributes:
        id: names the transfer.
        data: the bytes, not copied.
    """

    TYPE = MessageType.FILE_XFER_DATA
    BODY_MAX = 0xFFFFFFFF
    id: int
    data: Buffer = b""

    @property
    def payload(self) -> Buffer:
        return self.data

    def head(self, layout: Layout) -> bytes:
        return _FILE_DATA.pack(self.id, len(self.data))

    def stream_head(self, layout: Layout, size: int) -> bytes:
        """Return the same as ``head``, for ``size`` bytes that follow in pieces."""
        return _FILE_DATA.pack(self.id, size)

    @classmethod
    def head_size(cls, layout: Layout) -> int:
        """Return how many bytes of the body come before the payload."""
        return _FILE_DATA.size

    @classmethod
    def unpack(cls, body: Buffer, layout: Layout = PLAIN) -> FileXferData:
        """Parse a body; ``data`` is a part of it.

        Raises:
            MessageError: the body is too short, or its size field says another number of bytes.
        """
        name = "VDAgentFileXferDataMessage"
        number, size = at_least(_FILE_DATA, body, name)
        if size != len(body) - _FILE_DATA.size:
            there = len(body) - _FILE_DATA.size
            raise MessageError(f"{name}.size", 4, f"{size} bytes, but {there} follow")
        return cls(number, body[_FILE_DATA.size :])
