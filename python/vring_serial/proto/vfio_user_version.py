"""VERSION, the first message of either end: protocol version, and capabilities in JSON."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.framing import at_least
from vring_serial.proto.vfio_user_wire import DEFAULT_DATA_XFER_SIZE, DEFAULT_MSG_FDS

#: The protocol version that is spoken.
MAJOR, MINOR = 0, 0
#: Most bytes of JSON that are looked at; QEMU sends about 230.
MAX_VERSION_DATA = 4096
#: Largest number that a capability may have.
MAX_NUMBER = (1 << 64) - 1

_NUMBERS = ("max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one end can do ("VFIO_USER_VERSION"); what it does not say has the default.

    Attributes:
        max_msg_fds: descriptors that it takes beside one message.
        max_data_xfer_size: bytes that one access may have.
        max_dma_maps: regions that may be mapped at once.
        pgsizes: sizes of pages for DMA_MAP, or'ed together.
        write_multiple: whether it has REGION_WRITE_MULTI.
        twin_socket: whether it can have a socket of its own for the server's commands.
        twin_fd_index: in a reply, which of the message's descriptors that socket is.
        named: the capabilities that it named at all.
    """

    max_msg_fds: int = DEFAULT_MSG_FDS
    max_data_xfer_size: int = DEFAULT_DATA_XFER_SIZE
    max_dma_maps: int = 65535
    pgsizes: int = 4096
    write_multiple: bool = False
    twin_socket: bool = False
    twin_fd_index: int | None = None
    named: frozenset[str] = field(default=frozenset(), compare=False)

    def __str__(self) -> str:
        numbers = [f"{name} {getattr(self, name):#x}" for name in ("pgsizes",)]
        numbers += [f"{name} {getattr(self, name)}" for name in _NUMBERS if name != "pgsizes"]
        flags = [name for name in ("write_multiple", "twin_socket") if getattr(self, name)]
        return ", ".join([*numbers, *flags])

    def to_json(self) -> bytes:
        """Return the JSON of those that are named, and the terminating NUL."""
        found: dict[str, Any] = {name: getattr(self, name) for name in _NUMBERS}
        found["write_multiple"] = self.write_multiple
        found["twin_socket"] = {"supported": self.twin_socket}
        if self.twin_fd_index is not None:
            found["twin_socket"]["fd_index"] = self.twin_fd_index
        said = {name: value for name, value in found.items() if name in self.named}
        return json.dumps({"capabilities": said}, separators=(",", ":")).encode() + b"\0"

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Parse JSON with its terminating NUL; unknown capabilities go into ``named`` only.

        Raises:
            RemoteProtocolError: more than MAX_VERSION_DATA bytes, no NUL at the end, no JSON
                object, or a capability whose value is of another type or too large.
        """
        if len(data) > MAX_VERSION_DATA:
            raise RemoteProtocolError(
                f"{len(data)} bytes of JSON, at most {MAX_VERSION_DATA} are taken"
            )
        if not data.endswith(b"\0"):
            raise RemoteProtocolError("the JSON does not end with a NUL")
        try:
            document = json.loads(data[:-1].decode())
        except (ValueError, RecursionError) as error:
            raise RemoteProtocolError(f"not JSON: {error}") from None
        found = _object(_object(document, "version data").get("capabilities", {}), "capabilities")
        values: dict[str, Any] = {
            name: _number(found[name], name) for name in _NUMBERS if name in found
        }
        if "write_multiple" in found:
            values["write_multiple"] = _boolean(found["write_multiple"], "write_multiple")
        if "twin_socket" in found:
            twin = _object(found["twin_socket"], "twin_socket")
            values["twin_socket"] = _boolean(twin.get("supported", False), "twin_socket.supported")
            if "fd_index" in twin:
                values["twin_fd_index"] = _number(twin["fd_index"], "twin_socket.fd_index")
        return cls(**values, named=frozenset(found))

    def common(self, other: Self) -> Self:
        """Return what both ends can do, of what ``other`` named: the reply to its proposal.

        No number is larger and no name is longer than in the proposal, so neither is the reply;
        QEMU's client has no room for a longer one.
        """
        return replace(
            self,
            max_msg_fds=min(self.max_msg_fds, other.max_msg_fds),
            max_data_xfer_size=min(self.max_data_xfer_size, other.max_data_xfer_size),
            max_dma_maps=min(self.max_dma_maps, other.max_dma_maps),
            pgsizes=self.pgsizes & other.pgsizes,
            write_multiple=self.write_multiple and other.write_multiple,
            twin_socket=self.twin_socket and other.twin_socket,
            named=self.named & other.named,
        )


@dataclass(frozen=True, slots=True)
class Version:
    """The payload of VERSION, which the client sends first, and of the server's reply.

    Attributes:
        major, minor: of the protocol.
        capabilities: None if there was no JSON at all.
    """

    STRUCT: ClassVar = struct.Struct("=HH")

    major: int = MAJOR
    minor: int = MINOR
    capabilities: Capabilities | None = None

    def pack(self) -> bytes:
        """Return the 4 bytes of the version, and the JSON of the capabilities if there are any."""
        data = b"" if self.capabilities is None else self.capabilities.to_json()
        return self.STRUCT.pack(self.major, self.minor) + data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse a request or a reply. Raises RemoteProtocolError, also for the capabilities."""
        major, minor = at_least(cls.STRUCT, data)
        rest = data[cls.STRUCT.size :]
        return cls(major, minor, Capabilities.from_json(rest) if rest else None)


def _object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RemoteProtocolError(f"{name} is no JSON object")
    return value


def _number(value: object, name: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise RemoteProtocolError(f"{name} is no number from 0 to {MAX_NUMBER}")
    return value


def _boolean(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise RemoteProtocolError(f"{name} is neither true nor false")
    return value
