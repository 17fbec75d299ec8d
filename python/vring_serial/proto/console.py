"""The console device on the wire: features, configuration space, control messages, queues.

All integers are little-endian, as VERSION_1 demands. Section numbers are those of the virtio
specification 1.3, where the console device is 5.3.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Self, TypeAlias

from vring_serial.errors import RemoteProtocolError

Buffer: TypeAlias = bytes | bytearray | memoryview

#: The virtio device type (5.3.1).
DEVICE_ID = 3


class ConsoleFeature(enum.IntFlag):
    """Feature bits of the console device (5.3.3), beside those of any device."""

    SIZE = 1 << 0
    MULTIPORT = 1 << 1
    EMERG_WRITE = 1 << 2


# --- configuration space --------------------------------------------------------------------------

#: max_nr_ports lies in 1..MAX_PORTS (5.3.4: queue numbers must fit 16 bits).
MAX_PORTS = 0x8000


@dataclass(frozen=True, slots=True)
class ConsoleConfig:
    """The device configuration space (5.3.4).

    Attributes:
        cols, rows: size of the console in characters, where SIZE is negotiated; 0 if unknown.
        max_nr_ports: how many ports there can be, where MULTIPORT is negotiated.
        emerg_wr: written by the driver, a character in the low byte (EMERG_WRITE); reads as 0.
    """

    cols: int = 0
    rows: int = 0
    max_nr_ports: int = 1
    emerg_wr: int = 0

    STRUCT = struct.Struct("<HHII")
    SIZE = STRUCT.size
    #: Offset of emerg_wr in bytes.
    EMERG_WR = 8

    def pack(self) -> bytes:
        """Return the 12 bytes of the configuration space."""
        return self.STRUCT.pack(self.cols, self.rows, self.max_nr_ports, self.emerg_wr)

    @classmethod
    def unpack(cls, data: Buffer) -> Self:
        """Parse 12 bytes; more are ignored. Raises RemoteProtocolError if there are fewer."""
        if len(data) < cls.SIZE:
            raise RemoteProtocolError(
                f"console configuration: {len(data)} bytes, {cls.SIZE} expected"
            )
        return cls(*cls.STRUCT.unpack_from(data))


# --- control messages -----------------------------------------------------------------------------


class ControlEvent(enum.IntEnum):
    """What a control message says (5.3.6.2)."""

    DEVICE_READY = 0
    PORT_ADD = 1
    PORT_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


#: The id in messages that are about no port.
NO_PORT = 0xFFFFFFFF
#: Longest PORT_NAME in bytes: with its header it fills the page that Linux gives for a message.
MAX_NAME = 4096 - 8


@dataclass(frozen=True, slots=True)
class ControlMessage:
    """One message on a control queue: one descriptor chain (5.3.6.2).

    Attributes:
        id: port number, or NO_PORT.
        event: what happened; a plain int if it is none of ControlEvent.
        value: extra information, usually 1 or 0.
        payload: the bytes after the header: the name of PORT_NAME, the Size of RESIZE.
    """

    id: int
    event: int
    value: int = 0
    payload: bytes = b""

    STRUCT = struct.Struct("<IHH")

    def pack(self) -> bytes:
        """Return the message's bytes."""
        return self.STRUCT.pack(self.id, self.event, self.value) + self.payload

    @classmethod
    def unpack(cls, data: Buffer) -> Self:
        """Parse all bytes of one message.

        Raises RemoteProtocolError if the header is not whole. An event that is not in ControlEvent
        is the receiver's to refuse.
        """
        if len(data) < cls.STRUCT.size:
            raise RemoteProtocolError(
                f"control message: {len(data)} bytes, at least {cls.STRUCT.size} expected"
            )
        port, event, value = cls.STRUCT.unpack_from(data)
        return cls(port, event, value, bytes(data[cls.STRUCT.size :]))

    def __str__(self) -> str:
        try:
            event = ControlEvent(self.event).name
        except ValueError:
            event = f"event {self.event}"
        extra = f" {self.payload[:64]!r}" if self.payload else ""
        return f"{event}(id {self.id:#x}, value {self.value}{extra})"


@dataclass(frozen=True, slots=True)
class Size:
    """Payload of RESIZE: the size of a console (5.3.6.2).

    Attributes:
        cols: columns, in characters.
        rows: rows, in characters.
    """

    cols: int
    rows: int

    STRUCT = struct.Struct("<HH")

    def pack(self) -> bytes:
        """Return the payload's 4 bytes."""
        return self.STRUCT.pack(self.cols, self.rows)

    @classmethod
    def unpack(cls, data: Buffer) -> Self:
        """Parse 4 bytes; more are ignored. Raises RemoteProtocolError if there are fewer."""
        if len(data) < cls.STRUCT.size:
            raise RemoteProtocolError(f"console size: {len(data)} bytes, 4 expected")
        return cls(*cls.STRUCT.unpack_from(data))


# --- queue numbers --------------------------------------------------------------------------------

#: The driver's receive buffers for control messages, and the messages that it sends (5.3.2).
CONTROL_RECEIVEQ = 2
CONTROL_TRANSMITQ = 3


def queues_of_port(nr: int) -> tuple[int, int]:
    """Return the queues (receiveq, transmitq) of port ``nr``, named from the driver's side (5.3.2).

    Port 0 has queues 0 and 1; the control queues stand between it and port 1, which has 4 and 5.
    """
    if not 0 <= nr < MAX_PORTS:
        raise ValueError(f"port {nr} is not in 0..{MAX_PORTS - 1}")
    first = 2 * nr + 2 if nr else 0
    return first, first + 1


def port_of_queue(index: int) -> tuple[int | None, bool]:
    """Return the port of queue ``index``, None for control, and whether it is a transmitq.

    The inverse of :func:`queues_of_port`.
    """
    if not 0 <= index < 2 * (MAX_PORTS + 1):
        raise ValueError(f"queue {index} is not in 0..{2 * MAX_PORTS + 1}")
    pair, is_transmit = divmod(index, 2)
    if pair == 1:
        return None, bool(is_transmit)
    return (pair - 1 if pair else 0), bool(is_transmit)


def queue_count(max_nr_ports: int, multiport: bool = True) -> int:
    """Return how many queues a device has (5.3.2): two for each port, and two for control."""
    return 2 * (max_nr_ports + 1) if multiport else 2
