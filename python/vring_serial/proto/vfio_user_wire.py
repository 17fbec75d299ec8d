"""What vfio-user puts on the wire: commands, flags, the header and every payload but VERSION's.

All numbers are in the machine's byte order. Section names in the docstrings are those of the
vfio-user specification (QEMU's documentation, "vfio-user Protocol Specification"); flags that it
takes from Linux have the names of ``<linux/vfio.h>``.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import ClassVar, Self

from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.framing import at_least, exactly

#: Most bytes of data that one access moves, unless VERSION says otherwise.
DEFAULT_DATA_XFER_SIZE = 1 << 20
#: Most descriptors beside one message, unless VERSION says otherwise.
DEFAULT_MSG_FDS = 1
#: Bytes of one of REGION_WRITE_MULTI's writes.
MULTI_DATA = 8
#: Most writes of one REGION_WRITE_MULTI that are looked at; QEMU sends 200 at most.
MAX_MULTI_WRITES = 1024


class Command(enum.IntEnum):
    """What a client asks of a server; DMA_READ and DMA_WRITE go the other way ("Commands")."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    DIRTY_PAGES = 14
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class HeaderFlag(enum.IntFlag):
    """A header's flags; bits 0 to 3 are the type, 0 for a command ("Header")."""

    REPLY = 1
    NO_REPLY = 1 << 4
    ERROR = 1 << 5


TYPE_MASK = 0xF


class DmaFlag(enum.IntFlag):
    """What the server may do with a DMA region (VFIO_USER_DMA_MAP)."""

    READ = 1 << 0
    WRITE = 1 << 1


class UnmapFlag(enum.IntFlag):
    """How to unmap (VFIO_DMA_UNMAP_FLAG)."""

    GET_DIRTY_BITMAP = 1 << 0
    ALL = 1 << 1


class DeviceFlag(enum.IntFlag):
    """VFIO_DEVICE_FLAGS."""

    RESET = 1 << 0
    PCI = 1 << 1


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


class IrqIndex(enum.IntEnum):
    """The interrupt types of a PCI device (VFIO_PCI_*_IRQ_INDEX)."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


class IrqFlag(enum.IntFlag):
    """VFIO_IRQ_INFO."""

    EVENTFD = 1 << 0
    MASKABLE = 1 << 1
    AUTOMASKED = 1 << 2
    NORESIZE = 1 << 3


class IrqSetFlag(enum.IntFlag):
    """VFIO_IRQ_SET: one of the DATA flags and one of the ACTION flags."""

    DATA_NONE = 1 << 0
    DATA_BOOL = 1 << 1
    DATA_EVENTFD = 1 << 2
    ACTION_MASK = 1 << 3
    ACTION_UNMASK = 1 << 4
    ACTION_TRIGGER = 1 << 5


IRQ_SET_DATA = IrqSetFlag.DATA_NONE | IrqSetFlag.DATA_BOOL | IrqSetFlag.DATA_EVENTFD
IRQ_SET_ACTION = IrqSetFlag.ACTION_MASK | IrqSetFlag.ACTION_UNMASK | IrqSetFlag.ACTION_TRIGGER


class IoFdType(enum.IntEnum):
    """How a sub-region's accesses are told (VFIO_USER_IO_FD_TYPE)."""

    IOEVENTFD = 0
    IOREGIONFD = 1


