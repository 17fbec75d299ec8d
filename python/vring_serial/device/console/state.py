"""What the console device must remember in order to go on elsewhere: plain values.

It is apart from descriptors, callbacks, tasks and the objects that move bytes. Each dataclass has
one writer, named in CONTRIBUTING under *State*. While bytes move, whoever moves them knows how far
they are: all of this is exact inside ``Controller.settled``, and when the queues are stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vring_serial.proto.control import ControlState, PortState
from vring_serial.saving import StateFormat


@dataclass(slots=True)
class ChainState:
    """What is left of a chain of a transmitq that was begun when nobody serves the queue.

    While a queue is served by the pump, its flow knows how far it is. When it stops, one of three
    states is left, and it outlives host ends, paused machines and migrations:

    - whole: nothing was begun.
    - residue: a flow copied the rest, and completed the chain. These bytes are the device's, and go
      to the next descriptor before any other. A console's flow adds its backlog to them, the bytes
      that its descriptor did not take at once.
    - delivered: a protocol has the first bytes, and the chain is in the ring again. They are left
      out when it is popped once more. Fresh rings and discarding end this state.

    Attributes:
        residue: bytes.
        delivered: number of bytes.
    """

    residue: bytes = b""
    delivered: int = 0


@dataclass(slots=True)
class SessionState:
    """What a port keeps for the protocol that is its host end, while that is connected.

    Attributes:
        backlog: bytes of a console's guest that came while the protocol had paused reading.
        dropped: number of bytes that found no room there, in all.
        unread: bytes that the protocol wrote and the guest has no buffer for yet.
    """

    backlog: bytearray = field(default_factory=bytearray)
    dropped: int = 0
    unread: bytearray = field(default_factory=bytearray)


@dataclass(slots=True)
class DevicePortState:
    """One port, beside what the control protocol knows of it.

    Attributes:
        guest: what the guest's driver has said of the port.
        single: the driver did not accept MULTIPORT, and this is its one port.
        session_over: the protocol left, and the guest still has the port open: none is connected
            before the guest or the host end opens anew.
        size: columns and rows of the terminal behind the host end, if that is one.
        chain: what is left of a chain that was begun.
        session: of the connected protocol; None if none is.
    """

    guest: PortState = PortState.UNKNOWN
    single: bool = False
    session_over: bool = False
    size: tuple[int, int] | None = None
    chain: ChainState = field(default_factory=ChainState)
    session: SessionState | None = None


@dataclass(slots=True)
class ControllerState:
    """The device, beside its ports.

    Attributes:
        status: the device status (2.1), with what the device set itself.
        features: the accepted features; None before the driver has said.
        stopped_at: available index of each queue that was stopped, by queue index; 16 bits, with
            the wrap counter in bit 15 if the ring is packed.
        config_generation: counts changes of the configuration space.
        size_told: columns and rows of the console, as the configuration space gave them last.
        control: the control protocol's.
    """

    status: int = 0
    features: int | None = None
    stopped_at: dict[int, int] = field(default_factory=dict)
    config_generation: int = 0
    size_told: tuple[int, int] = (0, 0)
    control: ControlState = field(default_factory=ControlState)


@dataclass(slots=True)
class ConsoleState:
    """The device with its ports: what is written down.

    Attributes:
        controller: the device.
        ports: by number.
    """

    controller: ControllerState = field(default_factory=ControllerState)
    ports: dict[int, DevicePortState] = field(default_factory=dict)


#: How it is written down.
CONSOLE = StateFormat("console device", 1, ConsoleState)
