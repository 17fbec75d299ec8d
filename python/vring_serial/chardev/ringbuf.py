"""ringbuf: the last bytes that the guest wrote, kept in memory and read from Python."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from vring_serial.chardev.base import Chardev, ProtocolEnd
from vring_serial.chardev.options import Options
from vring_serial.errors import ConfigError

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

    Attributes:
        overwritten: number of bytes overwritten before they were read.
    """

    def __init__(self, id: str, options: RingbufOptions | None = None) -> None:
        super().__init__(id)
        self.size = (options or RingbufOptions()).size
        self.overwritten = 0
        self._data = bytearray()

    async def start(self) -> None:
        if self.end is None:
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
        n = len(self._data) if n < 0 else n
        taken = bytes(self._data[:n])
        del self._data[:n]
        return taken

    def write(self, data: bytes) -> None:
        """Add bytes, as if the guest had written them."""
        self._append(data)

    def _append(self, data: bytes) -> None:
        self._data += data[-self.size :]
        excess = len(self._data) - self.size
        if excess > 0:
            del self._data[:excess]
        self.overwritten += max(excess, 0) + max(len(data) - self.size, 0)


class _Collector(asyncio.Protocol):
    """The protocol that passes on all data; it never pauses, so the guest never waits."""

    def __init__(self, append: Callable[[bytes], None]) -> None:
        self._append = append

    def data_received(self, data: bytes) -> None:
        self._append(data)
