"""The driver's side of the control protocol, as Linux's driver behaves."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from vring_serial.errors import LocalProtocolError, RemoteProtocolError
from vring_serial.proto.console import MAX_NAME, NO_PORT, Buffer, ControlEvent, ControlMessage, Size
from vring_serial.proto.control.events import (
    DriverSideEvent,
    PortAdded,
    PortClosed,
    PortIsConsole,
    PortNamed,
    PortOpened,
    PortRemoved,
    PortResized,
    Refused,
)
from vring_serial.proto.control.outbox import Outbox


class DriverPortState(enum.Enum):
    """What a port is to the driver itself."""

    ABSENT = "not announced, or removed"
    ADDED = "announced; its receive queue is being filled"
    CLOSED = "usable; no program has it open"
    OPEN = "a program, or the console, has it open"


class DriverInput(enum.Enum):
    """What the device says about a port, and what the driver's owner does with it."""

    ADD = enum.auto()
    REMOVE = enum.auto()
    CONSOLE = enum.auto()
    READY = enum.auto()
    FAILED = enum.auto()
    OPEN = enum.auto()
    CLOSE = enum.auto()


class _DriverDo(enum.Enum):
    SEND_READY = enum.auto()
    SEND_NOT_READY = enum.auto()
    SEND_OPEN = enum.auto()
    SEND_CLOSE = enum.auto()
    TELL_ADDED = enum.auto()
    TELL_REMOVED = enum.auto()
    TELL_CONSOLE = enum.auto()


#: (state, input) → (state, what to do). What is not here is refused: as a device's mistake for ADD,
#: REMOVE and CONSOLE, as ours for the others.
DRIVER_TRANSITIONS: dict[
    tuple[DriverPortState, DriverInput], tuple[DriverPortState, tuple[_DriverDo, ...]]
] = {
    (DriverPortState.ABSENT, DriverInput.ADD): (DriverPortState.ADDED, (_DriverDo.TELL_ADDED,)),
    (DriverPortState.ADDED, DriverInput.ADD): (DriverPortState.ADDED, ()),
    (DriverPortState.CLOSED, DriverInput.ADD): (DriverPortState.CLOSED, (_DriverDo.SEND_READY,)),
    (DriverPortState.OPEN, DriverInput.ADD): (DriverPortState.OPEN, (_DriverDo.SEND_READY,)),
    (DriverPortState.ADDED, DriverInput.REMOVE): (
        DriverPortState.ABSENT,
        (_DriverDo.TELL_REMOVED,),
    ),
    (DriverPortState.CLOSED, DriverInput.REMOVE): (
        DriverPortState.ABSENT,
        (_DriverDo.TELL_REMOVED,),
    ),
    (DriverPortState.OPEN, DriverInput.REMOVE): (
        DriverPortState.ABSENT,
        (_DriverDo.TELL_REMOVED,),
    ),
    (DriverPortState.CLOSED, DriverInput.CONSOLE): (
        DriverPortState.OPEN,
        (_DriverDo.SEND_OPEN, _DriverDo.TELL_CONSOLE),
    ),
    (DriverPortState.OPEN, DriverInput.CONSOLE): (
        DriverPortState.OPEN,
        (_DriverDo.TELL_CONSOLE,),
    ),
    (DriverPortState.ADDED, DriverInput.READY): (DriverPortState.CLOSED, (_DriverDo.SEND_READY,)),
    (DriverPortState.ADDED, DriverInput.FAILED): (
        DriverPortState.ABSENT,
        (_DriverDo.SEND_NOT_READY,),
    ),
    (DriverPortState.CLOSED, DriverInput.OPEN): (DriverPortState.OPEN, (_DriverDo.SEND_OPEN,)),
    (DriverPortState.OPEN, DriverInput.CLOSE): (DriverPortState.CLOSED, (_DriverDo.SEND_CLOSE,)),
}


@dataclass(slots=True)
class DriverPort:
    """What the driver knows of a port.

    Attributes:
        nr: port number.
        state: see DriverPortState.
        name: without trailing NULs; empty if the device gave none. The first name stays.
        console: the device said that it is a console.
        host_open: the device's side is connected.
        size: the console's size, if the device told it.
    """

    nr: int
    state: DriverPortState = DriverPortState.ABSENT
    name: bytes = b""
    console: bool = False
    host_open: bool = False
    size: Size | None = None


