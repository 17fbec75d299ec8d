"""The vfio-user protocol without input or output: bytes and descriptors in, messages out.

Both ends use this module. The *client* is the VMM: it owns the guest's memory and asks; the
*server* is the device and answers. Only DMA_READ and DMA_WRITE go the other way. File descriptors
are opaque integers that travel beside the bytes. :data:`SHAPES` says which payload a command has;
they are in :mod:`vring_serial.proto.vfio_user_wire` and the modules named there.

Sending is :func:`request`, :func:`reply` and :func:`error_reply`. Receiving is a
:class:`VfioUserParser`::

    parser.receive_data(data, fds)
    while (message := parser.next_message()) is not None:
        payload = message.decode()
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TypeVar

from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.framing import (
    MAX_FDS,
    BadMessageError,
    Empty,
    FramingError,
    MessageParser,
    Payload,
    kind_name,
)
from vring_serial.proto.vfio_user_dma import DmaAccess, DmaMap, DmaUnmap
from vring_serial.proto.vfio_user_features import DeviceFeature, MigrationData
from vring_serial.proto.vfio_user_regions import (
    RegionInfo,
    RegionIoFds,
    RegionRead,
    RegionWrite,
    WriteMulti,
    WriteMultiDone,
)
from vring_serial.proto.vfio_user_version import Version
from vring_serial.proto.vfio_user_wire import (
    DEFAULT_DATA_XFER_SIZE,
    TYPE_MASK,
    Command,
    DeviceInfo,
    Header,
    HeaderFlag,
    IrqInfo,
    IrqSet,
    IrqSetFlag,
)

#: Largest payload that a parser buffers: data of the largest access, and where it goes.
MAX_PAYLOAD = DEFAULT_DATA_XFER_SIZE + 64

T = TypeVar("T", bound=Payload)


class VfioUserError(BadMessageError):
    """The peer sent a message that the protocol does not allow, or asks for what cannot be done.

    Attributes:
        message: name of the message, such as ``DMA_MAP``.
        cause: what is wrong with it.
        errno: the error number for the reply.
    """

    def __init__(self, message: str, cause: str, errno: int = errno.EINVAL) -> None:
        super().__init__(message, cause)
        self.errno = errno


@dataclass(frozen=True, slots=True)
class Shape:
    """What a message looks like.

    Attributes:
        payload: of the request.
        reply: of the reply.
        fds: numbers of descriptors beside the request that are allowed.
    """

    payload: type[Payload] = Empty
    reply: type[Payload] = Empty
    fds: range = range(1)


#: The messages that this module packs and unpacks; any other is refused by whoever receives it.
SHAPES: dict[Command, Shape] = {
    Command.VERSION: Shape(Version, Version),
    Command.DMA_MAP: Shape(DmaMap, fds=range(2)),
    Command.DMA_UNMAP: Shape(DmaUnmap, DmaUnmap),
    Command.DEVICE_GET_INFO: Shape(DeviceInfo, DeviceInfo),
    Command.DEVICE_GET_REGION_INFO: Shape(RegionInfo, RegionInfo),
    Command.DEVICE_GET_REGION_IO_FDS: Shape(RegionIoFds, RegionIoFds),
    Command.DEVICE_GET_IRQ_INFO: Shape(IrqInfo, IrqInfo),
    Command.DEVICE_SET_IRQS: Shape(IrqSet, fds=range(MAX_FDS + 1)),
    Command.REGION_READ: Shape(RegionRead, RegionWrite),
    Command.REGION_WRITE: Shape(RegionWrite, RegionRead),
    Command.DMA_READ: Shape(DmaAccess, DmaAccess),
    Command.DMA_WRITE: Shape(DmaAccess, DmaAccess),
    Command.DEVICE_RESET: Shape(),
    Command.REGION_WRITE_MULTI: Shape(WriteMulti, WriteMultiDone),
    Command.DEVICE_FEATURE: Shape(DeviceFeature, DeviceFeature),
    Command.MIG_DATA_READ: Shape(MigrationData, MigrationData),
    Command.MIG_DATA_WRITE: Shape(MigrationData),
}


def request(
    command: Command, message_id: int, payload: Payload | None = None, *, no_reply: bool = False
) -> bytes:
    """Return a whole request; with ``no_reply`` it is posted, and never answered."""
    return _message(command, message_id, HeaderFlag.NO_REPLY if no_reply else 0, payload)


def reply(command: Command | int, message_id: int, payload: Payload | None = None) -> bytes:
    """Return a whole reply, which carries the request's command and number."""
    return _message(command, message_id, HeaderFlag.REPLY, payload)


def error_reply(command: Command | int, message_id: int, error: int) -> bytes:
    """Return the reply to a request that failed; ``error`` is an errno."""
    flags = HeaderFlag.REPLY | HeaderFlag.ERROR
    return Header(message_id, command, Header.SIZE, flags, error).pack()


