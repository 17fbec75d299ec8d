"""Framing of vhost-user and vfio-user: a stream of messages with file descriptors beside its bytes.

A message is a header, which says how long the message is, and a payload. All types that are on the
wire follow one convention: ``pack()`` returns the bytes, ``unpack(data)`` takes exactly the bytes
of one and raises RemoteProtocolError saying what is wrong with them.
"""

from __future__ import annotations

import abc
import enum
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

from vring_serial.errors import LocalProtocolError, RemoteProtocolError

#: Most descriptors that one message carries: what the kernel passes at once (SCM_MAX_FD). With room
#: for as many, none is ever cut off.
MAX_FDS = 253


class Payload(Protocol):
    """What follows a header."""

    def pack(self) -> bytes:
        """Return the bytes on the wire."""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse all bytes of one payload. Raises RemoteProtocolError."""


@dataclass(frozen=True, slots=True)
class Empty:
    """The payload of a message that has none: 0 bytes."""

    def pack(self) -> bytes:
        """Return no bytes."""
        return b""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Check that there are no bytes. Raises RemoteProtocolError if there are."""
        if data:
            raise RemoteProtocolError(f"payload of {len(data)} bytes instead of none")
        return cls()


def exactly(layout: struct.Struct, data: bytes) -> tuple[Any, ...]:
    """Return the fields of a payload of fixed size. Raises RemoteProtocolError on another."""
    if len(data) != layout.size:
        raise RemoteProtocolError(f"payload of {len(data)} bytes instead of {layout.size}")
    return layout.unpack(data)


def at_least(layout: struct.Struct, data: bytes) -> tuple[Any, ...]:
    """Return the fields at a payload's start. Raises RemoteProtocolError if it is too short."""
    if len(data) < layout.size:
        raise RemoteProtocolError(f"payload of {len(data)} bytes instead of at least {layout.size}")
    return layout.unpack_from(data)


class BadMessageError(RemoteProtocolError):
    """The peer sent a message that the protocol does not allow.

    Attributes:
        message: name of the message, such as ``SET_VRING_NUM``.
        cause: what is wrong with it.
    """

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(f"{message}: {cause}")
        self.message = message
        self.cause = cause


class FramingError(BadMessageError):
    """The header is invalid, so the next message cannot be found: close the connection."""


class Header(Protocol):
    """The start of every message."""

    @property
    def message_size(self) -> int:
        """Bytes of the whole message, as the header claims."""


def kind_name(kind: int, noun: str) -> str:
    """Return the name of a message type for errors and logs: ``noun`` and its number if unknown."""
    return kind.name if isinstance(kind, enum.IntEnum) else f"{noun} {kind}"


@dataclass(frozen=True, slots=True)
class Share:
    """A message's part in a piece of the stream.

    Attributes:
        size: its bytes there.
        whole: these are all of its bytes.
        fds: how many of the piece's descriptors are its.
    """

    size: int
    whole: bool
    fds: int


def share_fds(
    piece: bytes,
    count: int,
    *,
    header_size: int,
    size_of: Callable[[bytes], int],
    fds_of: Callable[[bytes], range],
    had: int = 0,
) -> list[Share]:
    """Return whose the descriptors are that came with the last bytes of a piece of the stream.

    The kernel does not say beside which of these bytes. Peers send one message at once, with its
    descriptors, and then they are those of the last message. One that sends several messages at
    once has all their descriptors beside the first byte. So the last message gets as many as it can
    take, then the one before it, and so on; what none can take is the last one's, which will be
    refused for it. Of a last message that is not whole, nobody knows how many it takes: it gets
    what the others do not need.

    Args:
        piece: 1 byte or more; begins with a message.
        count: of the descriptors, which are in the order of the messages.
        header_size: bytes of a header.
        size_of: returns the size in bytes of the message with this header.
        fds_of: returns how many descriptors this whole message may have.
        had: descriptors that the first message has already.
    """
    found: list[tuple[int, int]] = []  # where a message begins, and ends if it is whole
    end = 0
    while end < len(piece):
        start, head = end, piece[end : end + header_size]
        end += size_of(head) if len(head) == header_size else header_size
        found.append((start, end))
    whole = end == len(piece)
    shares = [0] * len(found)
    left = count
    for i in range(len(found) - 1, -1, -1):
        if not left:
            break
        start, end = found[i]
        if end <= len(piece):
            allowed = fds_of(piece[start:end])
            wanted = (allowed[-1] if whole else allowed[0]) - (0 if i else had)
            shares[i] = min(left, max(0, wanted))
            left -= shares[i]
    shares[-1] += left
    return [
        Share(min(end, len(piece)) - start, end <= len(piece), fds)
        for (start, end), fds in zip(found, shares, strict=True)
    ]


HeaderT = TypeVar("HeaderT", bound=Header)
MessageT = TypeVar("MessageT")


