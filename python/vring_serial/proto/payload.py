"""What the "user" protocols share: payloads, and a stream with descriptors beside its bytes."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from vring_serial.errors import LocalProtocolError

#: Most descriptors that one message carries: what the kernel passes at once (SCM_MAX_FD). With room
#: for as many, none is ever cut off.
MAX_FDS = 253


class Payload(Protocol):
    """What follows a header."""

    def pack(self) -> bytes:
        """The wire's bytes."""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From all bytes of one payload. Raises ValueError saying what is wrong with them."""


@dataclass(frozen=True, slots=True)
class Empty:
    """No payload."""

    def pack(self) -> bytes:
        return b""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if data:
            raise ValueError(f"payload of {len(data)} bytes instead of none")
        return cls()


def exactly(layout: struct.Struct, data: bytes) -> tuple[Any, ...]:
    """The fields of a payload of one fixed size. Raises ValueError if ``data`` has another."""
    if len(data) != layout.size:
        raise ValueError(f"payload of {len(data)} bytes instead of {layout.size}")
    return layout.unpack(data)


def at_least(layout: struct.Struct, data: bytes) -> tuple[Any, ...]:
    """The fields at the beginning of a payload. Raises ValueError if ``data`` is too short."""
    if len(data) < layout.size:
        raise ValueError(f"payload of {len(data)} bytes instead of at least {layout.size}")
    return layout.unpack_from(data)


class DescriptorStream:
    """Bytes of a stream in order, and the descriptors that came with them.

    A read on a unix socket ends with the first piece of the stream that has descriptors, so they
    belong to the message of the last byte that was read. They are held here until their message is
    taken; :meth:`take_fds` gives them back when the stream ends early.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._consumed = 0
        # (position in the stream of the byte they came with, descriptors)
        self._fds: deque[tuple[int, tuple[int, ...]]] = deque()

    def __len__(self) -> int:
        """Bytes not taken yet."""
        return len(self._buffer)

    @property
    def head(self) -> bytearray:
        """The bytes not taken yet; to be read only."""
        return self._buffer

    def receive(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Bytes, and descriptors that one ``recvmsg`` returned with them.

        Raises:
            LocalProtocolError: descriptors without any byte.
        """
        if fds and not data:
            raise LocalProtocolError("descriptors without a byte of a message")
        self._buffer += data
        if fds:
            self._fds.append((self._consumed + len(self._buffer) - 1, tuple(fds)))

    def fds_within(self, length: int) -> tuple[int, ...]:
        """Descriptors that came with the next ``length`` bytes."""
        end = self._consumed + length
        return tuple(fd for at, fds in self._fds if at < end for fd in fds)

    def take(self, length: int) -> bytes:
        """The next ``length`` bytes; the descriptors beside them are the caller's from now on."""
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._consumed += length
        while self._fds and self._fds[0][0] < self._consumed:
            self._fds.popleft()
        return data

    def take_fds(self) -> tuple[int, ...]:
        """All descriptors still held, for the caller to close: the stream is over."""
        held = tuple(fd for _, fds in self._fds for fd in fds)
        self._fds.clear()
        return held
