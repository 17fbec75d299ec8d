"""The vhost-user protocol without input or output: bytes and descriptors in, messages out.

Both ends use this module. The *frontend* owns the guest's memory and sends :class:`Request`; the
*backend* is the device and answers. On a second socket, the backend channel, the backend sends
:class:`BackendRequest` and the frontend answers. File descriptors are opaque integers that travel
beside the bytes. The payloads, of :mod:`vring_serial.proto.vhost_user_wire`, are offered here too.

Sending is :func:`request` and :func:`reply`. Receiving is a :class:`VhostUserParser`::

    parser.receive_data(data, fds)
    while (message := parser.next_message()) is not None:
        payload = message.decode()
"""

from __future__ import annotations

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
from vring_serial.proto.vhost_user_wire import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    MAX_CONFIG_SIZE,
    MAX_PAYLOAD,
    MAX_TABLE_REGIONS,
    U64,
    VERSION,
    BackendRequest,
    ConfigAccess,
    DeviceStateTransfer,
    Header,
    HeaderFlag,
    Inflight,
    LogArea,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    Request,
    SingleRegion,
    VringAddress,
    VringDescriptor,
    VringState,
)

__all__ = [
    "Shape",
    "SHAPES",
    "BACKEND_SHAPES",
    "request",
    "reply",
    "Message",
    "VhostUserParser",
    "VhostUserError",
    "FramingError",
    "F_LOG_ALL",
    "F_PROTOCOL_FEATURES",
    "VERSION",
    "MAX_PAYLOAD",
    "MAX_FDS",
    "MAX_TABLE_REGIONS",
    "MAX_CONFIG_SIZE",
    "Request",
    "BackendRequest",
    "ProtocolFeature",
    "HeaderFlag",
    "Header",
    "Payload",
    "Empty",
    "U64",
    "VringState",
    "VringAddress",
    "LogArea",
    "VringDescriptor",
    "MemoryRegion",
    "MemoryTable",
    "SingleRegion",
    "ConfigAccess",
    "DeviceStateTransfer",
    "Inflight",
]

T = TypeVar("T", bound=Payload)


class VhostUserError(BadMessageError):
    """The peer sent a vhost-user message that the protocol does not allow."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a message looks like.

    Attributes:
        payload: of the request.
        reply: of the reply that always comes, or None if one comes only as an acknowledgement.
        fds: numbers of descriptors beside it that are allowed; what is right within them depends on
            the payload (NO_FD, the number of regions).
    """

    payload: type[Payload] = Empty
    reply: type[Payload] | None = None
    fds: range = range(1)


_OPTIONAL_FD = range(2)
_ONE_FD = range(1, 2)

#: The messages that this module packs and unpacks; any other is refused by whoever receives it.
SHAPES: dict[Request, Shape] = {
    Request.GET_FEATURES: Shape(reply=U64),
    Request.SET_FEATURES: Shape(U64),
    Request.SET_OWNER: Shape(),
    Request.RESET_OWNER: Shape(),
    Request.SET_MEM_TABLE: Shape(MemoryTable, fds=range(MAX_TABLE_REGIONS + 1)),
    Request.SET_LOG_BASE: Shape(LogArea, fds=_ONE_FD),
    Request.SET_LOG_FD: Shape(fds=_ONE_FD),
    Request.SET_VRING_NUM: Shape(VringState),
    Request.SET_VRING_ADDR: Shape(VringAddress),
    Request.SET_VRING_BASE: Shape(VringState),
    Request.GET_VRING_BASE: Shape(VringState, reply=VringState),
    Request.SET_VRING_KICK: Shape(VringDescriptor, fds=_OPTIONAL_FD),
    Request.SET_VRING_CALL: Shape(VringDescriptor, fds=_OPTIONAL_FD),
    Request.SET_VRING_ERR: Shape(VringDescriptor, fds=_OPTIONAL_FD),
    Request.GET_PROTOCOL_FEATURES: Shape(reply=U64),
    Request.SET_PROTOCOL_FEATURES: Shape(U64),
    Request.GET_QUEUE_NUM: Shape(reply=U64),
    Request.SET_VRING_ENABLE: Shape(VringState),
    Request.SET_BACKEND_REQ_FD: Shape(fds=_ONE_FD),
    Request.GET_CONFIG: Shape(ConfigAccess, reply=ConfigAccess),
    Request.SET_CONFIG: Shape(ConfigAccess),
    Request.GET_INFLIGHT_FD: Shape(Inflight, reply=Inflight),
    Request.SET_INFLIGHT_FD: Shape(Inflight, fds=_ONE_FD),
    Request.RESET_DEVICE: Shape(),
    Request.VRING_KICK: Shape(VringState),
    Request.GET_MAX_MEM_SLOTS: Shape(reply=U64),
    Request.ADD_MEM_REG: Shape(SingleRegion, fds=_ONE_FD),
    # The specification lets existing frontends pass a descriptor here, to be closed unused.
    Request.REM_MEM_REG: Shape(SingleRegion, fds=_OPTIONAL_FD),
    Request.SET_DEVICE_STATE_FD: Shape(DeviceStateTransfer, reply=U64, fds=_ONE_FD),
    Request.CHECK_DEVICE_STATE: Shape(reply=U64),
    Request.SET_STATUS: Shape(U64),
    Request.GET_STATUS: Shape(reply=U64),
}

