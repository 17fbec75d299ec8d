"""One end of an agent channel, sans-IO: bytes and messages in, events and bytes out.

Receiving. Each port of the chunks carries its own sequence of messages:

    HEADER ──20 bytes──▶ BODY ────all of it──▶ HEADER    short: one MessageReceived
                     ├─▶ STREAM ──all of it──▶ HEADER    long: BodyStarted, BodyReceived…, BodyEnded
                     └─▶ SKIP ────all of it──▶ HEADER    impossible: a MessageError

A MessageError costs one message: ``next_event`` raises it and goes on with the next message. A
ChunkError means that the framing is lost: ``next_event`` raises it from then on, until ``reset``.
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

from vring_serial.errors import LocalProtocolError

from . import constants as c
from ._base import Message
from .capabilities import Capabilities, Layout
from .chunks import Buffer, ChunkDecoder, ChunkEncoder
from .clipboard import Clipboard
from .constants import ChunkPort, MessageType
from .errors import AgentProtocolError, ChunkError, MessageError
from .file_xfer import FileXferData
from .messages import (
    MESSAGE_CLASSES,
    AnnounceCapabilities,
    ClientDisconnected,
    StreamedMessage,
    TypedMessage,
    UnknownMessage,
    message_name,
)

_HEADER = struct.Struct("<IIQI")
_SIZE_MAX = 0xFFFFFFFF
_STREAM_HEAD_MAX = 12  # the longest head of a streamed body, FILE_XFER_DATA's


class Side(enum.Enum):
    """Which end of the channel we are."""

    HOST = "host"
    GUEST = "guest"


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A complete message.

    Attributes:
        port: the chunk port on which it arrived; see :class:`ChunkPort`.
        message: the message; its payload may be a view of the argument of ``receive_data``.
    """

    port: int
    message: TypedMessage | UnknownMessage


@dataclass(frozen=True, slots=True)
class BodyStarted:
    """A message began whose payload follows in pieces.

    Attributes:
        port: the chunk port on which it arrives, one message at a time.
        head: the message, without its payload.
        size: length of the whole payload in bytes.
    """

    port: int
    head: StreamedMessage
    size: int


@dataclass(frozen=True, slots=True)
class BodyReceived:
    """The next bytes of a payload that arrives in pieces.

    Attributes:
        port: the chunk port on which the payload began.
        data: the bytes; may be a view of the argument of ``receive_data``.
    """

    port: int
    data: Buffer


@dataclass(frozen=True, slots=True)
class BodyEnded:
    """A payload that arrived in pieces has ended.

    Attributes:
        port: the chunk port on which the payload began.
        complete: False if the rest never comes, because the sender's client left.
    """

    port: int
    complete: bool = True


Event: TypeAlias = MessageReceived | BodyStarted | BodyReceived | BodyEnded


class _State(enum.Enum):
    HEADER = enum.auto()
    BODY = enum.auto()
    STREAM = enum.auto()
    SKIP = enum.auto()


