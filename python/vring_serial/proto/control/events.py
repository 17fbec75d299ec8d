"""What the control protocol tells its owner, on either side (virtio 1.3, 5.3.6.2).

``nr`` is the number of the port that an event is about.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PeerReady:
    """The driver sent DEVICE_READY.

    Attributes:
        ok: False if the driver failed to set the device up.
    """

    ok: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """A message was ignored.

    Attributes:
        why: the reason, in one line for a log.
    """

    why: str


@dataclass(frozen=True, slots=True)
class PortReady:
    """The driver set up a port, or failed to.

    Attributes:
        nr: number of the port.
        ok: False if the driver failed to set it up.
    """

    nr: int
    ok: bool


@dataclass(frozen=True, slots=True)
class PortOpened:
    """The peer opened its side of a port.

    Attributes:
        nr: number of the port.
    """

    nr: int


@dataclass(frozen=True, slots=True)
class PortClosed:
    """The peer closed its side of a port; bytes it wrote before may still be in the queue.

    Attributes:
        nr: number of the port.
    """

    nr: int


@dataclass(frozen=True, slots=True)
class PortAdded:
    """The device has a port: fill its receive queue, then call ``ControlDriver.port_ready``.

    Attributes:
        nr: number of the port.
    """

    nr: int


@dataclass(frozen=True, slots=True)
class PortRemoved:
    """The device removed a port.

    Attributes:
        nr: number of the port.
    """

    nr: int


@dataclass(frozen=True, slots=True)
class PortNamed:
    """The device named a port.

    Attributes:
        nr: number of the port.
        name: the name, without a terminating NUL.
    """

    nr: int
    name: bytes


@dataclass(frozen=True, slots=True)
class PortIsConsole:
    """A port is a console; the driver has opened it in answer.

    Attributes:
        nr: number of the port.
    """

    nr: int


@dataclass(frozen=True, slots=True)
class PortResized:
    """The size of a console changed.

    Attributes:
        nr: number of the port.
        cols, rows: the new size, in characters.
    """

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