#: The same for the backend channel; apart, because the numbers of the two overlap.
BACKEND_SHAPES: dict[BackendRequest, Shape] = {
    BackendRequest.CONFIG_CHANGE_MSG: Shape(),
    BackendRequest.VRING_CALL: Shape(VringState),
    BackendRequest.VRING_ERR: Shape(VringState),
}


def request(
    kind: Request | BackendRequest, payload: Payload | None = None, *, need_reply: bool = False
) -> bytes:
    """Return a whole request; ``need_reply`` asks for an acknowledgement (needs REPLY_ACK)."""
    flags = VERSION | (HeaderFlag.NEED_REPLY if need_reply else 0)
    return _message(kind, flags, payload)


def reply(kind: Request | BackendRequest | int, payload: Payload) -> bytes:
    """Return a whole reply, which carries the request's type; an acknowledgement has a U64."""
    return _message(kind, VERSION | HeaderFlag.REPLY, payload)


def _message(kind: int, flags: int, payload: Payload | None) -> bytes:
    data = payload.pack() if payload is not None else b""
    return Header(kind, flags, len(data)).pack() + data


@dataclass(frozen=True, slots=True)
class Message:
    """A message as it came: well framed, its payload not yet looked at.

    Attributes:
        kind: the request's type; a plain int if it is unknown.
        flags: of the header.
        payload: its bytes.
        fds: descriptors that came with it. They belong to whoever takes the message.
    """

    kind: Request | BackendRequest | int
    flags: int
    payload: bytes
    fds: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the request's type, for errors and logs."""
        return kind_name(self.kind, "message")

    @property
    def need_reply(self) -> bool:
        """Return whether the sender wants an acknowledgement (REPLY_ACK)."""
        return bool(self.flags & HeaderFlag.NEED_REPLY)

    @property
    def shape(self) -> Shape | None:
        """Return what the message carries; None if this module does not know how to unpack it."""
        if isinstance(self.kind, Request):
            return SHAPES.get(self.kind)
        if isinstance(self.kind, BackendRequest):
            return BACKEND_SHAPES.get(self.kind)
        return None

    def decode(self) -> Payload:
        """Check size and number of descriptors of a request, and return its payload.

        Raises:
            VhostUserError: unknown message, wrong size, descriptors missing or too many.
        """
        shape = self.shape
        if shape is None:
            raise VhostUserError(self.name, "not supported")
        try:
            payload = shape.payload.unpack(self.payload)
        except RemoteProtocolError as error:
            raise VhostUserError(self.name, str(error)) from None
        self._check_descriptors(shape, payload)
        return payload

    def decode_reply(self, expected: type[T]) -> T:
        """Return a reply's payload. Raises VhostUserError if it is another or has descriptors."""
        try:
            payload = expected.unpack(self.payload)
        except RemoteProtocolError as error:
            raise VhostUserError(f"reply to {self.name}", str(error)) from None
        if self.fds:
            raise VhostUserError(f"reply to {self.name}", f"{len(self.fds)} descriptors")
        return payload

    def _check_descriptors(self, shape: Shape, payload: Payload) -> None:
        allowed = _allowed_fds(shape, payload)
        if len(self.fds) not in allowed:
            wanted = f"{allowed[0]}" if len(allowed) == 1 else f"at most {allowed[-1]}"
            raise VhostUserError(self.name, f"{len(self.fds)} descriptors instead of {wanted}")


def _allowed_fds(shape: Shape, payload: Payload) -> range:
    """Return how many descriptors go with this payload."""
    if isinstance(payload, MemoryTable):
        return range(len(payload.regions), len(payload.regions) + 1)
    if isinstance(payload, VringDescriptor):
        return range(1) if payload.no_fd else _ONE_FD
    return shape.fds


class VhostUserParser(MessageParser[Header, Message]):
    """Splits a stream into messages.

    Args:
        kinds: Request on the main socket, BackendRequest on the backend channel.
        replies: whether this end receives replies (True) or requests (False).
    """

    def __init__(
        self, kinds: type[Request] | type[BackendRequest] = Request, *, replies: bool = False
    ) -> None:
        super().__init__(Header.STRUCT.size)
        self._kinds = kinds
        self._replies = replies

    def fds_of(self, data: bytes) -> range:
        """See MessageParser."""
        try:
            header = self._unpack_header(data[: self.header_size])
            message = self._message(header, data[self.header_size :], ())
            if message.shape is None or self._replies:
                return range(1)
            return _allowed_fds(message.shape, message.shape.payload.unpack(message.payload))
        except RemoteProtocolError:
            return range(1)

    def _unpack_header(self, data: bytes) -> Header:
        return Header.unpack(data)

    def _check(self, header: Header) -> None:
        if header.flags & 3 != VERSION:
            cause = f"version {header.flags & 3} instead of {VERSION}"
        elif bool(header.flags & HeaderFlag.REPLY) != self._replies:
            cause = "a request" if self._replies else "a reply nobody asked for"
        elif header.size > MAX_PAYLOAD:
            cause = f"payload of {header.size} bytes, at most {MAX_PAYLOAD}"
        else:
            return
        raise FramingError(self._name(header), cause)

    def _message(self, header: Header, payload: bytes, fds: tuple[int, ...]) -> Message:
        return Message(self._kind(header.request), header.flags, payload, fds)

    def _name(self, header: Header) -> str:
        return kind_name(self._kind(header.request), "message")

    def _kind(self, number: int) -> Request | BackendRequest | int:
        try:
            return self._kinds(number)
        except ValueError:
            return number
