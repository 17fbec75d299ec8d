"""What happens to a device, for logs, tests and tables: see ``Controller.on_event``."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from vring import RingError


class Side(enum.Enum):
    """The two sides of a port."""

    GUEST = "guest"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class FeaturesNegotiated:
    """The driver accepted these feature bits."""

    bits: int


@dataclass(frozen=True, slots=True)
class DriverReady:
    """The guest's driver runs the device; ``ok`` is False if it says that it failed."""

    ok: bool = True


@dataclass(frozen=True, slots=True)
class DeviceReset:
    """The device was reset, or a driver starts with fresh rings."""


@dataclass(frozen=True, slots=True)
class PortAdded:
    """The device has a port more."""

    nr: int
    name: str


@dataclass(frozen=True, slots=True)
class PortRemoved:
    """The device has a port less."""

    nr: int


@dataclass(frozen=True, slots=True)
class PortReady:
    """The guest's driver can use the port, or could not set it up (``ok`` False)."""

    nr: int
    ok: bool = True


@dataclass(frozen=True, slots=True)
class PortOpened:
    """One side of the port was opened: a guest's program, or a host end."""

    side: Side
    nr: int


@dataclass(frozen=True, slots=True)
class PortClosed:
    """One side of the port was closed."""

    side: Side
    nr: int


@dataclass(frozen=True, slots=True)
class MessageRefused:
    """A control message was ignored."""

    why: str


@dataclass(frozen=True, slots=True)
class OutputDropped:
    """A console's host end did not keep up: ``count`` bytes in all were dropped so far."""

    nr: int
    count: int


@dataclass(frozen=True, slots=True)
class EmergencyWrite:
    """The guest wrote a character to the configuration space."""

    char: int


@dataclass(frozen=True, slots=True)
class QueueBroken:
    """The driver broke a ring; the queue stands still until the next reset."""

    index: int
    error: RingError


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
