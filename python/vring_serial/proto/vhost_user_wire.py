"""What vhost-user puts on the wire: numbers, flags, the header and every payload.

All numbers are in the machine's byte order. Section names in the docstrings are those of the
vhost-user specification (QEMU's documentation, "Vhost-user Protocol").
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import ClassVar, Self

from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.framing import at_least, exactly

#: Feature bit that offers the protocol features; no driver ever sees it.
F_PROTOCOL_FEATURES = 30
#: Feature bit that asks for marks of all writes to guest memory in the log; no driver's either.
F_LOG_ALL = 26
#: Version in every header's flags.
VERSION = 1
#: Largest payload in bytes that a parser buffers; the largest message either end needs has 268.
MAX_PAYLOAD = 4096
#: Most regions of one SET_MEM_TABLE.
MAX_TABLE_REGIONS = 8
#: Largest access to the configuration space in one message, in bytes.
MAX_CONFIG_SIZE = 256


class Request(enum.IntEnum):
    """What a frontend asks of a backend ("Front-end message types")."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackendRequest(enum.IntEnum):
    """What a backend asks of a frontend, over the backend channel ("Back-end message types")."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class ProtocolFeature(enum.IntFlag):
    """Extensions of the protocol, negotiated with GET/SET_PROTOCOL_FEATURES."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    SHMEM = 1 << 20


class HeaderFlag(enum.IntFlag):
    """Bits of a header's flags above the two bits of the version."""

    REPLY = 1 << 2
    NEED_REPLY = 1 << 3


@dataclass(frozen=True, slots=True)
class Header:
    """The 12 bytes before every payload ("Header").

    Attributes:
        request: type of the request, also in its reply.
        flags: version in bits 0 and 1, and :class:`HeaderFlag`.
        size: bytes of payload that follow.
    """

    STRUCT: ClassVar = struct.Struct("=III")

    request: int
    flags: int
    size: int

    def pack(self) -> bytes:
        """Return the 12 bytes."""
        return self.STRUCT.pack(self.request, self.flags, self.size)

    @property
    def message_size(self) -> int:
        """Bytes of the message, with this header."""
        return self.STRUCT.size + self.size

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 12 bytes, which can say anything. Raises RemoteProtocolError on another number."""
        return cls(*exactly(cls.STRUCT, data))


@dataclass(frozen=True, slots=True)
class U64:
    """One number ("A single 64-bit integer"): features, a count, a status; 0 acknowledges success.

    Attributes:
        value: 64 bits, unsigned.
    """

    STRUCT: ClassVar = struct.Struct("=Q")

    value: int

    def pack(self) -> bytes:
        """Return the 8 bytes."""
        return self.STRUCT.pack(self.value)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 8 bytes. Raises RemoteProtocolError on another number."""
        return cls(*exactly(cls.STRUCT, data))


@dataclass(frozen=True, slots=True)
class VringState:
    """A queue and a number ("A vring state description").

    Attributes:
        index: the queue.
        num: its size, its available index, 1 or 0 for enabled or not, or 0: the request says which.
    """

    STRUCT: ClassVar = struct.Struct("=II")

    index: int
    num: int = 0

    def pack(self) -> bytes:
        """Return the 8 bytes."""
        return self.STRUCT.pack(self.index, self.num)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 8 bytes. Raises RemoteProtocolError on another number."""
        return cls(*exactly(cls.STRUCT, data))


@dataclass(frozen=True, slots=True)
class VringAddress:
    """Where a queue's three parts are, as user addresses ("A vring address description").

    Attributes:
        index: the queue.
        flags: F_LOG asks for marks of writes to the ring in the log.
        descriptor, used, available: user addresses of the parts.
        log: guest address that stands for the used ring in the log, unused without F_LOG.
    """

    STRUCT: ClassVar = struct.Struct("=IIQQQQ")
    F_LOG: ClassVar = 1

    index: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int = 0

    def pack(self) -> bytes:
        """Return the 40 bytes."""
        return self.STRUCT.pack(
            self.index, self.flags, self.descriptor, self.used, self.available, self.log
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 40 bytes; what the addresses mean is not checked.

        Raises:
            RemoteProtocolError: another number of bytes.
        """
        return cls(*exactly(cls.STRUCT, data))