@dataclass
class ControlDriver:
    """The driver's side of the control queues, as Linux's driver behaves.

    Attributes:
        max_ports: max_nr_ports of the configuration space.
        ports: the ports that the device announced and has not removed.
        outbox: what waits to be sent.
    """

    max_ports: int
    ports: dict[int, DriverPort] = field(default_factory=dict)
    outbox: Outbox = field(default_factory=Outbox)

    # what the driver's owner does

    def start(self) -> None:
        """Say DEVICE_READY. The control receive queue must be filled by then."""
        self.outbox.add(ControlMessage(NO_PORT, ControlEvent.DEVICE_READY, 1))

    def port_ready(self, nr: int, ok: bool = True) -> None:
        """Answer PortAdded, before anything else is received: the port can be used, or cannot.

        Raises LocalProtocolError if the port is not one that was just added.
        """
        self._step_local(nr, DriverInput.READY if ok else DriverInput.FAILED)

    def open(self, nr: int) -> None:
        """Open the port for a program. Raises LocalProtocolError if it is not there, or open."""
        self._step_local(nr, DriverInput.OPEN)

    def close(self, nr: int) -> None:
        """Close the port for its program. LocalProtocolError if it is not there, or not open."""
        self._step_local(nr, DriverInput.CLOSE)

    def resume(self) -> None:
        """Come back from suspend, after a reset: as Linux does, without DEVICE_READY."""
        self.outbox.clear()
        for port in self.ports.values():
            port.host_open = False
            self.outbox.add(ControlMessage(port.nr, ControlEvent.PORT_READY, 1))
            if port.state is DriverPortState.OPEN:
                self.outbox.add(ControlMessage(port.nr, ControlEvent.PORT_OPEN, 1))

    # what the device sends

    def receive_message(self, data: Buffer) -> list[DriverSideEvent]:
        """Take one message from the device."""
        try:
            message = ControlMessage.unpack(data)
        except RemoteProtocolError as error:
            return [Refused(str(error))]
        if message.event == ControlEvent.PORT_ADD:
            return self._receive_port_add(message)
        if message.event not in _DEVICE_SENDS:
            return [Refused(f"{message}: not an event that a device sends")]
        port = self.ports.get(message.id)
        if port is None:
            return [Refused(f"{message}: there is no such port")]
        match message.event:
            case ControlEvent.PORT_REMOVE:
                return self._step(port, DriverInput.REMOVE, message)
            case ControlEvent.CONSOLE_PORT:
                return self._receive_console(port, message)
            case ControlEvent.RESIZE:
                return self._receive_resize(port, message)
            case ControlEvent.PORT_OPEN:
                return self._receive_open(port, message)
            case _:
                return self._receive_name(port, message)

    def _receive_port_add(self, message: ControlMessage) -> list[DriverSideEvent]:
        if message.id >= self.max_ports:
            return [Refused(f"{message}: port numbers are 0..{self.max_ports - 1}")]
        port = self.ports.setdefault(message.id, DriverPort(message.id))
        return self._step(port, DriverInput.ADD, message)

    def _receive_console(self, port: DriverPort, message: ControlMessage) -> list[DriverSideEvent]:
        if not message.value or port.console:
            return []
        port.console = (port.state, DriverInput.CONSOLE) in DRIVER_TRANSITIONS
        return self._step(port, DriverInput.CONSOLE, message)

    def _receive_resize(self, port: DriverPort, message: ControlMessage) -> list[DriverSideEvent]:
        try:
            size = Size.unpack(message.payload)
        except RemoteProtocolError as error:
            return [Refused(f"{message}: {error}")]
        if not port.console:
            return []
        port.size = size
        return [PortResized(port.nr, size.cols, size.rows)]

    def _receive_open(self, port: DriverPort, message: ControlMessage) -> list[DriverSideEvent]:
        is_open = bool(message.value)
        if port.host_open == is_open:
            return []
        port.host_open = is_open
        return [PortOpened(port.nr) if is_open else PortClosed(port.nr)]

    def _receive_name(self, port: DriverPort, message: ControlMessage) -> list[DriverSideEvent]:
        name = message.payload.rstrip(b"\0")
        if len(name) > MAX_NAME:
            return [Refused(f"PORT_NAME(id {port.nr:#x}): {len(name)} bytes, at most {MAX_NAME}")]
        if port.name or not name:
            return []
        port.name = name
        return [PortNamed(port.nr, name)]

    # internals

    def _step_local(self, nr: int, driver_input: DriverInput) -> None:
        port = self.ports.get(nr)
        state = port.state if port else DriverPortState.ABSENT
        if port is None or (state, driver_input) not in DRIVER_TRANSITIONS:
            raise LocalProtocolError(f"port {nr}: {driver_input.name} while it is {state.name}")
        self._step(port, driver_input, None)

    def _step(
        self, port: DriverPort, driver_input: DriverInput, message: ControlMessage | None
    ) -> list[DriverSideEvent]:
        try:
            port.state, actions = DRIVER_TRANSITIONS[port.state, driver_input]
        except KeyError:
            return [Refused(f"{message}: while the port is {port.state.name}")]
        if port.state is DriverPortState.ABSENT:
            del self.ports[port.nr]
            self.outbox.forget(port.nr)
        events: list[DriverSideEvent] = []
        for action in actions:
            if action in _DRIVER_SENDS:
                event, value = _DRIVER_SENDS[action]
                self.outbox.add(ControlMessage(port.nr, event, value))
            else:
                events.append(_DRIVER_TELLS[action](port.nr))
        return events


_DEVICE_SENDS = {
    ControlEvent.PORT_REMOVE,
    ControlEvent.CONSOLE_PORT,
    ControlEvent.RESIZE,
    ControlEvent.PORT_OPEN,
    ControlEvent.PORT_NAME,
}
_DRIVER_SENDS = {
    _DriverDo.SEND_READY: (ControlEvent.PORT_READY, 1),
    _DriverDo.SEND_NOT_READY: (ControlEvent.PORT_READY, 0),
    _DriverDo.SEND_OPEN: (ControlEvent.PORT_OPEN, 1),
    _DriverDo.SEND_CLOSE: (ControlEvent.PORT_OPEN, 0),
}
_DRIVER_TELLS: dict[_DriverDo, Callable[[int], DriverSideEvent]] = {
    _DriverDo.TELL_ADDED: PortAdded,
    _DriverDo.TELL_REMOVED: PortRemoved,
    _DriverDo.TELL_CONSOLE: PortIsConsole,
}
