"""What the device's side of the control protocol must remember: plain values."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from vring_serial.proto.console import ControlMessage, Size


class PortState(enum.Enum):
    """What a port is to the driver, as far as the device knows. The values are written down."""

    UNKNOWN = "unknown"
    """The driver has not heard of it, or not since the last reset."""
    ADDED = "added"
    """PORT_ADD is on its way or received."""
    READY = "ready"
    """The driver can use it and has not opened it yet."""
    OPEN = "open"
    """The driver has it open."""
    CLOSED = "closed"
    """The driver had it open; what it wrote before it closed counts."""
    FAILED = "failed"
    """The driver could not set it up."""


@dataclass(slots=True)
class ControlPortState:
    """One port.

    Attributes:
        nr: port number.
        name: without a NUL; may be empty.
        console: the driver is to make a console of it.
        state: what it is to the driver.
        host_open: a host end is connected.
        told_open: the driver may think that the host end is connected.
        size: of the terminal, in characters; None if it has not said.
        spoken_of: the driver said something about it since the last reset.
    """

    nr: int
    name: bytes
    console: bool
    state: PortState = PortState.UNKNOWN
    host_open: bool = False
    told_open: bool = False
    size: Size | None = None
    spoken_of: bool = False


@dataclass(slots=True)
class ControlState:
    """The whole device.

    Attributes:
        driver_ready: the driver sent DEVICE_READY, or spoke of a port as one that resumes does.
        ports: by number.
        waiting: messages that wait for a buffer of the driver, by number of order, the first first.
    """

    driver_ready: bool = False
    ports: dict[int, ControlPortState] = field(default_factory=dict)
    waiting: dict[int, ControlMessage] = field(default_factory=dict)