class MessageParser(abc.ABC, Generic[HeaderT, MessageT]):
    """Splits a stream into messages; holds at most one incomplete message beside one read.

    A read on a unix socket ends with the first piece of the stream that has descriptors, so they
    belong to the message of the last byte that was read, unless the peer sent several at once: see
    share_fds. They are held until their message is handed out.

    Args:
        header_size: bytes of a header.
    """

    def __init__(self, header_size: int) -> None:
        self._header_size = header_size
        self._buffer = bytearray()
        self._consumed = 0
        # (position in the stream of the byte they came with, descriptors)
        self._fds: deque[tuple[int, tuple[int, ...]]] = deque()
        self._error: FramingError | None = None

    @property
    def header_size(self) -> int:
        """Bytes of a header."""
        return self._header_size

    def size_of(self, data: bytes) -> int:
        """Return the bytes of the message that begins with ``data``, which has a whole header.

        Of what cannot be a message, and will be refused, only the header counts.
        """
        try:
            header = self._unpack_header(data[: self._header_size])
            self._check(header)
        except FramingError:
            return self._header_size
        return header.message_size

    def fds_of(self, data: bytes) -> range:
        """Return how many descriptors may be beside the message, all of ``data``.

        None here; and with one that will be refused.
        """
        return range(1)

    @property
    def wanted(self) -> int:
        """Bytes that complete the current header or message; at least 1."""
        size = self._header_size
        if len(self._buffer) >= size:
            size = self._unpack_header(bytes(self._buffer[:size])).message_size
        return max(1, size - len(self._buffer))

    def receive_data(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes of the stream, and the descriptors that one ``recvmsg`` returned with them.

        Raises:
            LocalProtocolError: descriptors without any byte.
        """
        if fds and not data:
            raise LocalProtocolError("descriptors without a byte of a message")
        before = len(self._buffer)
        self._buffer += data
        if fds:
            self._give(before, fds)

    def next_message(self) -> MessageT | None:
        """Return the next whole message, or None if more bytes are needed.

        The message's descriptors belong to the caller from then on.

        Raises:
            FramingError: the header is invalid, the payload is too large, or the message has more
                than MAX_FDS descriptors. Every later call raises it again.
        """
        if self._error is not None:
            raise self._error
        try:
            return self._next()
        except FramingError as error:
            self._error = error
            raise

    def take_fds(self) -> tuple[int, ...]:
        """Return all descriptors still held, for the caller to close: the stream has ended."""
        held = tuple(fd for _, fds in self._fds for fd in fds)
        self._fds.clear()
        return held

    @abc.abstractmethod
    def _unpack_header(self, data: bytes) -> HeaderT:
        """Parse a header, believing nothing of it yet."""

    @abc.abstractmethod
    def _check(self, header: HeaderT) -> None:
        """Raise FramingError if the header is invalid or its payload too large."""

    @abc.abstractmethod
    def _message(self, header: HeaderT, payload: bytes, fds: tuple[int, ...]) -> MessageT:
        """Build a message from its parts."""

    @abc.abstractmethod
    def _name(self, header: HeaderT) -> str:
        """Return the message's name for errors."""

    def _next(self) -> MessageT | None:
        start = self._header_size
        if len(self._buffer) < start:
            _check_count(self._fds_within(start), "message")
            return None
        header = self._unpack_header(bytes(self._buffer[:start]))
        self._check(header)
        end = header.message_size
        fds = self._fds_within(end) if self._fds else ()
        if len(fds) > MAX_FDS:
            _check_count(fds, self._name(header))
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[start:end])
        del self._buffer[:end]
        self._consumed += end
        while self._fds and self._fds[0][0] < self._consumed:
            self._fds.popleft()
        return self._message(header, payload, fds)

    def _give(self, before: int, fds: Sequence[int]) -> None:
        """Note whose these descriptors are: of messages that do not end in ``before`` bytes."""
        start = 0
        while len(head := self._buffer[start : start + self._header_size]) == self._header_size:
            if (end := start + self.size_of(bytes(head))) > before:
                break
            start = end
        first = self._consumed + start
        shares = share_fds(
            bytes(self._buffer[start:]),
            len(fds),
            header_size=self._header_size,
            size_of=self.size_of,
            fds_of=self.fds_of,
            had=sum(len(held) for at, held in self._fds if at >= first),
        )
        end, given = first, 0
        for share in shares:
            end += share.size
            if share.fds:
                self._fds.append((end - 1, tuple(fds[given : given + share.fds])))
                given += share.fds

    def _fds_within(self, length: int) -> tuple[int, ...]:
        """Return the descriptors that came with the next ``length`` bytes."""
        end = self._consumed + length
        return tuple(fd for at, fds in self._fds if at < end for fd in fds)


def _check_count(fds: tuple[int, ...], name: str) -> None:
    if len(fds) > MAX_FDS:
        raise FramingError(name, f"{len(fds)} descriptors, at most {MAX_FDS}")
