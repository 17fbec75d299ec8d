"""The protocol of a ``console`` host end: several people on one console.

Each side sends frames: a header of 8 bytes (kind, three zero bytes, length of the payload; little
endian), and the payload. The client begins with HELLO, the server answers WELCOME or BYE. What the
guest wrote is one stream of bytes, counted from its beginning: DATA continues it at the position
that WELCOME named, LOST skips a part of it. A client that was cut off says in its next HELLO which
stream it knew and how far it came, and nothing is sent twice.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.framing import FramingError, MessageParser, exactly, kind_name

VERSION = 1
#: Most bytes of the guest's in one DATA, and of a person's in one INPUT.
DATA_MAX = 1 << 16
INPUT_MAX = 4096
#: Most bytes of a BYE's reason.
REASON_MAX = 512


class Kind(enum.IntEnum):
    """Kinds of frames; from 16 on, they are the server's."""

    HELLO = 1
    INPUT = 2
    RESIZE = 3
    WELCOME = 16
    DATA = 17
    LOST = 18
    BYE = 19


class _Flag(enum.IntFlag):
    READ_ONLY = 1
    RESUMES = 2


_HEADER = struct.Struct("<B3sI")
_MAGIC = b"VRINGCON"
_HELLO = struct.Struct("<8sHHHHQQ")
_RESIZE = struct.Struct("<HH")
_WELCOME = struct.Struct("<8sHHQQQ")
_LOST = struct.Struct("<Q")

_MOST = {
    Kind.HELLO: _HELLO.size,
    Kind.INPUT: INPUT_MAX,
    Kind.RESIZE: _RESIZE.size,
    Kind.WELCOME: _WELCOME.size,
    Kind.DATA: DATA_MAX,
    Kind.LOST: _LOST.size,
    Kind.BYE: REASON_MAX,
}


@dataclass(frozen=True, slots=True)
class Hello:
    """What a client begins with.

    Attributes:
        read_only: it will not type, nor set the size of the terminal.
        cols, rows: size of its terminal in characters; 0: it has none.
        resume: the stream that it knew and its position there; None: it wants the scrollback.
        version: of the protocol.
    """

    read_only: bool = False
    cols: int = 0
    rows: int = 0
    resume: tuple[int, int] | None = None
    version: int = VERSION

    def pack(self) -> bytes:
        """Return the payload."""
        flags = _Flag.READ_ONLY * self.read_only | _Flag.RESUMES * (self.resume is not None)
        return _HELLO.pack(
            _MAGIC, self.version, flags, self.cols, self.rows, *(self.resume or (0, 0))
        )

    @classmethod
    def unpack(cls, data: bytes) -> Hello:
        """Parse all bytes of a payload. Raises RemoteProtocolError."""
        magic, version, flags, cols, rows, stream, position = exactly(_HELLO, data)
        if magic != _MAGIC:
            raise RemoteProtocolError("not a client of a console")
        resume = (stream, position) if flags & _Flag.RESUMES else None
        return cls(bool(flags & _Flag.READ_ONLY), cols, rows, resume, version)


@dataclass(frozen=True, slots=True)
class Resize:
    """The client's terminal has another size.

    Attributes:
        cols, rows: in characters; 0: it has none.
    """

    cols: int
    rows: int

    def pack(self) -> bytes:
        """Return the payload."""
        return _RESIZE.pack(self.cols, self.rows)

    @classmethod
    def unpack(cls, data: bytes) -> Resize:
        """Parse all bytes of a payload. Raises RemoteProtocolError."""
        return cls(*exactly(_RESIZE, data))


@dataclass(frozen=True, slots=True)
class Welcome:
    """The server's answer.

    Attributes:
        stream: number of the stream, another one for each life of the console.
        position: of the first byte that follows.
        live: position from which on bytes are new; those before are history.
        version: of the protocol.
    """

    stream: int
    position: int
    live: int
    version: int = VERSION

    def pack(self) -> bytes:
        """Return the payload."""
        return _WELCOME.pack(_MAGIC, self.version, 0, self.stream, self.position, self.live)

    @classmethod
    def unpack(cls, data: bytes) -> Welcome:
        """Parse all bytes of a payload. Raises RemoteProtocolError."""
        magic, version, _, stream, position, live = exactly(_WELCOME, data)
        if magic != _MAGIC:
            raise RemoteProtocolError("not a console")
        return cls(stream, position, live, version)


@dataclass(frozen=True, slots=True)
class Lost:
    """A part of the stream is left out here: the client was too slow for it.

    Attributes:
        count: number of bytes.
    """

    count: int

    def pack(self) -> bytes:
        """Return the payload."""
        return _LOST.pack(self.count)

    @classmethod
    def unpack(cls, data: bytes) -> Lost:
        """Parse all bytes of a payload. Raises RemoteProtocolError."""
        return cls(*exactly(_LOST, data))


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The start of every frame.

    Attributes:
        kind: one of Kind, or a number that is unknown.
        length: bytes of the payload.
        padding: three bytes, zero.
    """

    kind: int
    length: int
    padding: bytes = bytes(3)

    @property
    def message_size(self) -> int:
        """Bytes of the whole frame."""
        return _HEADER.size + self.length


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame.

    Attributes:
        kind: what it is.
        payload: its bytes.
    """

    kind: Kind
    payload: bytes


class FrameParser(MessageParser[FrameHeader, Frame]):
    """Splits a stream into frames of one side.

    Args:
        from_server: whether the server sent it.
    """

    def __init__(self, *, from_server: bool) -> None:
        super().__init__(_HEADER.size)
        self._from_server = from_server

    def _unpack_header(self, data: bytes) -> FrameHeader:
        kind, padding, length = _HEADER.unpack(data)
        return FrameHeader(Kind(kind) if kind in _MOST else kind, length, padding)

    def _check(self, header: FrameHeader) -> None:
        name = self._name(header)
        if header.kind not in _MOST or (header.kind >= Kind.WELCOME) != self._from_server:
            raise FramingError(name, "unknown here")
        if any(header.padding):
            raise FramingError(name, "its reserved bytes are not zero")
        if header.length > _MOST[Kind(header.kind)]:
            raise FramingError(name, f"{header.length} bytes, at most {_MOST[Kind(header.kind)]}")

    def _message(self, header: FrameHeader, payload: bytes, fds: tuple[int, ...]) -> Frame:
        return Frame(Kind(header.kind), payload)

    def _name(self, header: FrameHeader) -> str:
        return kind_name(header.kind, "frame")


def pack_frame(kind: Kind, payload: bytes = b"") -> bytes:
    """Return a frame. The payload is at most what its kind may have."""
    return pack_header(kind, len(payload)) + payload


def pack_header(kind: Kind, length: int) -> bytes:
    """Return the header of a frame whose payload has so many bytes."""
    assert length <= _MOST[kind]
    return _HEADER.pack(kind, bytes(3), length)
