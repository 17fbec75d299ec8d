"""The payloads of vfio-user that migrate a device: DEVICE_FEATURE, MIG_DATA_READ, MIG_DATA_WRITE.

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

#: Most ranges of DMA_LOGGING_START that are looked at.
MAX_RANGES = 1024


class FeatureMethod(enum.IntFlag):
    """What is to be done with a feature (VFIO_DEVICE_FEATURE_GET, _SET, _PROBE)."""

    GET = 1 << 16
    SET = 1 << 17
    PROBE = 1 << 18


#: The bits of ``flags`` that are the index of the feature.
FEATURE_MASK = 0xFFFF
_METHODS = FeatureMethod.GET | FeatureMethod.SET | FeatureMethod.PROBE


class FeatureIndex(enum.IntEnum):
    """The features that vfio-user has ("Device Features")."""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8


class MigrationFlag(enum.IntFlag):
    """Which states a device has besides RUNNING and ERROR (VFIO_MIGRATION_*)."""

    STOP_COPY = 1 << 0
    P2P = 1 << 1
    PRE_COPY = 1 << 2


class MigrationState(enum.IntEnum):
    """Where a device is (enum vfio_device_mig_state)."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


@dataclass(frozen=True, slots=True)
class DeviceFeature:
    """Get, set or probe a feature (VFIO_USER_DEVICE_FEATURE); the reply has the same layout.

    Attributes:
        flags: the index of the feature, and :class:`FeatureMethod`.
        data: the feature's own.
        argsz: in a request, the most bytes that the reply's payload may have.
    """

    STRUCT: ClassVar = struct.Struct("=II")
    SIZE: ClassVar = STRUCT.size

    flags: int
    data: bytes = b""
    argsz: int = SIZE

    @property
    def index(self) -> int:
        """Return which feature; may be one that is unknown."""
        return self.flags & FEATURE_MASK

    @property
    def methods(self) -> FeatureMethod:
        """Return what is to be done with it."""
        return FeatureMethod(self.flags & _METHODS)

    def pack(self) -> bytes:
        """Return the 8 bytes, and ``data``."""
        return self.STRUCT.pack(self.argsz, self.flags) + self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse a request or a reply. RemoteProtocolError on methods that do not go together."""
        argsz, flags = at_least(cls.STRUCT, data)
        check_argsz(argsz, cls.SIZE)
        methods = flags & ~FEATURE_MASK
        if methods & ~int(_METHODS):
            raise RemoteProtocolError(f"unknown flags {flags:#x}")
        one = methods in (FeatureMethod.GET, FeatureMethod.SET)
        if not one and not methods & FeatureMethod.PROBE:
            raise RemoteProtocolError(f"flags {flags:#x} are neither to get, to set nor to probe")
        return cls(flags, data[cls.SIZE :], argsz)


@dataclass(frozen=True, slots=True)
class MigrationSupport:
    """The data of FeatureIndex.MIGRATION.

    Attributes:
        flags: :class:`MigrationFlag`.
    """

    STRUCT: ClassVar = struct.Struct("=Q")

    flags: int

    def pack(self) -> bytes:
        """Return the 8 bytes."""
        return self.STRUCT.pack(self.flags)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 8 bytes. RemoteProtocolError on another number."""
        return cls(*exactly(cls.STRUCT, data))


