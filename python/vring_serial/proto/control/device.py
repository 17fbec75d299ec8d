"""The device's side of the control protocol."""

from __future__ import annotations

import enum
from collections import OrderedDict

from vring_serial.errors import LocalProtocolError, RemoteProtocolError
from vring_serial.proto.console import (
    MAX_NAME,
    MAX_PORTS,
    Buffer,
    ControlEvent,
    ControlMessage,
    Size,
)
from vring_serial.proto.control.events import (
    DeviceSideEvent,
    PeerReady,
    PortClosed,
    PortOpened,
    PortReady,
    Refused,
)
from vring_serial.proto.control.outbox import Outbox
from vring_serial.proto.control.state import ControlPortState, ControlState, PortState


class PortInput(enum.Enum):
    """What the driver says about a port; ANNOUNCE is its DEVICE_READY."""

    ANNOUNCE = enum.auto()
    READY = enum.auto()
    NOT_READY = enum.auto()
    OPEN = enum.auto()
    CLOSE = enum.auto()


class _Do(enum.Enum):
    """What a transition does besides changing the state."""

    SEND_ADD = enum.auto()
    DESCRIBE = enum.auto()
    """Send CONSOLE_PORT, PORT_NAME, PORT_OPEN(1), RESIZE, where they apply."""
    SEND_OPEN = enum.auto()
    """Send PORT_OPEN(1) if the host end is connected, PORT_OPEN(0) if the driver thinks so."""
    TELL_READY = enum.auto()
    TELL_FAILED = enum.auto()
    TELL_OPENED = enum.auto()
    TELL_CLOSED = enum.auto()


#: (state, input) → (state, what to do). Complete: a driver can say everything at any time, and
#: nothing that it says is an error. PORT_OPEN before PORT_READY happens with Linux, whose programs
#: can open a port the moment before its driver says that the port is ready.
DEVICE_TRANSITIONS: dict[tuple[PortState, PortInput], tuple[PortState, tuple[_Do, ...]]] = {
    (PortState.UNKNOWN, PortInput.ANNOUNCE): (PortState.ADDED, (_Do.SEND_ADD,)),
    # Linux resuming: no DEVICE_READY since the reset, yet it knows the port.
    (PortState.UNKNOWN, PortInput.READY): (PortState.READY, (_Do.DESCRIBE, _Do.TELL_READY)),
    (PortState.UNKNOWN, PortInput.NOT_READY): (PortState.FAILED, (_Do.TELL_FAILED,)),
    (PortState.UNKNOWN, PortInput.OPEN): (PortState.OPEN, (_Do.SEND_OPEN, _Do.TELL_OPENED)),
    (PortState.UNKNOWN, PortInput.CLOSE): (PortState.UNKNOWN, ()),
    (PortState.ADDED, PortInput.ANNOUNCE): (PortState.ADDED, (_Do.SEND_ADD,)),
    (PortState.ADDED, PortInput.READY): (PortState.READY, (_Do.DESCRIBE, _Do.TELL_READY)),
    (PortState.ADDED, PortInput.NOT_READY): (PortState.FAILED, (_Do.TELL_FAILED,)),
    (PortState.ADDED, PortInput.OPEN): (PortState.OPEN, (_Do.SEND_OPEN, _Do.TELL_OPENED)),
    (PortState.ADDED, PortInput.CLOSE): (PortState.ADDED, ()),
    (PortState.READY, PortInput.ANNOUNCE): (PortState.ADDED, (_Do.SEND_ADD,)),
    # Linux again: its answer to a PORT_ADD for a port that it has.
    (PortState.READY, PortInput.READY): (PortState.READY, (_Do.DESCRIBE,)),
    (PortState.READY, PortInput.NOT_READY): (PortState.FAILED, (_Do.TELL_FAILED,)),
    (PortState.READY, PortInput.OPEN): (PortState.OPEN, (_Do.TELL_OPENED,)),
    (PortState.READY, PortInput.CLOSE): (PortState.READY, ()),
    (PortState.OPEN, PortInput.ANNOUNCE): (PortState.ADDED, (_Do.TELL_CLOSED, _Do.SEND_ADD)),
    (PortState.OPEN, PortInput.READY): (PortState.OPEN, (_Do.DESCRIBE,)),
    (PortState.OPEN, PortInput.NOT_READY): (PortState.FAILED, (_Do.TELL_CLOSED, _Do.TELL_FAILED)),
    (PortState.OPEN, PortInput.OPEN): (PortState.OPEN, ()),
    (PortState.OPEN, PortInput.CLOSE): (PortState.CLOSED, (_Do.TELL_CLOSED,)),
    (PortState.CLOSED, PortInput.ANNOUNCE): (PortState.ADDED, (_Do.SEND_ADD,)),
    (PortState.CLOSED, PortInput.READY): (PortState.CLOSED, (_Do.DESCRIBE,)),
    (PortState.CLOSED, PortInput.NOT_READY): (PortState.FAILED, (_Do.TELL_FAILED,)),
    (PortState.CLOSED, PortInput.OPEN): (PortState.OPEN, (_Do.TELL_OPENED,)),
    (PortState.CLOSED, PortInput.CLOSE): (PortState.CLOSED, ()),
    (PortState.FAILED, PortInput.ANNOUNCE): (PortState.ADDED, (_Do.SEND_ADD,)),
    (PortState.FAILED, PortInput.READY): (PortState.READY, (_Do.DESCRIBE, _Do.TELL_READY)),
    (PortState.FAILED, PortInput.NOT_READY): (PortState.FAILED, ()),
    (PortState.FAILED, PortInput.OPEN): (PortState.OPEN, (_Do.SEND_OPEN, _Do.TELL_OPENED)),
    (PortState.FAILED, PortInput.CLOSE): (PortState.FAILED, ()),
}


