"""ringbuf: the last bytes that the guest wrote, kept in memory and read from Python."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass

from vring_serial.chardev.base import Chardev, ProtocolEnd
from vring_serial.chardev.options import Options
from vring_serial.errors import ConfigError, ResourceError

log = logging.getLogger(__name__)

MAX_SIZE = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class RingbufOptions(Options):
    """Options of ringbuf.

    Attributes:
        size: capacity in bytes; a power of two.
    """

    size: int = 65536

    def __post_init__(self) -> None:
        if not 0 < self.size <= MAX_SIZE or self.size & (self.size - 1):
            raise ConfigError(
                f"{self.size} is not a power of two between 1 and {MAX_SIZE} bytes", "size"
            )


class RingbufChardev(Chardev):
    """A buffer of the newest ``size`` bytes; older ones are overwritten, the guest never waits.

    A successor of a process that was killed finds what is in it.

    Attributes:
        overwritten: number of bytes overwritten before they were read, by this process.
    """

    def __init__(self, id: str, options: RingbufOptions | None = None) -> None:
        super().__init__(id)
        self.size = (options or RingbufOptions()).size
        self.overwritten = 0
        self._data: _Bytes | _KeptBytes = _Bytes(self.size)

    async def start(self) -> None:
        if self.end is not None:
            return
        if self.keeping is not None:
            try:
                area = self.keeping.area("ring", _KeptBytes.HEAD.size + self.size)
            except ResourceError as error:
                log.warning("chardev %s: it does not outlive a worker: %s", self.id, error)
            else:
                self._data = _KeptBytes(area)
        self._open_end(ProtocolEnd(lambda: _Collector(self._append)))

    async def aclose(self) -> None:
        self._close_end()

    @property
    def description(self) -> str:
        return f"ringbuf:{self.size} bytes"

    def __len__(self) -> int:
        return len(self._data)

    def read(self, n: int = -1) -> bytes:
        """Remove and return up to ``n`` of the oldest bytes; all if ``n`` is negative."""
        return self._data.take(len(self) if n < 0 else n)

    def write(self, data: bytes) -> None:
        """Add bytes, as if the guest had written them."""
        self._append(data)

    def _append(self, data: bytes) -> None:
        self.overwritten += max(len(self) + len(data) - self.size, 0)
        self._data.append(data[-self.size :])


class _Bytes:
    """The newest bytes, in memory of this process."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._data = bytearray()

    def __len__(self) -> int:
        return len(self._data)

    def append(self, data: bytes) -> None:
        """Add at most ``size`` bytes, in the place of the oldest if need be."""
        self._data += data
        if (excess := len(self._data) - self._size) > 0:
            del self._data[:excess]

    def take(self, n: int) -> bytes:
        """Remove and return up to ``n`` of the oldest bytes."""
        taken = bytes(self._data[:n])
        del self._data[:n]
        return taken


class _KeptBytes:
    """The same in memory that outlives this process: two counters, of bytes removed and added.

    Each is stored when the bytes are as it says, so whoever finds them finds whole bytes in order.
    """

    HEAD = struct.Struct("<QQ")

    def __init__(self, area: memoryview) -> None:
        self._head = area[: self.HEAD.size].cast("Q")
        self._data = area[self.HEAD.size :]
        removed, added = self._head
        if added - removed not in range(len(self._data) + 1):
            self._head[0] = added

    def __len__(self) -> int:
        return self._head[1] - self._head[0]

    def append(self, data: bytes) -> None:
        """See _Bytes."""
        size = len(self._data)
        removed, added = self._head
        self._head[0] = max(removed, added + len(data) - size)
        at = added % size
        first = min(len(data), size - at)
        self._data[at : at + first] = data[:first]
        self._data[: len(data) - first] = data[first:]
        self._head[1] = added + len(data)

    def take(self, n: int) -> bytes:
        """See _Bytes."""
        removed, added = self._head
        n = min(n, added - removed)
        at = removed % len(self._data)
        taken = bytes(self._data[at : at + n])
        taken += bytes(self._data[: n - len(taken)])
        self._head[0] = removed + n
        return taken


class _Collector(asyncio.Protocol):
    """The protocol that passes on all data; it never pauses, so the guest never waits."""

    def __init__(self, append: Callable[[bytes], None]) -> None:
        self._append = append

    def data_received(self, data: bytes) -> None:
        self._append(data)
