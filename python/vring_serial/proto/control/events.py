"""What the control protocol tells its owner, on either side (virtio 1.3, 5.3.6.2).

``nr`` is the number of the port that an event is about.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PeerReady:
    """The driver sent DEVICE_READY: ``ok`` is False if it failed to set the device up."""

    ok: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """A message that was ignored, and why, in one line for a log."""

    why: str


@dataclass(frozen=True, slots=True)
class PortReady:
    """The driver can use the port, or failed to set it up (``ok`` False)."""

    nr: int
    ok: bool


@dataclass(frozen=True, slots=True)
class PortOpened:
    """The peer opened its side of the port."""

    nr: int


@dataclass(frozen=True, slots=True)
class PortClosed:
    """The peer closed its side of the port; what it wrote before may still wait in the queue."""

    nr: int


@dataclass(frozen=True, slots=True)
class PortAdded:
    """The device has a port: fill its receive queue, then call ``ControlDriver.port_ready``."""

    nr: int


@dataclass(frozen=True, slots=True)
class PortRemoved:
    """The device took the port away."""

    nr: int


@dataclass(frozen=True, slots=True)
class PortNamed:
    """The port's name."""

    nr: int
    name: bytes


@dataclass(frozen=True, slots=True)
class PortIsConsole:
    """The port is a console; the driver has opened it in answer."""

    nr: int


@dataclass(frozen=True, slots=True)
class PortResized:
    """The console's size in characters."""

    nr: int
    cols: int
    rows: int


DeviceSideEvent = PeerReady | PortReady | PortOpened | PortClosed | Refused
DriverSideEvent = (
    PortAdded
    | PortRemoved
    | PortNamed
    | PortIsConsole
    | PortResized
    | PortOpened
    | PortClosed
    | Refused
)