@dataclass(frozen=True, slots=True)
class MigrationPhase:
    """The data of FeatureIndex.MIG_DEVICE_STATE.

    Attributes:
        state: a :class:`MigrationState`, or what a peer says.
    """

    STRUCT: ClassVar = struct.Struct("=Ii")
    SIZE: ClassVar = STRUCT.size

    state: int

    def pack(self) -> bytes:
        """Return the 8 bytes; there is no data_fd in vfio-user."""
        return self.STRUCT.pack(self.state, -1)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 8 bytes. RemoteProtocolError on another number."""
        state, _ = exactly(cls.STRUCT, data)
        return cls(state)


@dataclass(frozen=True, slots=True)
class LoggingControl:
    """The data of FeatureIndex.DMA_LOGGING_START and DMA_LOGGING_STOP.

    Attributes:
        page_size: bytes that one bit stands for; a hint in a request.
        ranges: address and bytes of what is to be logged; empty: everything.
    """

    STRUCT: ClassVar = struct.Struct("=QII")
    RANGE: ClassVar = struct.Struct("=QQ")
    SIZE: ClassVar = STRUCT.size

    page_size: int
    ranges: tuple[tuple[int, int], ...] = ()

    def pack(self) -> bytes:
        """Return the 16 bytes, and 16 for each range."""
        head = self.STRUCT.pack(self.page_size, len(self.ranges), 0)
        return head + b"".join(self.RANGE.pack(*each) for each in self.ranges)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse it. RemoteProtocolError on a wrong size, page size or range."""
        page_size, count, _ = at_least(cls.STRUCT, data)
        if count > MAX_RANGES:
            raise RemoteProtocolError(f"{count} ranges, at most {MAX_RANGES} are taken")
        if len(data) != cls.SIZE + count * cls.RANGE.size:
            raise RemoteProtocolError(f"{len(data)} bytes of data for {count} ranges")
        check_page_size(page_size)
        ranges = tuple(cls.RANGE.iter_unpack(data[cls.SIZE :]))
        for address, length in ranges:
            _check_range(address, length)
        return cls(page_size, ranges)


@dataclass(frozen=True, slots=True)
class LoggingReport:
    """The data of FeatureIndex.DMA_LOGGING_REPORT.

    Attributes:
        address, length: DMA addresses.
        page_size: bytes that one bit stands for.
        bitmap: in a reply, whole words of 64 bits; bit 0 of the first is the page of ``address``.
    """

    STRUCT: ClassVar = struct.Struct("=QQQ")
    SIZE: ClassVar = STRUCT.size

    address: int
    length: int
    page_size: int
    bitmap: bytes = b""

    @property
    def pages(self) -> int:
        """Return how many pages there are in the range."""
        return -(-self.length // self.page_size)

    @property
    def bitmap_size(self) -> int:
        """Return the bytes of the bitmap."""
        return -(-self.pages // 64) * 8

    def pack(self) -> bytes:
        """Return the 24 bytes, and the bitmap."""
        return self.STRUCT.pack(self.address, self.length, self.page_size) + self.bitmap

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse a request or a reply. RemoteProtocolError on a wrong size, page size or range."""
        address, length, page_size = at_least(cls.STRUCT, data)
        check_page_size(page_size)
        _check_range(address, length)
        report = cls(address, length, page_size, data[cls.SIZE :])
        if len(report.bitmap) not in (0, report.bitmap_size):
            raise RemoteProtocolError(
                f"a bitmap of {len(report.bitmap)} bytes instead of {report.bitmap_size}"
            )
        return report


@dataclass(frozen=True, slots=True)
class MigrationData:
    """A piece of a device's state (VFIO_USER_MIG_DATA_READ, VFIO_USER_MIG_DATA_WRITE).

    Attributes:
        size, data: how many bytes, and the bytes, or none in a request to read.
        argsz: in a request, the most bytes that the reply's payload may have.
    """

    STRUCT: ClassVar = struct.Struct("=II")
    SIZE: ClassVar = STRUCT.size

    size: int
    data: bytes = b""
    argsz: int = SIZE

    def pack(self) -> bytes:
        """Return the 8 bytes, and ``data``."""
        return self.STRUCT.pack(self.argsz, self.size) + self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 8 bytes, and data of any length. RemoteProtocolError if there are fewer."""
        argsz, size = at_least(cls.STRUCT, data)
        check_argsz(argsz, cls.SIZE)
        return cls(size, data[cls.SIZE :], argsz)


def check_page_size(size: int) -> None:
    """Raise RemoteProtocolError unless it is a power of two."""
    if not size or size & (size - 1):
        raise RemoteProtocolError(f"a page size of {size:#x}, no power of two")


def _check_range(address: int, length: int) -> None:
    if not length or address + length > 1 << 64:
        raise RemoteProtocolError(f"{length:#x} bytes at {address:#x} are no range")