@dataclass(frozen=True, slots=True)
class LogArea:
    """Where in the descriptor's file the log is ("Log description", SET_LOG_BASE).

    Attributes:
        size: bytes; each has a bit for each of 8 pages of 4096 bytes, from guest address 0 on.
        offset: bytes from the start of the file.
    """

    STRUCT: ClassVar = struct.Struct("=QQ")

    size: int
    offset: int = 0

    def pack(self) -> bytes:
        """Return the 16 bytes."""
        return self.STRUCT.pack(self.size, self.offset)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 16 bytes; what they mean is not checked.

        Raises:
            RemoteProtocolError: another number of bytes.
        """
        return cls(*exactly(cls.STRUCT, data))


@dataclass(frozen=True, slots=True)
class VringDescriptor:
    """Which queue the descriptor beside the message is for (SET_VRING_KICK, CALL and ERR).

    Attributes:
        index: the queue, 0 to 255.
        no_fd: there is no descriptor; the receiver polls, or is not told.
    """

    STRUCT: ClassVar = struct.Struct("=Q")
    INDEX_MASK: ClassVar = 0xFF
    NO_FD: ClassVar = 1 << 8

    index: int
    no_fd: bool = False

    def pack(self) -> bytes:
        """Return the 8 bytes."""
        return self.STRUCT.pack(self.index | (self.NO_FD if self.no_fd else 0))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 8 bytes. Raises RemoteProtocolError on another number, and on unknown bits."""
        (value,) = exactly(cls.STRUCT, data)
        if value & ~(cls.INDEX_MASK | cls.NO_FD):
            raise RemoteProtocolError(f"unknown bits in {value:#x}")
        return cls(value & cls.INDEX_MASK, bool(value & cls.NO_FD))


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """One region of guest memory, to be mapped from a descriptor ("Memory region description").

    Attributes:
        guest_address: first guest address.
        size: bytes.
        user_address: the frontend's own address of the region, in which rings are given.
        mmap_offset: bytes from the start of the descriptor's file to the region.
    """

    STRUCT: ClassVar = struct.Struct("=QQQQ")

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int = 0

    def pack(self) -> bytes:
        """Return the 32 bytes."""
        return self.STRUCT.pack(self.guest_address, self.size, self.user_address, self.mmap_offset)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 32 bytes; what the addresses mean is not checked.

        Raises:
            RemoteProtocolError: another number of bytes.
        """
        return cls(*exactly(cls.STRUCT, data))


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """All regions at once, one descriptor each and in the same order (SET_MEM_TABLE).

    Frontends may send room for more regions than they fill (User-Mode Linux does).

    Attributes:
        regions: MAX_TABLE_REGIONS at most.
    """

    STRUCT: ClassVar = struct.Struct("=II")

    regions: tuple[MemoryRegion, ...]

    def pack(self) -> bytes:
        """Return the 8 bytes of the count, and 32 for each region."""
        return self.STRUCT.pack(len(self.regions), 0) + b"".join(r.pack() for r in self.regions)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse a table; what fills the room of regions beyond the count is ignored.

        Raises:
            RemoteProtocolError: more than MAX_TABLE_REGIONS, fewer bytes than they need, or more
                than MAX_TABLE_REGIONS would.
        """
        head, step = cls.STRUCT.size, MemoryRegion.STRUCT.size
        count, _ = at_least(cls.STRUCT, data)
        if count > MAX_TABLE_REGIONS:
            raise RemoteProtocolError(f"{count} regions, at most {MAX_TABLE_REGIONS} fit")
        if not head + count * step <= len(data) <= head + MAX_TABLE_REGIONS * step:
            raise RemoteProtocolError(
                f"payload of {len(data)} bytes instead of {head + count * step} for {count} regions"
            )
        fields = MemoryRegion.STRUCT.iter_unpack(data[head : head + count * step])
        return cls(tuple(MemoryRegion(*region) for region in fields))