class _Receiver:
    """The messages of one port. ``need`` is how many bytes the state still wants."""

    def __init__(self, port: int, connection: AgentConnection) -> None:
        self.port = port
        self.connection = connection
        self.state = _State.HEADER
        self.need = c.MESSAGE_HEADER_BYTES
        self.gathered = bytearray()
        self.type = 0
        self.opaque = 0
        self.size = 0
        self.head_size = 0
        self.started = False

    def feed(self, data: memoryview, first: bool, rest: int, offset: int) -> None:
        """Take a piece of a chunk. ``rest`` bytes of its chunk follow; it began at ``offset``."""
        if first:
            self._check_chunk(len(data) + rest, offset)
        if self.state is _State.HEADER:
            data = self._take_header(data, rest, offset)
            if self.state is _State.HEADER:
                return
        if self.state is _State.BODY:
            self._take_body(data)
        elif self.state is _State.STREAM:
            self._take_stream(data)
        else:
            self.need -= len(data)
        if not self.need:
            self._end_message()

    def _check_chunk(self, size: int, offset: int) -> None:
        if self.state is _State.HEADER:
            if size < c.MESSAGE_HEADER_BYTES:
                raise ChunkError(
                    "VDIChunkHeader.size",
                    offset - 4,
                    f"{size} bytes: a VDAgentMessage of 20 must not be split over chunks",
                )
        elif size > self.need:
            raise ChunkError(
                "VDIChunkHeader.size",
                offset - 4,
                f"{size} bytes, but only {self.need} of {message_name(self.type)} are left",
            )

    def _take_header(self, data: memoryview, rest: int, offset: int) -> memoryview:
        """Consume header bytes; what follows them in the piece is returned."""
        taken = min(self.need, len(data))
        if taken == c.MESSAGE_HEADER_BYTES:
            header: Buffer = data
        else:
            self.gathered += data[:taken]
            header = self.gathered
        self.need -= taken
        if self.need:
            return data[taken:]
        protocol, self.type, self.opaque, self.size = _HEADER.unpack_from(header)
        self.gathered = bytearray()
        data = data[taken:]
        at = offset + taken - c.MESSAGE_HEADER_BYTES
        if protocol != c.PROTOCOL:
            raise ChunkError("VDAgentMessage.protocol", at, f"{protocol}, must be {c.PROTOCOL}")
        if len(data) + rest > self.size:
            raise ChunkError(
                "VDAgentMessage.size",
                at + 16,
                f"{self.size} bytes, but its chunk holds {len(data) + rest}",
            )
        self.need = self.size
        self.state = self._state_for_body()
        return data

    def _state_for_body(self) -> _State:
        known = MESSAGE_CLASSES.get(self.type)
        if known is None or known is Clipboard or known is FileXferData:
            if self.size <= self.connection.stream_above:
                return _State.BODY
            self.head_size = (known or UnknownMessage).head_size(self.connection.layout)
            self.started = False
            return _State.STREAM
        if self.size > known.BODY_MAX:
            cause = f"{self.size} bytes, at most {known.BODY_MAX}"
            self.connection.add(MessageError(f"{message_name(self.type)}.size", 0, cause))
            return _State.SKIP
        return _State.BODY

    def _take_body(self, data: memoryview) -> None:
        if not self.gathered and len(data) == self.need:
            body: Buffer = data
        else:
            self.gathered += data
            body = memoryview(self.gathered)
        self.need -= len(data)
        if not self.need:
            self._deliver(body)

    @property
    def room(self) -> int:
        """How many bytes may be appended to ``gathered`` from outside."""
        if self.state is _State.BODY:
            return self.need
        if self.state is _State.STREAM and self.started:
            return min(self.need, max(c.PIECE_MAX - len(self.gathered), 0))
        return 0

    def extended(self, count: int) -> None:
        """``count`` bytes were appended to ``gathered``."""
        self.need -= count
        if self.state is _State.STREAM:
            if len(self.gathered) > c.PIECE_MAX - c.CHUNK_DATA_MAX:
                self.flush()
        elif not self.need:
            self._deliver(memoryview(self.gathered))
        if not self.need:
            self._end_message()

    def _deliver(self, body: Buffer) -> None:
        known = MESSAGE_CLASSES.get(self.type)
        if known is None:
            message: TypedMessage | UnknownMessage = UnknownMessage(self.type, body, self.opaque)
        else:
            try:
                message = known.unpack(body, self.connection.layout)
            except MessageError as error:
                self.connection.add(error)
                return
        self.connection.add(MessageReceived(self.port, message))

    def _take_stream(self, data: memoryview) -> None:
        """Hand on pieces; ``gathered`` holds the head first, then the payload not handed on yet."""
        if not self.started:
            wanted = self.head_size - len(self.gathered)
            self.gathered += data[:wanted]
            self.need -= min(wanted, len(data))
            if len(self.gathered) < self.head_size:
                return
            data = data[wanted:]
            self._start_stream()
            if self.state is _State.SKIP:
                self.need -= len(data)
                return
        self.need -= len(data)
        if not self.gathered and len(data) >= c.CHUNK_DATA_MAX * 8:
            self.connection.add(BodyReceived(self.port, data))
            return
        self.gathered += data
        if len(self.gathered) >= c.PIECE_MAX:
            self.flush()

    def _start_stream(self) -> None:
        head = bytes(self.gathered)
        self.gathered = bytearray()
        size = self.need
        self.started = True
        message: StreamedMessage
        if self.type == MessageType.CLIPBOARD:
            try:
                message = Clipboard.unpack(head, self.connection.layout)
            except MessageError as error:
                self._skip(error)
                return
        elif self.type == MessageType.FILE_XFER_DATA:
            number = int.from_bytes(head[:4], "little")
            told = int.from_bytes(head[4:12], "little")
            if told != size:
                cause = f"{told} bytes, but {size} follow"
                self._skip(MessageError("VDAgentFileXferDataMessage.size", 4, cause))
                return
            message = FileXferData(number)
        else:
            message = UnknownMessage(self.type, opaque=self.opaque)
        self.connection.add(BodyStarted(self.port, message, size))

    def _skip(self, error: MessageError) -> None:
        self.state = _State.SKIP
        self.connection.add(error)

    def flush(self) -> None:
        """Hand on what was gathered of a streamed payload."""
        if self.state is _State.STREAM and self.started and self.gathered:
            self.connection.add(BodyReceived(self.port, self.gathered))
            self.gathered = bytearray()

    def _end_message(self) -> None:
        if self.state is _State.STREAM:
            self.flush()
            self.connection.add(BodyEnded(self.port))
        self.state = _State.HEADER
        self.need = c.MESSAGE_HEADER_BYTES
        self.gathered = bytearray()

    def reset(self) -> None:
        """Forget the message that was under way."""
        self.flush()
        if self.state is _State.STREAM and self.started:
            self.connection.add(BodyEnded(self.port, complete=False))
        self.state = _State.HEADER
        self.need = c.MESSAGE_HEADER_BYTES
        self.gathered = bytearray()

    @property
    def inside(self) -> bool:
        return self.state is not _State.HEADER or self.need < c.MESSAGE_HEADER_BYTES