def _message(command: int, message_id: int, flags: int, payload: Payload | None) -> bytes:
    data = payload.pack() if payload is not None else b""
    return Header(message_id, command, Header.SIZE + len(data), flags).pack() + data


@dataclass(frozen=True, slots=True)
class Message:
    """A message as it came: well framed, its payload not yet looked at.

    Attributes:
        command: a plain int if it is unknown.
        message_id: the sender's number for it, or in a reply the receiver's own.
        flags: of the header.
        payload: its bytes.
        fds: descriptors that came with it. They belong to whoever takes the message.
        error: errno in a reply that says that the request failed.
    """

    command: Command | int
    message_id: int
    flags: int
    payload: bytes
    fds: tuple[int, ...] = ()
    error: int = 0

    @property
    def name(self) -> str:
        """Return the command's name, for errors and logs."""
        return kind_name(self.command, "command")

    @property
    def is_reply(self) -> bool:
        """Return whether this is a reply, and not a command."""
        return self.flags & TYPE_MASK == HeaderFlag.REPLY

    @property
    def no_reply(self) -> bool:
        """Return whether it is posted: whatever becomes of it, the sender wants no answer."""
        return bool(self.flags & HeaderFlag.NO_REPLY)

    @property
    def failed(self) -> bool:
        """Return whether this is a reply that says that the request failed."""
        return bool(self.flags & HeaderFlag.ERROR)

    @property
    def shape(self) -> Shape | None:
        """Return what the message carries; None if this module does not know how to unpack it."""
        return SHAPES.get(self.command) if isinstance(self.command, Command) else None

    def decode(self) -> Payload:
        """Check size and number of descriptors of a request, and return its payload.

        Raises:
            VfioUserError: unknown message, wrong size, impossible content, too many descriptors.
        """
        shape = self.shape
        if shape is None:
            unknown = not isinstance(self.command, Command)
            number = errno.ENOSYS if unknown else errno.EOPNOTSUPP
            raise VfioUserError(self.name, "not supported", number)
        if len(self.fds) not in shape.fds:
            raise VfioUserError(
                self.name, f"{len(self.fds)} descriptors instead of at most {shape.fds[-1]}"
            )
        try:
            return shape.payload.unpack(self.payload)
        except RemoteProtocolError as error:
            raise VfioUserError(self.name, str(error)) from None

    def check_success(self) -> None:
        """Check a reply. Raises VfioUserError if it says that the request failed."""
        if self.failed:
            raise VfioUserError(self.name, f"refused with error {self.error}", self.error)

    def decode_reply(self, expected: type[T]) -> T:
        """Check a reply and return its payload.

        Raises:
            VfioUserError: it says that the request failed, or is not what was ``expected``.
        """
        self.check_success()
        try:
            return expected.unpack(self.payload)
        except RemoteProtocolError as error:
            raise VfioUserError(f"reply to {self.name}", str(error)) from None


class VfioUserParser(MessageParser[Header, Message]):
    """Splits a stream into messages.

    Args:
        max_payload: bytes; a larger payload ends the connection.
    """

    def __init__(self, max_payload: int = MAX_PAYLOAD) -> None:
        super().__init__(Header.SIZE)
        self._max_payload = max_payload

    def fds_of(self, data: bytes) -> range:
        """See MessageParser."""
        message = self._message(self._unpack_header(data[: Header.SIZE]), data[Header.SIZE :], ())
        if message.shape is None or message.is_reply:
            return range(1)
        try:
            payload = message.shape.payload.unpack(message.payload)
        except RemoteProtocolError:
            return range(1)
        if isinstance(payload, IrqSet):  # without any it takes away what is there
            eventfds = payload.flags & IrqSetFlag.DATA_EVENTFD
            return range(payload.count + 1 if eventfds else 1)
        return message.shape.fds

    @staticmethod
    def command_of(message: bytes) -> int:
        """Return the command of a whole message."""
        return Header.unpack(message[: Header.SIZE]).command

    def _unpack_header(self, data: bytes) -> Header:
        return Header.unpack(data)

    def _check(self, header: Header) -> None:
        size = header.size - Header.SIZE
        if header.flags & TYPE_MASK > HeaderFlag.REPLY:
            cause = f"type {header.flags & TYPE_MASK}, no command and no reply"
        elif size < 0:
            cause = f"{header.size} bytes, and a header alone has {Header.SIZE}"
        elif size > self._max_payload:
            cause = f"payload of {size} bytes, at most {self._max_payload}"
        else:
            return
        raise FramingError(self._name(header), cause)

    def _message(self, header: Header, payload: bytes, fds: tuple[int, ...]) -> Message:
        command = _COMMANDS.get(header.command, header.command)
        return Message(command, header.message_id, header.flags, payload, fds, header.error)

    def _name(self, header: Header) -> str:
        return kind_name(_COMMANDS.get(header.command, header.command), "command")


_COMMANDS = {int(command): command for command in Command}
