"""The multiport control protocol, both sides, without input or output (virtio 1.3, 5.3.6.2).

Each side is a small automaton per port, written down as a table: what the port is, what comes in,
what it becomes and what is done about it. The tables are the protocol; the classes around them keep
the ports' descriptions and the messages that wait.

- :class:`ControlDevice` is the device. Its table is tolerant, for the drivers that exist: Linux
  resuming from suspend speaks of ports that were never announced to it since the reset, and Windows
  repeats itself at every power-up.
- :class:`ControlDriver` is the driver, as Linux's behaves: same messages, same order.

Both take messages with ``receive_message`` (on a queue, one buffer is one message) and return what
happened as a list of events. Messages to send wait in an :class:`Outbox`, because a peer may have
no buffer for them: they are never dropped and yet bounded, because of what waits about one port
only the last state counts.
"""

from __future__ import annotations

from vring_serial.proto.control.device import (
    DEVICE_TRANSITIONS,
    ControlDevice,
    PortInput,
)
from vring_serial.proto.control.driver import (
    DRIVER_TRANSITIONS,
    ControlDriver,
    DriverInput,
    DriverPort,
    DriverPortState,
)
from vring_serial.proto.control.events import (
    DeviceSideEvent,
    DriverSideEvent,
    PeerReady,
    PortAdded,
    PortClosed,
    PortIsConsole,
    PortNamed,
    PortOpened,
    PortReady,
    PortRemoved,
    PortResized,
    Refused,
)
from vring_serial.proto.control.outbox import Outbox
from vring_serial.proto.control.state import ControlPortState, ControlState, PortState

__all__ = [
    "ControlDevice",
    "ControlDriver",
    "Outbox",
    "ControlPortState",
    "ControlState",
    "DEVICE_TRANSITIONS",
    "PortInput",
    "PortState",
    "DRIVER_TRANSITIONS",
    "DriverInput",
    "DriverPort",
    "DriverPortState",
    "DeviceSideEvent",
    "DriverSideEvent",
    "PeerReady",
    "PortAdded",
    "PortClosed",
    "PortIsConsole",
    "PortNamed",
    "PortOpened",
    "PortReady",
    "PortRemoved",
    "PortResized",
    "Refused",
]
