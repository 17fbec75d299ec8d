"""A port: where the guest's side, the host's end and two queues meet."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import os
from collections.abc import Callable
from typing import Protocol

from vring import Backlog, Pump, RingError
from vring_serial.callbacks import tell
from vring_serial.chardev.base import Chardev, DescriptorEnd, End, ProtocolEnd
from vring_serial.device.console.direction import Direction, Sides
from vring_serial.device.console.events import DeviceEvent, OutputDropped
from vring_serial.device.console.port_transport import PortTransport
from vring_serial.device.console.receive import Receive
from vring_serial.device.console.state import DevicePortState, SessionState
from vring_serial.device.console.traffic import Traffic
from vring_serial.device.console.transmit import Transmit
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.proto.control import PortState
from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger(__name__)

#: Seconds until a queue is tried again after a lack of descriptors or memory; doubled each time, up
#: to RETRY_MOST.
RETRY_SECONDS = 0.5
RETRY_MOST = 8.0
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)


class PortOwner(Protocol):
    """What a port needs of the device that it belongs to."""

    @property
    def pump(self) -> Pump:
        """Return the pump that moves bytes for descriptor ends."""
        ...

    def poll_control(self) -> None:
        """Act on control messages that the driver made available, without waiting for a kick."""

    def host_end_changed(self, port: Port, is_open: bool) -> None:
        """Tell the guest that the port's host end was connected or disconnected."""

    def residue_changed(self) -> None:
        """Have it written down what a host end is owed."""

    def residue_record(self, port: Port) -> memoryview | None:
        """Return where it is recorded what the host end took of a residue; None: there is none."""

    def port_resized(self, port: Port) -> None:
        """Tell the guest that the port's terminal has another size."""

    def port_queue_broken(self, port: Port, is_transmit: bool, error: RingError) -> None:
        """Ask for a reset: the driver broke one of the port's queues."""

    def emit(self, event: DeviceEvent) -> None:
        """Log the event and pass it to the listener."""


