"""The payloads of vfio-user about the client's memory: DMA_MAP, DMA_UNMAP, DMA_READ and DMA_WRITE.

Names and byte order are those of :mod:`vring_serial.proto.vfio_user_wire`.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import ClassVar, Self

from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.framing import at_least, exactly
from vring_serial.proto.vfio_user_wire import check_argsz


class DmaFlag(enum.IntFlag):
    """What the server may do with a DMA region (VFIO_USER_DMA_MAP)."""

    READ = 1 << 0
    WRITE = 1 << 1


class UnmapFlag(enum.IntFlag):
    """How to unmap (VFIO_DMA_UNMAP_FLAG)."""

    GET_DIRTY_BITMAP = 1 << 0
    ALL = 1 << 1


@dataclass(frozen=True, slots=True)
class DmaMap:
    """A region of the client's memory that the server may access (VFIO_USER_DMA_MAP).

    The client sends it, with a descriptor if the region can be mapped; the reply has no payload.

    Attributes:
        flags: :class:`DmaFlag`.
        offset: bytes from the start of the descriptor's file to the region.
        address, size: first DMA address, and bytes.
    """

    STRUCT: ClassVar = struct.Struct("=IIQQQ")

    flags: int
    offset: int
    address: int
    size: int

    def pack(self) -> bytes:
        """Return the 32 bytes."""
        return self.STRUCT.pack(self.STRUCT.size, self.flags, self.offset, self.address, self.size)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 32 bytes. RemoteProtocolError on another number, flags, or no possible region."""
        argsz, flags, offset, address, size = exactly(cls.STRUCT, data)
        check_argsz(argsz, cls.STRUCT.size)
        if flags & ~int(DmaFlag.READ | DmaFlag.WRITE):
            raise RemoteProtocolError(f"unknown flags {flags:#x}")
        if not size or address + size > 1 << 64:
            raise RemoteProtocolError(f"{size:#x} bytes at {address:#x} are no region")
        if offset + size > 1 << 63:
            raise RemoteProtocolError(f"{size:#x} bytes at offset {offset:#x} are in no file")
        return cls(flags, offset, address, size)


@dataclass(frozen=True, slots=True)
class DmaUnmap:
    """A region as it was mapped, or all of them (VFIO_USER_DMA_UNMAP); the reply repeats it.

    Attributes:
        address: first DMA address; 0 with ALL.
        size: bytes; 0 with ALL.
        flags: :class:`UnmapFlag`.
    """

    STRUCT: ClassVar = struct.Struct("=IIQQ")

    address: int
    size: int
    flags: int = 0

    def pack(self) -> bytes:
        """Return the 24 bytes."""
        return self.STRUCT.pack(self.STRUCT.size, self.flags, self.address, self.size)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 24 bytes. RemoteProtocolError on another number or flags, or ALL with a range."""
        argsz, flags, address, size = at_least(cls.STRUCT, data)
        check_argsz(argsz, cls.STRUCT.size)
        if flags & UnmapFlag.GET_DIRTY_BITMAP:
            raise RemoteProtocolError("dirty pages are reported by DEVICE_FEATURE alone")
        if flags & ~int(UnmapFlag.ALL):
            raise RemoteProtocolError(f"unknown flags {flags:#x}")
        exactly(cls.STRUCT, data)
        if flags & UnmapFlag.ALL and (address or size):
            raise RemoteProtocolError(f"all regions, and {size:#x} bytes at {address:#x}")
        return cls(address, size, flags)


@dataclass(frozen=True, slots=True)
class DmaAccess:
    """A part of the client's memory: data in DMA_WRITE and in DMA_READ's reply, none otherwise.

    Attributes:
        address: first DMA address.
        count, data: how many bytes, and the bytes, or none.
    """

    STRUCT: ClassVar = struct.Struct("=QQ")
    SIZE: ClassVar = STRUCT.size

    address: int
    count: int
    data: bytes = b""

    def pack(self) -> bytes:
        """Return the 16 bytes, and ``data``."""
        return self.STRUCT.pack(self.address, self.count) + self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 16 bytes, and data of any length. RemoteProtocolError if there are fewer."""
        address, count = at_least(cls.STRUCT, data)
        return cls(address, count, data[cls.SIZE :])
