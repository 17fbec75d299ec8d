"""The payloads of vfio-user about the device's regions: what they are, and accesses to them.

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

#: Bytes of one of REGION_WRITE_MULTI's writes.
MULTI_DATA = 8
#: Most writes of one REGION_WRITE_MULTI that are looked at; QEMU sends 200 at most.
MAX_MULTI_WRITES = 1024


class RegionIndex(enum.IntEnum):
    """The regions that every PCI device has (VFIO_PCI_*_REGION_INDEX)."""

    BAR0 = 0
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


NUM_REGIONS = len(range(RegionIndex.BAR0, RegionIndex.VGA + 1))


class RegionFlag(enum.IntFlag):
    """VFIO_REGION_INFO_FLAG."""

    READ = 1 << 0
    WRITE = 1 << 1
    MMAP = 1 << 2
    CAPS = 1 << 3


class IoFdType(enum.IntEnum):
    """How a sub-region's accesses are told (VFIO_USER_IO_FD_TYPE)."""

    IOEVENTFD = 0
    IOREGIONFD = 1


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """One of the device's regions (VFIO_USER_DEVICE_GET_REGION_INFO).

    Attributes:
        index: which; all else is 0 in the request.
        flags: :class:`RegionFlag`.
        size: bytes; 0 if there is no such region.
        cap_offset: where capabilities follow in the reply, or 0.
        offset: of the region in the descriptor that comes with a mappable one.
        argsz: in a request, the most bytes that the reply's payload may have.
    """

    STRUCT: ClassVar = struct.Struct("=IIIIQQ")
    SIZE: ClassVar = STRUCT.size

    index: int
    flags: int = 0
    size: int = 0
    cap_offset: int = 0
    offset: int = 0
    argsz: int = SIZE

    def pack(self) -> bytes:
        """Return the 32 bytes."""
        return self.STRUCT.pack(
            self.argsz, self.flags, self.index, self.cap_offset, self.size, self.offset
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 32 bytes. RemoteProtocolError on another number, and if ``argsz`` is less."""
        argsz, flags, index, cap_offset, size, offset = exactly(cls.STRUCT, data)
        check_argsz(argsz, cls.STRUCT.size)
        return cls(index, flags, size, cap_offset, offset, argsz)


@dataclass(frozen=True, slots=True)
class IoEventFd:
    """A part of a region; whoever writes to it has its descriptor signalled instead.

    Attributes:
        offset: first byte within the region.
        size: bytes; 0 if writes of any size count.
        fd_index: which of the descriptors beside the message; several parts may share one.
        flags: KVM_IOEVENTFD_FLAG_*.
        datamatch: the value that alone counts, if ``flags`` says so.
    """

    STRUCT: ClassVar = struct.Struct("=QQIIIIQ")

    offset: int
    size: int
    fd_index: int
    flags: int = 0
    datamatch: int = 0

    def pack(self) -> bytes:
        """Return the 40 bytes."""
        return self.STRUCT.pack(
            self.offset, self.size, self.fd_index, IoFdType.IOEVENTFD, self.flags, 0, self.datamatch
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 40 bytes. RemoteProtocolError on another number, and if it is no ioeventfd."""
        at, size, fd_index, kind, flags, _, datamatch = exactly(cls.STRUCT, data)
        if kind != IoFdType.IOEVENTFD:
            raise RemoteProtocolError(f"sub-region of type {kind}")
        return cls(at, size, fd_index, flags, datamatch)


@dataclass(frozen=True, slots=True)
class RegionIoFds:
    """Parts of a region that have descriptors (VFIO_USER_DEVICE_GET_REGION_IO_FDS).

    Attributes:
        index: which region; all else but ``argsz`` is 0 in the request.
        sub_regions: what the reply has room for: all, or none if ``argsz`` says that it needs more.
        argsz: the most bytes that the reply's payload may have; in a reply, those that it needs.
    """

    STRUCT: ClassVar = struct.Struct("=IIII")
    SIZE: ClassVar = STRUCT.size

    index: int
    sub_regions: tuple[IoEventFd, ...] = ()
    argsz: int = SIZE

    def pack(self) -> bytes:
        """Return the 16 bytes, and 40 for each sub-region."""
        head = self.STRUCT.pack(self.argsz, 0, self.index, len(self.sub_regions))
        return head + b"".join(sub_region.pack() for sub_region in self.sub_regions)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse a request or a reply. RemoteProtocolError on a wrong size, argsz or flags."""
        argsz, flags, index, count = at_least(cls.STRUCT, data)
        check_argsz(argsz, cls.STRUCT.size)
        if flags:
            raise RemoteProtocolError(f"unknown flags {flags:#x}")
        step = IoEventFd.STRUCT.size
        if len(data) != cls.SIZE + count * step:
            raise RemoteProtocolError(f"payload of {len(data)} bytes for {count} sub-regions")
        starts = range(cls.SIZE, len(data), step)
        return cls(index, tuple(IoEventFd.unpack(data[at : at + step]) for at in starts), argsz)

    @classmethod
    def needed(cls, count: int) -> int:
        """Return the bytes of the payload with ``count`` sub-regions."""
        return cls.SIZE + count * IoEventFd.STRUCT.size


@dataclass(frozen=True, slots=True)
class RegionAccess:
    """A part of a region: data in REGION_WRITE and in REGION_READ's reply, none otherwise.

    Attributes:
        offset: first byte within the region.
        region: index of the region.
        count, data: how many bytes, and the bytes, or none.
    """

    STRUCT: ClassVar = struct.Struct("=QII")
    SIZE: ClassVar = STRUCT.size

    offset: int
    region: int
    count: int
    data: bytes = b""

    def pack(self) -> bytes:
        """Return the 16 bytes, and ``data``."""
        return self.STRUCT.pack(self.offset, self.region, self.count) + self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 16 bytes, and data of any length. RemoteProtocolError if there are fewer."""
        offset, region, count = at_least(cls.STRUCT, data)
        return cls(offset, region, count, data[cls.SIZE :])


@dataclass(frozen=True, slots=True)
class RegionRead(RegionAccess):
    """REGION_READ's request, which has no data, and REGION_WRITE's reply."""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 16 bytes. Raises RemoteProtocolError on another number."""
        return cls(*exactly(cls.STRUCT, data))


@dataclass(frozen=True, slots=True)
class RegionWrite(RegionAccess):
    """REGION_WRITE's request, with its data, and REGION_READ's reply."""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 16 bytes and ``count`` of data. Raises RemoteProtocolError on another number."""
        offset, region, count = at_least(cls.STRUCT, data)
        if len(data) != cls.SIZE + count:
            raise RemoteProtocolError(f"payload of {len(data)} bytes instead of {cls.SIZE + count}")
        return cls(offset, region, count, data[cls.SIZE :])


@dataclass(frozen=True, slots=True)
class WriteMulti:
    """Several writes, each of at most 8 bytes (VFIO_USER_REGION_WRITE_MULTI).

    Attributes:
        writes: the writes, in order.
    """

    COUNT: ClassVar = struct.Struct("=Q")
    STRUCT: ClassVar = struct.Struct(f"=QII{MULTI_DATA}s")

    writes: tuple[RegionWrite, ...]

    def pack(self) -> bytes:
        """Return the 8 bytes of the count, and 24 for each write, its data padded with zeros."""
        packed = (self.STRUCT.pack(w.offset, w.region, w.count, w.data) for w in self.writes)
        return self.COUNT.pack(len(self.writes)) + b"".join(packed)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse a request. RemoteProtocolError on a wrong size, or too many or too long writes."""
        (count,) = at_least(cls.COUNT, data)
        if count > MAX_MULTI_WRITES:
            raise RemoteProtocolError(f"{count} writes, at most {MAX_MULTI_WRITES} are taken")
        wanted = cls.COUNT.size + count * cls.STRUCT.size
        if len(data) != wanted:
            raise RemoteProtocolError(f"payload of {len(data)} bytes instead of {wanted}")
        writes = []
        for offset, region, size, content in cls.STRUCT.iter_unpack(data[cls.COUNT.size :]):
            if size > MULTI_DATA:
                raise RemoteProtocolError(f"a write of {size} bytes, at most {MULTI_DATA} fit")
            writes.append(RegionWrite(offset, region, size, content[:size]))
        return cls(tuple(writes))


@dataclass(frozen=True, slots=True)
class WriteMultiDone:
    """The reply to VFIO_USER_REGION_WRITE_MULTI.

    Attributes:
        count: number of writes done, counted from the first.
    """

    STRUCT: ClassVar = struct.Struct("=Q")

    count: int

    def pack(self) -> bytes:
        """Return the 8 bytes."""
        return self.STRUCT.pack(self.count)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 8 bytes. Raises RemoteProtocolError on another number."""
        return cls(*exactly(cls.STRUCT, data))
