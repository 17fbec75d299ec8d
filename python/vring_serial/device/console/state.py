"""What the console device must remember in order to go on elsewhere: plain values.

It is apart from descriptors, callbacks, tasks and the objects that move bytes. Each dataclass has
one writer, named in CONTRIBUTING under *State*. While bytes move, whoever moves them knows how far
they are: all of this is exact inside ``Controller.settled``, and when the queues are stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vring_serial.errors import StateError
from vring_serial.proto.console import ConsoleFeature
from vring_serial.proto.control import ControlState, PortState
from vring_serial.proto.virtio import feature_names
from vring_serial.saving import StateFormat, check_range


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
        number: of the residue: each has another one, so that a record of what was written of it
            speaks of no other.
        gone: bytes that were written of it before what is left.
        at: position of the chain in the ring if that may not be completed yet: then it is the
            ring's record that counts, and there is no residue.
    """

    residue: bytes = b""
    delivered: int = 0
    number: int = 0
    gone: int = 0
    at: int | None = None


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
        still: nothing moves before a queue is started: the state was saved, and may go on
            elsewhere, or was put back.
    """

    status: int = 0
    features: int | None = None
    stopped_at: dict[int, int] = field(default_factory=dict)
    config_generation: int = 0
    size_told: tuple[int, int] = (0, 0)
    control: ControlState = field(default_factory=ControlState)
    still: bool = False


@dataclass(slots=True)
class ConsoleState:
    """The device with its ports: what is written down.

    Attributes:
        max_ports: of the device; port numbers are below it.
        controller: the device.
        ports: by number.
    """

    max_ports: int = 0
    controller: ControllerState = field(default_factory=ControllerState)
    ports: dict[int, DevicePortState] = field(default_factory=dict)


#: Bytes that a console's protocol may leave waiting while it does not read; more are dropped.
BACKLOG_MAX = 1 << 20
#: How it is written down.
CONSOLE = StateFormat("console device", 1, ConsoleState)


def check_console(
    state: ConsoleState,
    *,
    max_ports: int,
    ports: dict[int, tuple[bytes, bool]] | None,
    num_queues: int,
    features: int,
) -> None:
    """Check a state that somebody else wrote down against the device that is to go on from it.

    Args:
        state: all of it.
        max_ports, num_queues, features: of the device; features are those that it offers.
        ports: the device's, by number: name, and whether it is a console; None: the driver is told
            of those that are others now.

    Raises StateError that names what does not fit.
    """
    if state.max_ports != max_ports:
        raise StateError(f"it is of a device with max_ports {state.max_ports}, not {max_ports}")
    controller, control = state.controller, state.controller.control
    theirs = {nr: (port.name, port.console) for nr, port in control.ports.items()}
    if ports is not None:
        for nr in sorted(theirs.keys() | ports.keys()):
            if theirs.get(nr) != ports.get(nr):
                raise StateError(f"{_describe(nr, theirs)} in it, {_describe(nr, ports)} here")
        if state.ports.keys() != ports.keys():
            there = sorted(state.ports)
            raise StateError(f"it has the state of ports {there}, not {sorted(ports)}")
    if beyond := [nr for nr in theirs.keys() | state.ports.keys() if not 0 <= nr < max_ports]:
        raise StateError(f"it has ports {sorted(beyond)}, and max_ports is {max_ports}")
    if extra := (controller.features or 0) & ~features:
        names = feature_names(extra, ConsoleFeature)
        raise StateError(f"the driver accepted features that are not offered: {names}")
    check_range("the status", controller.status, 8)
    check_range("the features", controller.features or 0, 64)
    check_range("config_generation", controller.config_generation, 64)
    for index, position in controller.stopped_at.items():
        if not 0 <= index < num_queues:
            raise StateError(f"a position of queue {index}; there are {num_queues} queues")
        check_range(f"the position of queue {index}", position, 16)
    _check_control(control)
    for nr, port in state.ports.items():
        _check_port(f"port {nr}", port)


def _describe(nr: int, ports: dict[int, tuple[bytes, bool]]) -> str:
    if nr not in ports:
        return f"there is no port {nr}"
    name, console = ports[nr]
    kind = "a console" if console else "no console"
    return f"port {nr} is {name.decode(errors='backslashreplace')!r}, {kind},"


def _check_control(control: ControlState) -> None:
    for nr, port in control.ports.items():
        if port.nr != nr:
            raise StateError(f"port {nr} is said to be port {port.nr}")
        if port.size is not None:
            check_range(f"port {nr}: columns", port.size.cols, 16)
            check_range(f"port {nr}: rows", port.size.rows, 16)
    if sorted(control.waiting) != list(control.waiting) or min(control.waiting, default=0) < 0:
        raise StateError("the messages that wait are not in order")
    for message in control.waiting.values():
        check_range("the port of a message", message.id, 32)
        check_range("the event of a message", message.event, 16)
        check_range("the value of a message", message.value, 16)


def _check_port(port: str, state: DevicePortState) -> None:
    for number in state.size or ():
        check_range(f"{port}: the size", number, 16)
    check_range(f"{port}: delivered bytes", state.chain.delivered, 63)
    check_range(f"{port}: the number of the residue", state.chain.number, 63)
    check_range(f"{port}: written bytes", state.chain.gone, 63)
    check_range(f"{port}: the place of the residue's chain", state.chain.at or 0, 16)
    if state.session is not None:
        check_range(f"{port}: dropped bytes", state.session.dropped, 63)
        if len(state.session.backlog) > BACKLOG_MAX:
            raise StateError(f"{port} has a backlog of {len(state.session.backlog)} bytes")