@dataclass(frozen=True, slots=True)
class SingleRegion:
    """One region ("Single memory region description"; ADD_MEM_REG, REM_MEM_REG).

    Attributes:
        region: the one to add, or to remove.
    """

    STRUCT: ClassVar = struct.Struct("=QQQQQ")

    region: MemoryRegion

    def pack(self) -> bytes:
        """Return the 40 bytes, of which the first 8 are padding."""
        return bytes(8) + self.region.pack()

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 40 bytes. Raises RemoteProtocolError on another number."""
        _, *region = exactly(cls.STRUCT, data)
        return cls(MemoryRegion(*region))


@dataclass(frozen=True, slots=True)
class ConfigAccess:
    """A part of the device's configuration space ("Virtio device config space").

    Attributes:
        offset: first byte.
        data: the bytes; in a GET_CONFIG request their number alone counts. A reply without any
            says that the request was refused.
        flags: 0, or 1 when it is for migration.
    """

    STRUCT: ClassVar = struct.Struct("=III")
    FOR_MIGRATION: ClassVar = 1

    offset: int
    data: bytes
    flags: int = 0

    def pack(self) -> bytes:
        """Return the 12 bytes, and ``data``."""
        return self.STRUCT.pack(self.offset, len(self.data), self.flags) + self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse a request or a reply.

        Raises:
            RemoteProtocolError: more than MAX_CONFIG_SIZE bytes, an access that ends beyond 32-bit
                offsets, or another number of bytes than the access needs.
        """
        head = cls.STRUCT.size
        offset, size, flags = at_least(cls.STRUCT, data)
        if size > MAX_CONFIG_SIZE:
            raise RemoteProtocolError(f"access of {size} bytes, at most {MAX_CONFIG_SIZE}")
        if offset + size > 1 << 32:
            raise RemoteProtocolError(f"access of {size} bytes at {offset:#x} wraps around")
        if len(data) != head + size:
            raise RemoteProtocolError(f"payload of {len(data)} bytes instead of {head + size}")
        return cls(offset, data[head:], flags)


@dataclass(frozen=True, slots=True)
class DeviceStateTransfer:
    """How the device's state is to be moved ("Device state transfer parameters").

    Attributes:
        direction: SAVE, from the backend, or LOAD, to it.
        phase: STOPPED, while no queue runs; no other is known.
    """

    STRUCT: ClassVar = struct.Struct("=II")
    SAVE: ClassVar = 0
    LOAD: ClassVar = 1
    STOPPED: ClassVar = 0
    #: In the answer: bits 0 to 7 are not 0 if it was refused, bit 8 says that no descriptor came.
    REFUSED: ClassVar = 0x101
    ERROR_MASK: ClassVar = 0xFF
    NO_FD: ClassVar = 0x100

    direction: int
    phase: int = STOPPED

    def pack(self) -> bytes:
        """Return the 8 bytes."""
        return self.STRUCT.pack(self.direction, self.phase)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 8 bytes. Raises RemoteProtocolError on another number, or what has no meaning."""
        direction, phase = exactly(cls.STRUCT, data)
        if direction > cls.LOAD or phase != cls.STOPPED:
            raise RemoteProtocolError(f"direction {direction} in phase {phase} is not known")
        return cls(direction, phase)


@dataclass(frozen=True, slots=True)
class Inflight:
    """The region for inflight tracking ("Inflight description"; GET_ and SET_INFLIGHT_FD).

    Attributes:
        mmap_size, mmap_offset: where the region is in its file, bytes.
        num_queues: for how many queues.
        queue_size: descriptors of each, at most.
        padded: the payload has 24 bytes, as that of QEMU, instead of 20.
    """

    STRUCT: ClassVar = struct.Struct("=QQHH")
    PADDED: ClassVar = struct.Struct("=QQHH4x")

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int
    padded: bool = False

    def pack(self) -> bytes:
        """Return the 20 or 24 bytes."""
        layout = self.PADDED if self.padded else self.STRUCT
        return layout.pack(self.mmap_size, self.mmap_offset, self.num_queues, self.queue_size)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse 20 or 24 bytes. Raises RemoteProtocolError on another number."""
        padded = len(data) == cls.PADDED.size
        size, offset, queues, length = exactly(cls.PADDED if padded else cls.STRUCT, data)
        return cls(size, offset, queues, length, padded)
