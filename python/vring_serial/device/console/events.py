"""What happens to a device, for logs, tests and tables: see ``Controller.on_event``.

``nr`` is the number of the port that an event is about.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from vring import RingError
from vring_serial.proto import control as ctl
from vring_serial.proto.console import ConsoleFeature
from vring_serial.proto.virtio import feature_names


class Side(enum.Enum):
    """The two sides of a port."""

    GUEST = "guest"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class FeaturesNegotiated:
    """The driver accepted features.

    Attributes:
        bits: the accepted feature bits (bit n: feature n).
    """

    bits: int

    def __str__(self) -> str:
        return f"the driver accepted {feature_names(self.bits, ConsoleFeature)}"


@dataclass(frozen=True, slots=True)
class DriverReady:
    """The driver sent DEVICE_READY.

    Attributes:
        ok: False if the driver failed to set the device up.
    """

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
    """A port was added to the device.

    Attributes:
        nr: its number.
        name: its name; "" for none.
    """

    nr: int
    name: str

    def __str__(self) -> str:
        return "added"


@dataclass(frozen=True, slots=True)
class PortRemoved:
    """A port was removed from the device.

    Attributes:
        nr: its number.
    """

    nr: int

    def __str__(self) -> str:
        return f"port {self.nr} removed"


@dataclass(frozen=True, slots=True)
class PortReady:
    """The driver set up a port, or failed to.

    Attributes:
        nr: number of the port.
        ok: False if the driver failed to set it up.
    """

    nr: int
    ok: bool = True

    def __str__(self) -> str:
        return "ready in the guest" if self.ok else "the guest could not set it up"


@dataclass(frozen=True, slots=True)
class PortOpened:
    """One side of a port was opened: by a program in the guest, or by a host end.

    Attributes:
        side: the side that was opened.
        nr: number of the port.
    """

    side: Side
    nr: int

    def __str__(self) -> str:
        return f"opened by the {self.side.value}"


@dataclass(frozen=True, slots=True)
class PortClosed:
    """One side of a port was closed.

    Attributes:
        side: the side that was closed.
        nr: number of the port.
    """

    side: Side
    nr: int

    def __str__(self) -> str:
        return f"closed by the {self.side.value}"


@dataclass(frozen=True, slots=True)
class MessageRefused:
    """A control message was ignored.

    Attributes:
        why: the reason, in one line.
    """

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
    """The guest wrote a character to `emerg_wr` in the configuration space.

    Attributes:
        char: the character's code, 0 to 255.
    """

    char: int

    def __str__(self) -> str:
        return f"emergency write of {bytes([self.char])!r}"


@dataclass(frozen=True, slots=True)
class QueueBroken:
    """The driver broke a ring; the queue stops until the next reset.

    Attributes:
        index: index of the queue.
        error: the violation.
    """

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


def of_control(event: ctl.DeviceSideEvent) -> DeviceEvent:
    """Return what happened when a control message of the driver was taken."""
    match event:
        case ctl.Refused(why):
            return MessageRefused(why)
        case ctl.PeerReady(ok):
            return DriverReady(ok)
        case ctl.PortReady(nr, ok):
            return PortReady(nr, ok)
        case ctl.PortOpened(nr):
            return PortOpened(Side.GUEST, nr)
        case ctl.PortClosed(nr):
            return PortClosed(Side.GUEST, nr)
