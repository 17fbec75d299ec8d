"""The 256 bytes of a conventional PCI function's configuration space (PCI 3.0, 6)."""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass

from vring_serial.errors import ConfigError

SIZE = 256
#: Where the first capability may lie.
_CAPABILITIES_AT = 0x40


class Register(enum.IntEnum):
    """Offsets of the header."""

    VENDOR_ID = 0x00
    DEVICE_ID = 0x02
    COMMAND = 0x04
    STATUS = 0x06
    REVISION = 0x08
    CLASS = 0x09
    CACHE_LINE_SIZE = 0x0C
    LATENCY_TIMER = 0x0D
    BAR0 = 0x10
    SUBSYSTEM_VENDOR_ID = 0x2C
    SUBSYSTEM_ID = 0x2E
    CAPABILITIES = 0x34
    INTERRUPT_LINE = 0x3C
    INTERRUPT_PIN = 0x3D


class Command(enum.IntFlag):
    """Bits of the command register that this function has."""

    IO_SPACE = 1 << 0
    MEMORY_SPACE = 1 << 1
    BUS_MASTER = 1 << 2
    PARITY_ERROR_RESPONSE = 1 << 6
    SERR_ENABLE = 1 << 8
    INTX_DISABLE = 1 << 10


class StatusBit(enum.IntFlag):
    """Bits of the status register that this function has."""

    INTERRUPT = 1 << 3
    CAPABILITIES = 1 << 4


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register.

    Attributes:
        index: 0 to 5.
        size: bytes, a power of two.
        io: in I/O space; else 32-bit memory, not prefetchable.
    """

    index: int
    size: int
    io: bool = False

    @property
    def register(self) -> int:
        """The offset in configuration space."""
        return Register.BAR0 + 4 * self.index


class ConfigSpace:
    """The bytes, a mask of the bits that software can write, and hooks on accesses.

    Args:
        state: contents to go on from, of which the bits that software can write count; kept up to
            date here from :meth:`seal` on. Empty: as after a reset.

    Raises ConfigError if the state has another size.

    Attributes:
        data: the present contents, which are all the state.
    """

    def __init__(self, state: bytearray) -> None:
        if len(state) not in (0, SIZE):
            raise ConfigError(f"a configuration space of {len(state)} bytes")
        self._state = state
        self.data = bytearray(SIZE)
        self._initial = bytes(SIZE)
        self._writable = bytearray(SIZE)
        self._read_hooks: list[tuple[int, int, Callable[[], None]]] = []
        self._write_hooks: list[tuple[int, int, Callable[[], None]]] = []
        self._next_capability = _CAPABILITIES_AT
        self._last_link = int(Register.CAPABILITIES)

    # --- to make it

    def set(self, offset: int, value: int, size: int, writable: int = 0) -> None:
        """Set a field of ``size`` bytes, of which software can write the bits ``writable``."""
        self.data[offset : offset + size] = value.to_bytes(size, "little")
        self._writable[offset : offset + size] = writable.to_bytes(size, "little")

    def add_bar(self, bar: Bar) -> None:
        """Declare a base address register."""
        space = 1 if bar.io else 0
        self.set(bar.register, space, 4, 0x1_0000_0000 - bar.size)

    def add_capability(self, body: bytes, writable: bytes = b"") -> int:
        """Append a capability and return its offset.

        Args:
            body: all of it, with a zero at the place of the link, the second byte.
            writable: mask of the bits that software can write; may be shorter.

        Raises:
            ValueError: the space is full.
        """
        at = self._next_capability
        end = (at + len(body) + 3) & ~3
        if end > SIZE:
            raise ValueError("no room for another capability")
        self._next_capability = end
        self.data[self._last_link] = at
        self._last_link = at + 1
        self.data[at : at + len(body)] = body
        self._writable[at : at + len(writable)] = writable
        status = self.word(Register.STATUS) | StatusBit.CAPABILITIES
        struct.pack_into("<H", self.data, Register.STATUS, status)
        return at

    def on_read(self, offset: int, size: int, hook: Callable[[], None]) -> None:
        """Call ``hook`` before bytes of this field are read."""
        self._read_hooks.append((offset, offset + size, hook))

    def on_write(self, offset: int, size: int, hook: Callable[[], None]) -> None:
        """Call ``hook`` after bytes of this field were written, changed or not."""
        self._write_hooks.append((offset, offset + size, hook))

    def seal(self) -> None:
        """Make the present contents those after a reset, and go on from the state."""
        self._initial = bytes(self.data)
        if not self._state:
            self._state += self.data
        state = bytes(self._state)
        self._state[:] = self.data
        self.data = self._state
        self.take(state)

    # --- to use it

    def reset(self) -> None:
        """Restore the contents of :meth:`seal`, without calling hooks."""
        self.data[:] = self._initial

    def take(self, contents: bytes | bytearray) -> None:
        """Take over the bits that software can write, without calling hooks."""
        for at, writable in enumerate(self._writable):
            self.data[at] = self.data[at] & ~writable & 0xFF | contents[at] & writable

    def word(self, offset: int) -> int:
        """Return 16 bits, without calling hooks."""
        return self.data[offset] | self.data[offset + 1] << 8

    def double_word(self, offset: int) -> int:
        """Return 32 bits, without calling hooks."""
        return int.from_bytes(self.data[offset : offset + 4], "little")

    def read(self, offset: int, size: int) -> int:
        """Return ``size`` bytes as a little-endian number; beyond the end all bits are ones."""
        for start, end, hook in self._read_hooks:
            if offset < end and start < offset + size:
                hook()
        value = int.from_bytes(self.data[offset : offset + size], "little")
        if offset + size > SIZE:
            inside = max(SIZE - offset, 0)
            value |= (1 << 8 * size) - (1 << 8 * inside)
        return value

    def write(self, offset: int, value: int, size: int) -> None:
        """Write ``size`` bytes; bits that software cannot write stay."""
        end = min(offset + size, SIZE)
        for at in range(offset, end):
            writable = self._writable[at]
            new = value >> 8 * (at - offset) & writable
            self.data[at] = self.data[at] & ~writable & 0xFF | new
        for start, stop, hook in self._write_hooks:
            if offset < stop and start < end:
                hook()