class AgentConnection:
    """The agent protocol on one channel.

    Args:
        side: HOST sends chunks of at most 2048 bytes and takes any; GUEST the other way round.
        stream_above: bodies of clipboard, file data and unknown messages that are longer than so
            many bytes arrive in pieces. What is kept in memory never exceeds this, or PIECE_MAX,
            per port.
        chunk_max: longest chunk to send, in bytes of data; 0 for one chunk a message. The default
            is what the side's real programs do.

    Attributes:
        layout: optional fields of the clipboard messages, as both announcements have settled them.
        remote: what the other end announced last, or None.
        local: what we announced last, or None.
    """

    def __init__(
        self, side: Side, *, stream_above: int = c.STREAM_ABOVE, chunk_max: int | None = None
    ) -> None:
        self.side = side
        self.stream_above = max(stream_above, _STREAM_HEAD_MAX)
        if chunk_max is None:
            chunk_max = c.CHUNK_DATA_MAX if side is Side.HOST else 0
        self._encoder = ChunkEncoder(chunk_max)
        self.local: Capabilities | None = None
        self.remote: Capabilities | None = None
        self.layout = Layout()
        self._events: deque[Event | AgentProtocolError] = deque()
        self.reset()

    def reset(self) -> None:
        """Begin anew, as when the port was closed and opened: nothing received or announced."""
        data_max = c.CHUNK_FROM_AGENT_MAX if self.side is Side.HOST else c.CHUNK_DATA_MAX
        self._decoder = ChunkDecoder(data_max)
        self._receivers: dict[int, _Receiver] = {p: _Receiver(p, self) for p in ChunkPort}
        self._events.clear()
        self._broken: ChunkError | None = None
        self._sending: dict[int, int] = dict.fromkeys(ChunkPort, 0)
        self.local = self.remote = None
        self.layout = Layout()

    # --- receiving

    def receive_data(self, data: Buffer) -> None:
        """Give the connection bytes from the channel; a ``bytes`` object is not copied.

        Call ``next_event`` until it returns None before giving it more. Raises
        LocalProtocolError if that is not done and UNREAD_MAX bytes have piled up.
        """
        self._decoder.receive_data(data)

    def next_event(self) -> Event | None:
        """Return the next event, or None when the input so far holds no further one.

        Raises:
            MessageError: one message was wrong and is skipped; call again for the next.
            ChunkError: the channel cannot be understood from here on; ``reset`` begins anew.
        """
        if not self._events:
            if self._broken is None:
                self._advance()
            if not self._events:
                if self._broken is not None:
                    raise self._broken
                return None
        event = self._events.popleft()
        if isinstance(event, AgentProtocolError):
            raise event
        return event

    def _advance(self) -> None:
        """Read pieces until there is an event, an error, or no input."""
        decoder = self._decoder
        receivers = self._receivers
        events = self._events
        try:
            while not events:
                piece = decoder.next_piece()
                if piece is None:
                    self._flush()
                    return
                port, data, first, rest = piece
                receiver = receivers[port]
                receiver.feed(data, first, rest, decoder.offset - len(data))
                room = receiver.room
                if room and not rest and not events:
                    receiver.extended(decoder.gather(port, receiver.gathered, room))
        except ChunkError as error:
            self._flush()  # what came before it, however the input was cut
            self._broken = error

    def _flush(self) -> None:
        for receiver in self._receivers.values():
            receiver.flush()

    def add(self, event: Event | AgentProtocolError) -> None:
        """Queue an event (for the receivers)."""
        if isinstance(event, MessageReceived):
            if isinstance(event.message, AnnounceCapabilities):
                self.remote = event.message.capabilities
                self._settle_layout()
            elif isinstance(event.message, ClientDisconnected) and self.side is Side.GUEST:
                self._receivers[ChunkPort.CLIENT].reset()
        self._events.append(event)

    def _settle_layout(self) -> None:
        if self.local is not None and self.remote is not None:
            self.layout = Layout.negotiated(self.local, self.remote)

    @property
    def inside_message(self) -> bool:
        """Whether the stream so far ends within a chunk or a message."""
        return self._decoder.inside or any(r.inside for r in self._receivers.values())

    # --- sending

    def send(self, message: Message, port: ChunkPort = ChunkPort.CLIENT) -> bytes:
        """Return the chunks of one whole message; its payload is copied once, into the result.

        An AnnounceCapabilities settles the layout of later messages. Raises LocalProtocolError
        within a streamed message of this port.
        """
        self._check_not_sending(port)
        payload = message.payload
        head = message.head(self.layout)
        encoded = self._encode(port, message, head, payload, len(head) + len(payload))
        if isinstance(message, AnnounceCapabilities):
            self.local = message.capabilities
            self._settle_layout()
        elif isinstance(message, ClientDisconnected):
            self._sending[ChunkPort.CLIENT] = 0
        return encoded

    def start_body(
        self, head: StreamedMessage, size: int, port: ChunkPort = ChunkPort.CLIENT
    ) -> bytes:
        """Begin a message whose payload of ``size`` bytes follows with ``send_body``.

        ``head`` has no payload itself. Raises LocalProtocolError for a size that has no place in 32
        bits, and within another streamed message of this port.
        """
        self._check_not_sending(port)
        packed = head.stream_head(self.layout, size)
        if len(packed) + size > _SIZE_MAX:
            raise LocalProtocolError(f"a message of {size} bytes does not fit in the protocol")
        self._sending[port] = size
        return self._encode(port, head, packed, b"", len(packed) + size)

    def send_body(self, data: Buffer, port: ChunkPort = ChunkPort.CLIENT) -> bytes:
        """Return the next bytes of the payload, encoded.

        Raises:
            LocalProtocolError: ``data`` goes beyond the announced size.
        """
        left = self._sending[port]
        if len(data) > left:
            raise LocalProtocolError(f"{len(data)} bytes of payload, but {left} are left to send")
        self._sending[port] = left - len(data)
        return self._encoder.encode(port, b"", data) if data else b""

    def body_left(self, port: ChunkPort = ChunkPort.CLIENT) -> int:
        """Return how many bytes of payload the message begun with ``start_body`` still needs."""
        return self._sending[port]

    def _check_not_sending(self, port: ChunkPort) -> None:
        if self._sending[port]:
            raise LocalProtocolError(
                f"{self._sending[port]} bytes of the message before are still to be sent"
            )

    def _encode(
        self, port: ChunkPort, message: Message, head: bytes, payload: Buffer, size: int
    ) -> bytes:
        opaque = message.opaque if isinstance(message, UnknownMessage) else 0
        header = _HEADER.pack(c.PROTOCOL, message.type_number, opaque, size)
        return self._encoder.encode(port, header + head, payload)
