"""VDI port chunks: the outermost framing of the agent channel (VDIChunkHeader in vd_agent.h).

A chunk is a port (whom it concerns on the host: the client or the server), a size, and so many
bytes of an agent message. A message may take several chunks; a chunk never holds more than one
message. The two directions differ: a chunk to the guest carries at most 2048 bytes, one from it any
number.
"""

from __future__ import annotations

import struct
from typing import TypeAlias

from vring_serial.errors import LocalProtocolError

from .constants import CHUNK_DATA_MAX, CHUNK_FROM_AGENT_MAX, CHUNK_HEADER_BYTES, UNREAD_MAX
from .errors import ChunkError

Buffer: TypeAlias = bytes | bytearray | memoryview
Piece: TypeAlias = tuple[int, memoryview, bool, int]

CHUNK_HEADER = struct.Struct("<II")


class ChunkDecoder:
    """Bytes in, pieces of chunks out; remembers at most one header and the bytes last given.

    Args:
        data_max: the longest chunk that is believed, in bytes of data.
    """

    def __init__(self, data_max: int = CHUNK_FROM_AGENT_MAX) -> None:
        self._data_max = data_max
        self._input = memoryview(b"")
        self._position = 0
        self._header = bytearray()
        self._port = 0
        self._left = 0
        self._consumed_before = 0

    @property
    def offset(self) -> int:
        """Bytes of the stream consumed so far."""
        return self._consumed_before + self._position

    @property
    def inside(self) -> bool:
        """Whether the stream so far ends within a chunk or its header."""
        return bool(self._header) or self._left > 0

    def receive_data(self, data: Buffer) -> None:
        """Give the decoder more of the stream.

        A ``bytes`` object is kept, not copied, and the pieces are views of it. Raises
        LocalProtocolError if UNREAD_MAX bytes wait because nobody took the pieces.
        """
        if not isinstance(data, bytes):
            data = bytes(data)
        unread = len(self._input) - self._position
        self._consumed_before += self._position
        if unread:
            if unread + len(data) > UNREAD_MAX:
                raise LocalProtocolError(f"{unread} bytes of agent channel input were left unread")
            data = b"".join((self._input[self._position :], data))
        self._input = memoryview(data)
        self._position = 0

    def next_piece(self) -> Piece | None:
        """Return the next piece of a chunk's data, or None when the input is used up.

        Returns:
            (port, data, first piece of its chunk?, bytes of the chunk that follow this piece). The
            data are a view of what was received; they are empty only for a chunk of size 0.

        Raises:
            ChunkError: an impossible header. The decoder can then only be replaced.
        """
        first = False
        if not self._left:
            if not self._read_header():
                return None
            first = True
        position = self._position
        end = position + self._left
        if end > len(self._input):
            end = len(self._input)
            if position == end and not first:
                return None
        self._position = end
        self._left -= end - position
        return self._port, self._input[position:end], first, self._left

    def gather(self, port: int, into: bytearray, limit: int) -> int:
        """Append the data of the whole chunks that come next, which saves a call for each.

        Takes only chunks for ``port`` that have been received entirely, and together at most
        ``limit`` bytes of data. Returns how many bytes were appended. Between chunks only.
        """
        unpack = CHUNK_HEADER.unpack_from
        view = self._input
        start = self._position
        headers_end = len(view) - CHUNK_HEADER_BYTES
        left = limit
        if self._left or self._header:
            return 0
        while start <= headers_end:
            chunk_port, size = unpack(view, start)
            data = start + CHUNK_HEADER_BYTES
            if chunk_port != port or size > left or size > self._data_max:
                break
            end = data + size
            if end > len(view):
                break
            into += view[data:end]
            left -= size
            start = end
        self._position = start
        return limit - left

    def _read_header(self) -> bool:
        position = self._position
        if not self._header and position + CHUNK_HEADER_BYTES <= len(self._input):
            port, size = CHUNK_HEADER.unpack_from(self._input, position)
            self._position = position + CHUNK_HEADER_BYTES
        else:
            end = position + CHUNK_HEADER_BYTES - len(self._header)
            self._header += self._input[position:end]
            self._position = min(end, len(self._input))
            if len(self._header) < CHUNK_HEADER_BYTES:
                return False
            port, size = CHUNK_HEADER.unpack(self._header)
            self._header.clear()
        if not 1 <= port <= 2:
            raise ChunkError(
                "VDIChunkHeader.port",
                self.offset - 8,
                f"port {port}, must be 1 (client) or 2 (server)",
            )
        if size > self._data_max:
            raise ChunkError(
                "VDIChunkHeader.size", self.offset - 4, f"{size} bytes, at most {self._data_max}"
            )
        self._port = port
        self._left = size
        return True


class ChunkEncoder:
    """Data of messages in, chunks out.

    Args:
        data_max: the longest chunk to make, in bytes of data; 0 puts all data of a call into one.
    """

    def __init__(self, data_max: int = CHUNK_DATA_MAX) -> None:
        self._data_max = data_max

    def encode(self, port: int, head: bytes, payload: Buffer = b"") -> bytes:
        """Chunks with the bytes of ``head`` and then of ``payload``, which is copied once.

        The two are part of one message, and ``head`` (which may be empty) is shorter than a chunk
        unless ``payload`` is empty.
        """
        total = len(head) + len(payload)
        most = self._data_max or total
        if total <= most:
            return b"".join((CHUNK_HEADER.pack(port, total), head, payload))
        if not payload:
            head, payload = b"", head
        start = most - len(head)
        view = memoryview(payload)
        full = CHUNK_HEADER.pack(port, most)
        parts: list[Buffer] = [full, head, view[:start]]
        last = len(payload) - (len(payload) - start) % most
        for position in range(start, last, most):
            parts.append(full)
            parts.append(view[position : position + most])
        if last < len(payload):
            parts.append(CHUNK_HEADER.pack(port, len(payload) - last))
            parts.append(view[last:])
        return b"".join(parts)