class Port:
    """One port of a device.

    Which bytes move depends on both sides: see ``transmit`` and ``receive``. After every change of
    either side, :meth:`_update` compares what should run with what does.

    Args:
        nr: port number.
        name: what the guest calls it; must be unique in the device, and may be empty.
        chardev: the host end; the port becomes its user when it is added to a controller.
        console: the guest is to make a console of it.
        state: to go on from; taken over.
        backlog: a console's, for what waits for a descriptor and outlives this process, or None.

    Attributes:
        state: kept up to date by the port and its directions; see :meth:`settle`.
        host_connects: how often a host end connected.
    """

    def __init__(
        self,
        nr: int,
        name: bytes | str,
        chardev: Chardev,
        *,
        console: bool = False,
        state: DevicePortState | None = None,
        backlog: Backlog | None = None,
    ) -> None:
        self.nr = nr
        self.name = name.encode() if isinstance(name, str) else name
        self.chardev = chardev
        self.host_connects = 0
        self._owner: PortOwner | None = None
        self._console = console
        self._backlog = backlog
        self._take(state or DevicePortState())
        self._still = False  # inside the device's settled, or after it was saved
        self._inexact = False  # and that was logged
        self._retry: asyncio.TimerHandle | None = None
        self._retry_delay = 0.0  # of the last; 0 after a success
        self._log = RateLimitedLog(log)  # a peer can come and break in a loop

    def _take(self, state: DevicePortState) -> None:
        self.state = state
        self._sides = Sides(self._console, state, log=self.chardev.log)
        self._transmit = Transmit(self._sides, self, self._backlog)
        self._receive = Receive(self._sides, self)

    def __repr__(self) -> str:
        return f"<Port {self.label}>"

    @property
    def console(self) -> bool:
        """Return whether the guest is to make a console of it."""
        return self._sides.console

    @property
    def label(self) -> str:
        """Return number and name, for logs."""
        name = self.name.decode(errors="backslashreplace")
        return f"port {self.nr} ({name})" if name else f"port {self.nr}"

    @property
    def guest_open(self) -> bool:
        """Return whether the guest takes bytes: it has the port open, or has a console on it."""
        return self._sides.guest_open

    @property
    def guest_ready(self) -> bool:
        """Return whether the guest's driver can use the port."""
        return self._sides.guest_ready

    @property
    def size(self) -> tuple[int, int] | None:
        """Return columns and rows of the terminal behind the host end, if that is one."""
        return self.state.size

    @property
    def host_open(self) -> bool:
        """Return whether a host end is connected."""
        return self._sides.end is not None

    @property
    def traffic(self) -> tuple[Traffic, Traffic]:
        """Return what went from the guest to the host end, and back."""
        return self._transmit.traffic, self._receive.traffic

    # --- for the controller

    def bind(self, owner: PortOwner) -> None:
        """Become a device's port and the chardev's user; LocalProtocolError if it has one."""
        self.chardev.attach(self)
        self._owner = owner
        self._transmit.keep_with(owner.residue_record(self))
        if self.guest_open:  # by the state that the port was made with
            self._tell_guest_opened()

    def change_chardev(self, chardev: Chardev) -> None:
        """Leave the host end for another one, which may be connected already.

        Raises LocalProtocolError if it has a user.
        """
        old = self.chardev
        chardev.attach(self)
        old.detach()
        self.chardev = chardev
        self._transmit.stop()  # what goes to its log alone
        self._sides.log = chardev.log
        self._update()
        if self.guest_open:
            self._tell_guest_opened()
        if chardev.end is not None:
            self.end_opened(chardev.end)

    def take_state(self, state: DevicePortState) -> None:
        """Go on from a state instead of one's own, before the host end is started or while still.

        The host end and the size of its terminal stay, a connected protocol does not: the next one
        goes on from the state.
        """
        was_open, end = self.guest_open, self._sides.end
        if self._sides.session is not None:
            self._sides.session.disconnect()
        if residue := self.state.chain.residue:
            self.output_dropped(len(residue))
        if end is not None:
            state.size, state.session_over = self.state.size, False
        state.chain.number, state.chain.gone, state.chain.at = self.state.chain.number + 1, 0, None
        self._take(state)
        if self._owner is not None:
            self._transmit.keep_with(self._owner.residue_record(self))
        self._sides.end = end
        if self.guest_open != was_open:
            self._tell_guest_opened()

    def inherit(self, residue: bytes) -> None:
        """Owe the host end, before all else, what another process owed to its own."""
        self._transmit.owe(residue + self.state.chain.residue)
        self._update()

    def drop_state(self) -> None:
        """Forget what the host end is owed, and all else, while still: it goes on elsewhere."""
        self.state.chain.residue = b""
        if self._backlog is not None:
            self._backlog.replace(b"")
        self.take_state(DevicePortState())

    def release(self) -> None:
        """Leave the device: nothing of the port runs any more."""
        self._transmit.stop_queue()
        self._receive.stop_queue()
        self._cancel_retry()
        if self._sides.session is not None:
            self._sides.session.disconnect()
        self._update()
        self.report_residue()
        if self._backlog is not None:  # whoever has the host end next owes it nothing
            self._backlog.replace(b"")
        self._owner = None

    def report_residue(self) -> None:
        """Tell, as the device stops, if the guest's last bytes found no host end to take them."""
        self._transmit.stop_residue()
        if residue := self.state.chain.residue:
            self.output_dropped(len(residue))

    def set_guest(self, state: PortState, *, single: bool = False) -> None:
        """Take over what the guest's side is now.

        Args:
            state: what the driver has said of the port.
            single: the driver did not accept MULTIPORT, and this is the one port: a console, always
                open, and unannounced.
        """
        sides = self._sides
        was_open = sides.guest_open
        closed = self.state.guest is PortState.OPEN and state is PortState.CLOSED
        self.state.guest = state
        self.state.single = single
        if sides.guest_open != was_open:
            self.state.session_over = False
        if sides.session is not None:
            # One that is still ending does not wait for chains of a driver that is gone.
            orphaned = sides.session.ending and not sides.guest_ready
            if orphaned or (was_open and not sides.guest_open):
                self._end_session(closed)
        self._update()
        if sides.guest_open != was_open:
            self._tell_guest_opened()

    def _tell_guest_opened(self) -> None:
        what = f"{self.label}: guest_opened"
        tell(self._log, what, self.chardev.guest_opened, self.guest_open)

    def settle(self) -> None:
        """Hold both directions until :meth:`go_on`: ``state`` is exact and nothing in flight."""
        self._still = True
        self._transmit.stop()
        self._transmit.stop_residue()
        self._receive.stop()

    @property
    def recorded(self) -> DevicePortState:
        """The state as a successor of this process is to find it: connections begin anew."""
        chain = self.state.chain
        if self._transmit.keeps_residue:
            chain = dataclasses.replace(chain, residue=b"")
        return dataclasses.replace(self.state, chain=chain, session=None, session_over=False)

    def hand_over(self) -> None:
        """Have ``state`` say what no record of the pump says, for as long as this process lives."""
        if self._sides.never_waits:
            self.settle()
        else:
            self._still = True
            self._transmit.stop_residue()

    def go_on(self) -> None:
        """Serve the queues again after :meth:`settle`."""
        self._still = False
        self._update()

    def start_queue(self, is_transmit: bool, running: RunningQueue) -> None:
        """Serve a queue of the port. Raises OSError if its kick cannot be watched."""
        self._direction(is_transmit).start_queue(running)
        self._update()
        self._deliver_late()

    def stop_queue(self, is_transmit: bool) -> None:
        """Leave a queue alone: nothing is in flight when this returns."""
        self._direction(is_transmit).stop_queue()
        if self._transmit.queue is None and self._receive.queue is None:
            self._cancel_retry()
        self._update()

    def forget_driver(self) -> None:
        """Expect rings that start anew: a chain that was half delivered is not in them."""
        self.state.chain.delivered = 0
        self.state.chain.at = None

    def emergency_write(self, char: int) -> None:
        """Pass on a character that the guest wrote to the configuration space; it may be lost."""
        end = self._sides.end
        if self._sides.log is not None:
            self._sides.log.write(bytes([char]))
        if isinstance(end, DescriptorEnd) and end.write_fd >= 0:
            try:
                os.write(end.write_fd, bytes([char]))
            except OSError as error:
                log.debug("%s: emergency write: %s", self.label, error)
        elif self._sides.session is not None:
            self._sides.session.emergency(bytes([char]))

    # --- ChardevUser

    def end_opened(self, end: End) -> None:
        """Serve a host end that has connected, and tell the guest.

        A protocol is given at once what the guest wrote before it closed, with nobody there.
        """
        self.host_connects += 1
        self._sides.end = end
        self._transmit.end_opened()
        self._receive.end_opened()
        self.state.session_over = False
        if self._owner is not None:
            self._owner.host_end_changed(self, True)
            self._update()
            self._deliver_late()

    def end_replaced(self, end: DescriptorEnd, between: Callable[[], None]) -> None:
        """Serve the open end's new descriptors; ``between``: the old ones are no longer used."""
        self._transmit.stop()
        self._transmit.stop_residue()
        self._receive.stop()
        between()
        self._sides.end = end
        self._update()

    def end_closed(self) -> None:
        """Leave the host end, and tell the guest; on return its descriptors are no longer used."""
        self._sides.end = None
        if self._sides.session is not None:
            self._end_session(False)
        self._update()
        if self._owner is not None:
            self._owner.host_end_changed(self, False)

    def end_resized(self, cols: int, rows: int) -> None:
        """Note the size of the terminal, in characters, and tell the guest."""
        self.state.size = (cols, rows)
        if self._owner is not None:
            self._owner.port_resized(self)

    # --- DirectionUser

    @property
    def pump(self) -> Pump:
        """Return the device's pump. The port must belong to a controller."""
        return self._require_owner().pump

    def poll_control(self) -> None:
        """Let the device act on control messages that the driver made available."""
        self._require_owner().poll_control()

    def end_is_over(self, reason: OSError | None) -> None:
        """Tell the chardev that its descriptor gave end of file (None) or failed; log a failure."""
        if reason is not None:
            text = f"{self.label}: {self.chardev.description}: {reason.strerror}"
            self._log.log(logging.INFO, "%s", text)
        self._update()
        self.chardev.peer_gone(reason)

    def end_is_inexact(self) -> None:
        """Log, once, that a successor of this process cannot know how far the end's bytes came."""
        if not self._inexact:
            self._inexact = True
            text = "bytes on their way may be lost or doubled when a worker dies"
            log.warning("%s: %s: splice is refused: %s", self.label, self.chardev.description, text)

    def queue_broken(self, direction: Direction, error: RingError) -> None:
        """Update both directions, and let the device ask for a reset."""
        self._update()
        self._require_owner().port_queue_broken(self, direction.is_transmit, error)

    def residue_changed(self) -> None:
        """Have the device write down what the host end is owed."""
        self._require_owner().residue_changed()

    def residue_written(self) -> None:
        """Have the device write down that the host end is owed nothing, and serve the queue."""
        self._require_owner().residue_changed()
        self._update()

    def output_dropped(self, count: int) -> None:
        """Emit OutputDropped; ``count`` is the total of bytes dropped on this port so far."""
        self._require_owner().emit(OutputDropped(self.nr, count))

    # --- what should run

    def _direction(self, is_transmit: bool) -> Direction:
        return self._transmit if is_transmit else self._receive

    def _update(self) -> None:
        if self._still:
            return
        self._update_session()
        for direction in (self._transmit, self._receive):
            try:
                direction.update()
            except OSError as error:
                self._put_off(error)

    def _put_off(self, error: OSError) -> None:
        """Retry later after a lack of descriptors or memory; raise any other ``error``."""
        if error.errno not in _SHORTAGES:
            raise error
        if not self._retry_delay:  # log it once until the next success
            self._log.warning("%s: it has to wait: %s", self.label, os.strerror(error.errno))
        if self._retry is None:
            self._retry_delay = min(2 * self._retry_delay, RETRY_MOST) or RETRY_SECONDS
            loop = asyncio.get_running_loop()
            self._retry = loop.call_later(self._retry_delay, self._try_again)

    def _try_again(self) -> None:
        self._cancel_retry()
        self._update()
        if self._retry is None:
            self._retry_delay = 0.0

    def _cancel_retry(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    # --- host ends that are Python code

    def _update_session(self) -> None:
        """Connect a protocol: for a console as soon as there is one, else when the guest opens."""
        sides = self._sides
        if sides.session is not None or not isinstance(sides.end, ProtocolEnd):
            return
        if not self.state.session_over and (sides.never_waits or sides.guest_open):
            self._connect(sides.end)

    def _deliver_late(self) -> None:
        """Connect a protocol for what the guest wrote before it closed, with nobody there."""
        sides, running = self._sides, self._transmit.queue
        if (
            isinstance(sides.end, ProtocolEnd)
            and sides.session is None
            and not self.state.session_over
            and self.state.guest is PortState.CLOSED
            and running is not None
            and running.queue.available()
        ):
            self._connect(sides.end)
            self._update()
            if sides.session is not None:
                sides.session.guest_closed()

    def _connect(self, end: ProtocolEnd) -> None:
        try:
            protocol = end.factory()
        except Exception as error:
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"{self.label}: no protocol for its host end", "exception": error}
            )
            self.state.session_over = True
            return
        if self._sides.end is not end or self._sides.session is not None:
            return  # the factory closed its own end
        if self.state.session is None:
            self.state.session = SessionState()
        self._sides.session = PortTransport(
            protocol,
            lossy=self._sides.never_waits,
            extra={"port": self.nr, "name": self.name, "console": self.console},
            on_lost=self._session_lost,
            on_broken=lambda is_transmit, error: self._direction(is_transmit).break_queue(error),
            on_dropped=self.output_dropped,
            state=self.state.session,
            log=self._sides.log,
        )

    def _end_session(self, guest_closed: bool) -> None:
        session = self._sides.session
        assert session is not None
        if guest_closed:
            session.guest_closed()
        elif self._sides.end is None or not self._sides.never_waits:
            session.disconnect()

    def _session_lost(self, by_protocol: bool) -> None:
        """Take the queues back from a connection that is over."""
        self._transmit.stop()
        self._receive.stop()
        if self._sides.session is not None:
            self._transmit.count_session(self._sides.session)
            self._receive.count_session(self._sides.session)
        self._sides.session = self.state.session = None
        self.state.session_over = by_protocol
        if by_protocol:
            self._update()
            self.chardev.peer_gone()
        elif self._sides.end is not None:
            self._update()

    def _require_owner(self) -> PortOwner:
        assert self._owner is not None, "the port belongs to no controller"
        return self._owner
