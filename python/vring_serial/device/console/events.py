"""What happens to a device, for logs, tests and tables: see ``Controller.on_event``.

``nr`` is the number of the port that an event is about.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from vring import RingError
from vring_serial.proto.console import ConsoleFeature
from vring_serial.proto.virtio import feature_names


class Side(enum.Enum):
    """The two sides of a port."""

    GUEST = "guest"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class FeaturesNegotiated:
    """The driver accepted these feature bits."""

    bits: int

    def __str__(self) -> str:
        return f"the driver accepted {feature_names(self.bits, ConsoleFeature)}"


@dataclass(frozen=True, slots=True)
class DriverReady:
    """The guest's driver runs the device; ``ok`` is False if it says that it failed."""

    ok: bool = True

    def __str__(self) -> str:
        return "the driver is ready" if self.ok else "the driver failed"


@dataclass(frozen=True, slots=True)
class DeviceReset:
    """The device was reset, or a driver starts with fresh rings."""

    def __str__(self) -> str:
        return "reset"


@dataclass(frozen=True, slots=True)
class PortAdded:
    """The device has a port more."""

    nr: int
    name: str

    def __str__(self) -> str:
        return "added"


@dataclass(frozen=True, slots=True)
class PortRemoved:
    """The device has a port less."""

    nr: int

    def __str__(self) -> str:
        return f"port {self.nr} removed"


@dataclass(frozen=True, slots=True)
class PortReady:
    """The guest's driver can use the port, or could not set it up (``ok`` False)."""

    nr: int
    ok: bool = True

    def __str__(self) -> str:
        return "ready in the guest" if self.ok else "the guest could not set it up"


@dataclass(frozen=True, slots=True)
class PortOpened:
    """One side of the port was opened: a guest's program, or a host end."""

    side: Side
    nr: int

    def __str__(self) -> str:
        return f"opened by the {self.side.value}"


@dataclass(frozen=True, slots=True)
class PortClosed:
    """One side of the port was closed."""

    side: Side
    nr: int

    def __str__(self) -> str:
        return f"closed by the {self.side.value}"


@dataclass(frozen=True, slots=True)
class MessageRefused:
    """A control message was ignored."""

    why: str

    def __str__(self) -> str:
        return f"refused: {self.why}"


@dataclass(frozen=True, slots=True)
class OutputDropped:
    """Bytes that the guest sent were dropped because no host end took them.

    On a console port this happens when the host end does not keep up; on any port, when the port is
    removed or the device stops.

    Attributes:
        nr: the port's number.
        count: bytes dropped on this port so far in total, not since the previous event.
    """

    nr: int
    count: int

    def __str__(self) -> str:
        return f"output dropped, {self.count} bytes in total: no host end took them"


@dataclass(frozen=True, slots=True)
class EmergencyWrite:
    """The guest wrote a character to the configuration space."""

    char: int

    def __str__(self) -> str:
        return f"emergency write of {bytes([self.char])!r}"


@dataclass(frozen=True, slots=True)
class QueueBroken:
    """The driver broke a ring; the queue stands still until the next reset."""

    index: int
    error: RingError

    def __str__(self) -> str:
        return f"queue {self.index} is broken, the device needs a reset: {self.error}"


DeviceEvent = (
    FeaturesNegotiated
    | DriverReady
    | DeviceReset
    | PortAdded
    | PortRemoved
    | PortReady
    | PortOpened
    | PortClosed
    | MessageRefused
    | OutputDropped
    | EmergencyWrite
    | QueueBroken
)