#: What a device says to a driver.
_DEVICE_EVENTS = frozenset(
    (
        ControlEvent.PORT_ADD,
        ControlEvent.PORT_REMOVE,
        ControlEvent.CONSOLE_PORT,
        ControlEvent.RESIZE,
        ControlEvent.PORT_OPEN,
        ControlEvent.PORT_NAME,
    )
)


class ControlDevice:
    """The device's side of the control queues.

    Args:
        max_ports: port numbers are below this.
        state: to go on from; taken over. Its ports are claimed by :meth:`add_port`, one by one.

    Attributes:
        max_ports: port numbers are below this.
        state: what it knows of the driver and of the ports; kept up to date here alone.
        outbox: what waits to be sent.
    """

    def __init__(self, max_ports: int, state: ControlState | None = None) -> None:
        if not 1 <= max_ports <= MAX_PORTS:
            raise LocalProtocolError(f"max_ports is {max_ports}, not 1..{MAX_PORTS}")
        self.max_ports = max_ports
        self.state = state or ControlState()
        # Ordered: taking the first of a plain dict costs time for each that was taken before.
        self.state.waiting = waiting = OrderedDict(self.state.waiting)
        self.outbox = Outbox(waiting)
        self._ports = self.state.ports
        self._unclaimed = set(self._ports)

    @property
    def driver_ready(self) -> bool:
        """Whether the driver sent DEVICE_READY, or spoke of a port as one that resumes does."""
        return self.state.driver_ready

    @property
    def unclaimed(self) -> bool:
        """Whether :meth:`add_port` is still to be called for ports of the state."""
        return bool(self._unclaimed)

    @property
    def ports(self) -> frozenset[int]:
        """Numbers of the ports that the device has."""
        return frozenset(self._ports)

    # what the device's owner does

    def add_port(self, nr: int, name: bytes = b"", *, console: bool = False) -> None:
        """Add a port; a driver that is ready is told.

        A port of the state that this was made with goes on as it stood there, and the driver hears
        nothing; unless it has another name or became a console or none: then the old one is removed
        first.

        Raises LocalProtocolError if the number is taken or not below ``max_ports``, or the name is
        taken, longer than MAX_NAME bytes, or holds a NUL.
        """
        if not 0 <= nr < self.max_ports:
            raise LocalProtocolError(f"port {nr}: numbers are 0..{self.max_ports - 1}")
        if nr in self._unclaimed:
            self._unclaimed.discard(nr)
            known = self._ports[nr]
            if (known.name, known.console) == (name, console):
                return
            self.remove_port(nr)
        if nr in self._ports:
            raise LocalProtocolError(f"port {nr} exists already")
        if len(name) > MAX_NAME or b"\0" in name:
            raise LocalProtocolError(
                f"port {nr}: a name is at most {MAX_NAME} bytes, none of them 0"
            )
        if name and any(port.name == name for port in self._ports.values()):
            raise LocalProtocolError(f"port {nr}: the name {name!r} is taken")
        port = self._ports[nr] = ControlPortState(nr, name, console)
        if self.driver_ready:
            self._step(port, PortInput.ANNOUNCE)

    def remove_port(self, nr: int) -> None:
        """Remove a port; a driver that has heard of it is told. Raises LocalProtocolError."""
        port = self._port(nr)
        del self._ports[nr]
        self._unclaimed.discard(nr)
        if self._has_heard_of(port):
            self.outbox.add(ControlMessage(nr, ControlEvent.PORT_REMOVE, 1))
        else:
            self.outbox.forget(nr)

    def set_host_open(self, nr: int, is_open: bool) -> None:
        """Note whether a host end is connected; a driver that has the port ready is told.

        Raises LocalProtocolError if there is no such port.
        """
        port = self._port(nr)
        if port.host_open != is_open:
            port.host_open = is_open
            if port.state in (PortState.READY, PortState.OPEN, PortState.CLOSED):
                self._send_open(port)

    def set_size(self, nr: int, cols: int, rows: int) -> None:
        """Note the size in characters; a driver that has the port ready as a console is told.

        Raises LocalProtocolError if there is no such port.
        """
        port = self._port(nr)
        size = Size(cols, rows)
        if port.size != size:
            port.size = size
            if port.console and port.state in (PortState.READY, PortState.OPEN, PortState.CLOSED):
                self.outbox.add(ControlMessage(nr, ControlEvent.RESIZE, 0, size.pack()))

    def port_state(self, nr: int) -> PortState:
        """Return what the port is to the driver. LocalProtocolError if there is no such port."""
        return self._port(nr).state

    def resume(self, known: ControlState | None = None) -> list[DeviceSideEvent]:
        """Go on with a driver that knows the ports from another process.

        It is told of all that may be news to it: what that process was about to say, ports that are
        new or gone, the host's ends.

        Args:
            known: what that process left. None, nothing: which ports its programs have open nobody
                knows then, and each is taken to be, until the driver says otherwise; it is told of
                every port again, for any of them may be new.

        Returns PeerReady, and PortOpened for every port that is open.
        """
        self.state.driver_ready = True
        events: list[DeviceSideEvent] = [PeerReady(True)]
        left = dict(known.ports) if known is not None else {}
        for message in known.waiting.values() if known is not None else ():
            if 0 <= message.id < self.max_ports and message.event in _DEVICE_EVENTS:
                self.outbox.add(message)
        for port in self._ports.values():
            before = left.pop(port.nr, None)
            if known is None:
                port.state = PortState.OPEN
                self.outbox.add(ControlMessage(port.nr, ControlEvent.PORT_ADD, 1))
            elif before is None or (before.name, before.console) != (port.name, port.console):
                if before is not None:
                    self.outbox.add(ControlMessage(port.nr, ControlEvent.PORT_REMOVE, 1))
                self._step(port, PortInput.ANNOUNCE)
                continue
            else:
                port.state = before.state
            if known is not None and port.state in (PortState.UNKNOWN, PortState.ADDED):
                self._step(port, PortInput.ANNOUNCE)  # what it was told may have been lost
                continue
            port.spoken_of = port.told_open = True
            self._send_open(port)
            if port.state is PortState.OPEN:
                events.append(PortOpened(port.nr))
        for nr in left:
            if 0 <= nr < self.max_ports:
                self.outbox.add(ControlMessage(nr, ControlEvent.PORT_REMOVE, 1))
        return events

    def reset(self) -> list[DeviceSideEvent]:
        """Forget the driver, which is gone or starts anew: it knows no port, nothing waits for it.

        Returns PortClosed for every port that was open.
        """
        self.state.driver_ready = False
        self.outbox.clear()
        closed: list[DeviceSideEvent] = [
            PortClosed(port.nr) for port in self._ports.values() if port.state is PortState.OPEN
        ]
        for port in self._ports.values():
            port.state = PortState.UNKNOWN
            port.spoken_of = port.told_open = False
        return closed

    # what the driver sends

    def receive_message(self, data: Buffer) -> list[DeviceSideEvent]:
        """Take one message from the driver. Whatever it is, everything else goes on."""
        try:
            message = ControlMessage.unpack(data)
        except RemoteProtocolError as error:
            return [Refused(str(error))]
        if message.event == ControlEvent.DEVICE_READY:
            return self._receive_device_ready(bool(message.value))
        if message.event == ControlEvent.PORT_READY:
            port_input = PortInput.READY if message.value else PortInput.NOT_READY
        elif message.event == ControlEvent.PORT_OPEN:
            port_input = PortInput.OPEN if message.value else PortInput.CLOSE
        else:
            return [Refused(f"{message}: not an event that a driver sends")]
        port = self._ports.get(message.id)
        if port is None:
            return [Refused(f"{message}: there is no such port")]
        if self.outbox.waits(port.nr, ControlEvent.PORT_REMOVE):
            return [Refused(f"{message}: about the port that had this number before")]
        # A driver that resumes says no DEVICE_READY, and yet wants to hear of ports added later.
        self.state.driver_ready = True
        port.spoken_of = True
        return self._step(port, port_input)

    def _receive_device_ready(self, ok: bool) -> list[DeviceSideEvent]:
        events: list[DeviceSideEvent] = [PeerReady(ok)]
        if not ok:
            return events + self.reset()
        self.state.driver_ready = True
        for port in self._ports.values():
            port.spoken_of = self._has_heard_of(port)
            # It may have heard that the host end is connected, and not that it no longer is.
            port.told_open |= self.outbox.waits(port.nr, ControlEvent.PORT_OPEN)
            self.outbox.forget(port.nr)
            events += self._step(port, PortInput.ANNOUNCE)
        return events

    # internals

    def _port(self, nr: int) -> ControlPortState:
        try:
            return self._ports[nr]
        except KeyError:
            raise LocalProtocolError(f"there is no port {nr}") from None

    def _has_heard_of(self, port: ControlPortState) -> bool:
        """Whether the driver can know the port: its PORT_ADD left, or the driver spoke of it."""
        left = not self.outbox.waits(port.nr, ControlEvent.PORT_ADD)
        return port.spoken_of or (port.state is not PortState.UNKNOWN and left)

    def _step(self, port: ControlPortState, port_input: PortInput) -> list[DeviceSideEvent]:
        port.state, actions = DEVICE_TRANSITIONS[port.state, port_input]
        events: list[DeviceSideEvent] = []
        for action in actions:
            match action:
                case _Do.SEND_ADD:
                    self.outbox.add(ControlMessage(port.nr, ControlEvent.PORT_ADD, 1))
                case _Do.DESCRIBE:
                    self._describe(port)
                case _Do.SEND_OPEN:
                    self._send_open(port)
                case _Do.TELL_READY:
                    events.append(PortReady(port.nr, True))
                case _Do.TELL_FAILED:
                    events.append(PortReady(port.nr, False))
                case _Do.TELL_OPENED:
                    events.append(PortOpened(port.nr))
                case _Do.TELL_CLOSED:
                    events.append(PortClosed(port.nr))
        return events

    def _describe(self, port: ControlPortState) -> None:
        """Tell a driver about a port, in QEMU's order; the size last, for it needs a console."""
        if port.console:
            self.outbox.add(ControlMessage(port.nr, ControlEvent.CONSOLE_PORT, 1))
        if port.name:
            # Without the terminating NUL (5.3.6.2.1), though QEMU sends one.
            self.outbox.add(ControlMessage(port.nr, ControlEvent.PORT_NAME, 1, port.name))
        self._send_open(port)
        if port.console and port.size is not None:
            self.outbox.add(ControlMessage(port.nr, ControlEvent.RESIZE, 0, port.size.pack()))

    def _send_open(self, port: ControlPortState) -> None:
        if port.host_open or port.told_open:
            port.told_open = port.host_open
            self.outbox.add(ControlMessage(port.nr, ControlEvent.PORT_OPEN, int(port.host_open)))
