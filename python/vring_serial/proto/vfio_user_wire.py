"""What vfio-user puts on the wire: commands, the header, the device and its interrupts.

The payloads about its regions are in :mod:`vring_serial.proto.vfio_user_regions`, those about the
client's memory in :mod:`vring_serial.proto.vfio_user_dma`, and VERSION's in
:mod:`vring_serial.proto.vfio_user_version`.

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


class DeviceFlag(enum.IntFlag):
    """VFIO_DEVICE_FLAGS."""

    RESET = 1 << 0
    PCI = 1 << 1


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
        check_argsz(argsz, cls.STRUCT.size)
        return cls(flags, regions, irqs, argsz)


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
        check_argsz(argsz, cls.STRUCT.size)
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
        check_argsz(argsz, cls.SIZE)
        kind, action = flags & IRQ_SET_DATA, flags & IRQ_SET_ACTION
        if kind | action != flags or kind.bit_count() != 1 or action.bit_count() != 1:
            raise RemoteProtocolError(f"flags {flags:#x} are not one kind of data and one action")
        wanted = count if kind == IrqSetFlag.DATA_BOOL else 0
        if len(data) - cls.SIZE != wanted:
            raise RemoteProtocolError(
                f"payload of {len(data)} bytes instead of {cls.SIZE + wanted}"
            )
        return cls(flags, index, start, count, data[cls.SIZE :])


def check_argsz(argsz: int, needed: int) -> None:
    """Raise RemoteProtocolError if a payload gives its own size as less than ``needed`` bytes."""
    if argsz < needed:
        raise RemoteProtocolError(f"argsz is {argsz}, and {needed} bytes are needed")