@dataclass(frozen=True, slots=True)
class Header:
    """The 16 bytes before every payload ("Header").

    Attributes:
        message_id: the sender's own number, echoed in the reply.
        command: also in its reply.
        size: bytes of the message, with this header.
        flags: type in bits 0 to 3, and :class:`HeaderFlag`.
        error: errno in a reply whose ERROR flag is set.
    """

    STRUCT: ClassVar = struct.Struct("=HHIII")
    SIZE: ClassVar = STRUCT.size

    message_id: int
    command: int
    size: int
    flags: int
    error: int = 0

    def pack(self) -> bytes:
        """Return the 16 bytes."""
        return self.STRUCT.pack(self.message_id, self.command, self.size, self.flags, self.error)

    @property
    def message_size(self) -> int:
        """Bytes of the message, with this header."""
        return self.size

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 16 bytes, which can say anything. Raises RemoteProtocolError on another number."""
        return cls(*exactly(cls.STRUCT, data))


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
        _check_argsz(argsz, cls.STRUCT.size)
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
        _check_argsz(argsz, cls.STRUCT.size)
        if flags & UnmapFlag.GET_DIRTY_BITMAP:
            raise RemoteProtocolError("dirty pages are not logged")
        if flags & ~int(UnmapFlag.ALL):
            raise RemoteProtocolError(f"unknown flags {flags:#x}")
        exactly(cls.STRUCT, data)
        if flags & UnmapFlag.ALL and (address or size):
            raise RemoteProtocolError(f"all regions, and {size:#x} bytes at {address:#x}")
        return cls(address, size, flags)


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What the device is (VFIO_USER_DEVICE_GET_INFO); in the request only ``argsz`` counts.

    Attributes:
        flags: :class:`DeviceFlag`.
        num_regions, num_irqs: regions, and interrupt types.
        argsz: in a request, the most bytes that the reply's payload may have.
    """

    STRUCT: ClassVar = struct.Struct("=IIII")
    SIZE: ClassVar = STRUCT.size

    flags: int = 0
    num_regions: int = 0
    num_irqs: int = 0
    argsz: int = SIZE

    def pack(self) -> bytes:
        """Return the 16 bytes."""
        return self.STRUCT.pack(self.argsz, self.flags, self.num_regions, self.num_irqs)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 16 bytes. RemoteProtocolError on another number, and if ``argsz`` is less."""
        argsz, flags, regions, irqs = exactly(cls.STRUCT, data)
        _check_argsz(argsz, cls.STRUCT.size)
        return cls(flags, regions, irqs, argsz)


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
        _check_argsz(argsz, cls.STRUCT.size)
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
        _check_argsz(argsz, cls.STRUCT.size)
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
class IrqInfo:
    """One of the device's interrupt types (VFIO_USER_DEVICE_GET_IRQ_INFO).

    Attributes:
        index: which; all else is 0 in the request.
        flags: :class:`IrqFlag`.
        count: interrupts of that type.
        argsz: in a request, the most bytes that the reply's payload may have.
    """

    STRUCT: ClassVar = struct.Struct("=IIII")
    SIZE: ClassVar = STRUCT.size

    index: int
    flags: int = 0
    count: int = 0
    argsz: int = SIZE

    def pack(self) -> bytes:
        """Return the 16 bytes."""
        return self.STRUCT.pack(self.argsz, self.flags, self.index, self.count)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 16 bytes. RemoteProtocolError on another number, and if ``argsz`` is less."""
        argsz, flags, index, count = exactly(cls.STRUCT, data)
        _check_argsz(argsz, cls.STRUCT.size)
        return cls(index, flags, count, argsz)


@dataclass(frozen=True, slots=True)
class IrqSet:
    """An action for some interrupts of one type (VFIO_USER_DEVICE_SET_IRQS).

    Attributes:
        flags: :class:`IrqSetFlag`.
        index: the type.
        start, count: which of them; both 0 with DATA_NONE and ACTION_TRIGGER disables all.
        data: with DATA_BOOL a byte for each, not 0 if the action is meant for it.
    """

    STRUCT: ClassVar = struct.Struct("=IIIII")
    SIZE: ClassVar = STRUCT.size

    flags: int
    index: int
    start: int
    count: int
    data: bytes = b""

    def pack(self) -> bytes:
        """Return the 20 bytes, and ``data``."""
        argsz = self.SIZE + len(self.data)
        return self.STRUCT.pack(argsz, self.flags, self.index, self.start, self.count) + self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse a request. RemoteProtocolError on a wrong size, or flags IrqSetFlag forbids."""
        argsz, flags, index, start, count = at_least(cls.STRUCT, data)
        _check_argsz(argsz, cls.SIZE)
        kind, action = flags & IRQ_SET_DATA, flags & IRQ_SET_ACTION
        if kind | action != flags or kind.bit_count() != 1 or action.bit_count() != 1:
            raise RemoteProtocolError(f"flags {flags:#x} are not one kind of data and one action")
        wanted = count if kind == IrqSetFlag.DATA_BOOL else 0
        if len(data) - cls.SIZE != wanted:
            raise RemoteProtocolError(
                f"payload of {len(data)} bytes instead of {cls.SIZE + wanted}"
            )
        return cls(flags, index, start, count, data[cls.SIZE :])


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
    """Several writes in their order, each of at most 8 bytes (VFIO_USER_REGION_WRITE_MULTI)."""

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
    """How many of several writes were done, from the first on (REGION_WRITE_MULTI's reply)."""

    STRUCT: ClassVar = struct.Struct("=Q")

    count: int

    def pack(self) -> bytes:
        """Return the 8 bytes."""
        return self.STRUCT.pack(self.count)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 8 bytes. Raises RemoteProtocolError on another number."""
        return cls(*exactly(cls.STRUCT, data))


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


def _check_argsz(argsz: int, needed: int) -> None:
    if argsz < needed:
        raise RemoteProtocolError(f"argsz is {argsz}, and {needed} bytes are needed")
