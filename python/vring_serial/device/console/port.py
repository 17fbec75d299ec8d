"""A port: where the guest's side, the host's end and two queues meet."""

from __future__ import annotations

import asyncio
import enum
import errno
import logging
import os
from typing import Protocol

from vring import Flow, FlowEvent, Pump, RingError
from vring_serial.callbacks import tell
from vring_serial.chardev.base import Chardev, DescriptorEnd, End, ProtocolEnd
from vring_serial.device.console.events import DeviceEvent, OutputDropped
from vring_serial.device.console.port_transport import PortTransport
from vring_serial.device.console.residue import ResidueWriter
from vring_serial.device.served import Discarder
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
        """Moves bytes for descriptor ends."""
        ...

    def poll_control(self) -> None:
        """Act on control messages that the driver made available, without waiting for a kick."""

    def host_end_changed(self, port: Port, is_open: bool) -> None:
        """The port's host end was connected or disconnected."""

    def port_resized(self, port: Port) -> None:
        """The port's terminal has another size."""

    def port_queue_broken(self, port: Port, is_transmit: bool, error: RingError) -> None:
        """The driver broke one of the port's queues."""

    def emit(self, event: DeviceEvent) -> None:
        """Tell what happened."""


class _Mode(enum.Enum):
    """How one direction of a port is served."""

    IDLE = "not at all: the driver's buffers stay its own"
    DISCARD = "completed unread"
    PUMP = "by a flow of the pump, to or from descriptors"
    TRANSPORT = "by the transport that a protocol is connected to"


class Port:
    """One port of a device.

    Which bytes move depends on both sides; after every change of either, :meth:`_update` compares
    what should run with what does.

    Guest to host: nothing before the driver can use the port; then discarded until the guest opens
    the port for the first time, so that nobody reads what was meant for nobody; then delivered,
    also what was written before the guest closed it. Without a host end nothing is popped, but by
    a console, which must never hold its driver up.

    Host to guest: while the guest has the port open, and nothing is read from the host otherwise.

    Args:
        nr: port number.
        name: what the guest calls it; must be unique in the device, and may be empty.
        chardev: the host end; the port becomes its user when it is added to a controller.
        console: the guest is to make a console of it.

    Attributes:
        single: the driver did not accept MULTIPORT, and this is the one port: a console, always
            open, and unannounced.
    """

    def __init__(
        self, nr: int, name: bytes | str, chardev: Chardev, *, console: bool = False
    ) -> None:
        self.nr = nr
        self.name = name.encode() if isinstance(name, str) else name
        self.chardev = chardev
        self.console = console
        self.single = False
        self.size: tuple[int, int] | None = None
        self._owner: PortOwner | None = None
        self._state = PortState.UNKNOWN
        self._end: End | None = None
        self._write_failed = False
        self._read_ended = False
        self._queues: dict[bool, RunningQueue] = {}  # by "is the transmitq"
        self._broken: set[bool] = set()
        self._transmit_mode = _Mode.IDLE
        self._receive_mode = _Mode.IDLE
        self._transmit_flow: Flow | None = None
        self._receive_flow: Flow | None = None
        self._discarder: Discarder | None = None
        self._transport: PortTransport | None = None
        self._session_over = False  # the protocol left, and the guest still has the port open
        self._residue = b""  # taken from the guest, accepted by no host end yet
        self._residue_writer: ResidueWriter | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._retry_delay = 0.0  # of the last; 0 after a success
        self._said = RateLimitedLog(log)  # a peer can come and break in a loop
        self._delivered = 0  # bytes of the next chain that a protocol has got already

    def __repr__(self) -> str:
        return f"<Port {self.label}>"

    @property
    def label(self) -> str:
        """Number and name, for logs."""
        name = self.name.decode(errors="backslashreplace")
        return f"port {self.nr} ({name})" if name else f"port {self.nr}"

    @property
    def guest_open(self) -> bool:
        """Whether the guest takes bytes: it has the port open, or has a console on it."""
        if self.console or self.single:
            return self.guest_ready
        return self._state is PortState.OPEN

    @property
    def guest_ready(self) -> bool:
        """Whether the guest's driver can use the port."""
        return self.single or self._state in (PortState.READY, PortState.OPEN, PortState.CLOSED)

    @property
    def host_open(self) -> bool:
        """Whether a host end is connected."""
        return self._end is not None

    # --- for the controller

    def bind(self, owner: PortOwner) -> None:
        """Become a device's port and the chardev's user; LocalProtocolError if it has one."""
        self.chardev.attach(self)
        self._owner = owner

    def release(self) -> None:
        """Leave the device: nothing of the port runs any more."""
        self._queues.clear()
        self._cancel_retry()
        if self._transport is not None:
            self._transport.disconnect()
        self._update()
        self.report_residue()
        self._owner = None

    def report_residue(self) -> None:
        """The device stops: say so if the guest's last bytes found no host end to take them."""
        self._stop_residue_writer()
        if self._residue:
            self._dropped(len(self._residue))

    def set_guest(self, state: PortState, *, single: bool = False) -> None:
        """The guest's side changed."""
        was_open = self.guest_open
        closed = self._state is PortState.OPEN and state is PortState.CLOSED
        self._state = state
        self.single = single
        if self.guest_open != was_open:
            self._session_over = False
        if self._transport is not None:
            # One that is still ending does not wait for chains of a driver that is gone.
            orphaned = self._transport.ending and not self.guest_ready
            if orphaned or (was_open and not self.guest_open):
                self._end_session(closed)
        self._update()
        if self.guest_open != was_open:
            what = f"{self.label}: guest_opened"
            tell(self._said, what, self.chardev.guest_opened, self.guest_open)

    def start_queue(self, is_transmit: bool, running: RunningQueue) -> None:
        """A queue of the port runs. Raises OSError if its kick cannot be watched."""
        self._queues[is_transmit] = running
        self._update()
        self._deliver_late()

    def stop_queue(self, is_transmit: bool) -> None:
        """Leave a queue alone: nothing is in flight when this returns."""
        self._queues.pop(is_transmit, None)
        if not self._queues:
            self._cancel_retry()
        self._broken.discard(is_transmit)
        self._update()

    def forget_driver(self) -> None:
        """The rings start anew: a chain that was half delivered is no longer in them."""
        self._delivered = 0

    def emergency_write(self, char: int) -> None:
        """A character that the guest wrote to the configuration space; may be dropped."""
        if isinstance(self._end, DescriptorEnd) and self._end.write_fd >= 0:
            try:
                os.write(self._end.write_fd, bytes([char]))
            except OSError as error:
                log.debug("%s: emergency write: %s", self.label, error)
        elif self._transport is not None:
            self._transport.emergency(bytes([char]))

    # --- ChardevUser

    def end_opened(self, end: End) -> None:
        self._end = end
        self._write_failed = self._read_ended = self._session_over = False
        if self._owner is not None:
            self._owner.host_end_changed(self, True)
            self._update()
            self._deliver_late()

    def end_replaced(self, end: DescriptorEnd) -> None:
        self._stop_transmit()
        self._stop_receive()
        self._stop_residue_writer()
        self._end = end
        self._update()

    def end_closed(self) -> None:
        self._end = None
        if self._transport is not None:
            self._end_session(False)
        self._update()
        if self._owner is not None:
            self._owner.host_end_changed(self, False)

    def end_resized(self, cols: int, rows: int) -> None:
        self.size = (cols, rows)
        if self._owner is not None:
            self._owner.port_resized(self)

    # --- what should run

    def _update(self) -> None:
        self._update_transport()
        transmit = self._wanted_transmit()
        if transmit is not self._transmit_mode:
            self._stop_transmit()
            try:
                self._start_transmit(transmit)
            except OSError as error:
                self._transmit_mode = _Mode.IDLE
                self._put_off(error)
        receive = self._wanted_receive()
        if receive is not self._receive_mode:
            self._stop_receive()
            try:
                self._start_receive(receive)
            except OSError as error:
                self._receive_mode = _Mode.IDLE
                self._put_off(error)
        self._update_residue()

    def _put_off(self, error: OSError) -> None:
        """Retry later after a lack of descriptors or memory; raise any other ``error``."""
        if error.errno not in _SHORTAGES:
            raise error
        if not self._retry_delay:  # log it once until the next success
            self._said.warning("%s: it has to wait: %s", self.label, os.strerror(error.errno))
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

    def _wanted_transmit(self) -> _Mode:
        if True not in self._queues or True in self._broken or not self.guest_ready:
            return _Mode.IDLE
        console = self.console or self.single
        if not console and self._state is PortState.READY:
            return _Mode.DISCARD
        if self._end is None or self._write_failed:
            return _Mode.DISCARD if console else _Mode.IDLE
        if isinstance(self._end, DescriptorEnd):
            return _Mode.PUMP if self._end.write_fd >= 0 else _Mode.DISCARD
        if self._transport is None:
            return _Mode.DISCARD if console else _Mode.IDLE
        return _Mode.TRANSPORT

    def _wanted_receive(self) -> _Mode:
        if False not in self._queues or False in self._broken or not self.guest_open:
            return _Mode.IDLE
        if isinstance(self._end, DescriptorEnd):
            return _Mode.IDLE if self._end.read_fd < 0 or self._read_ended else _Mode.PUMP
        if self._transport is None or self._transport.ending:
            return _Mode.IDLE
        return _Mode.TRANSPORT

    # --- guest to host

    def _start_transmit(self, mode: _Mode) -> None:
        self._transmit_mode = mode
        if mode is _Mode.IDLE:
            return
        running = self._queues[True]
        if mode is _Mode.DISCARD:
            self._delivered = 0
            self._discarder = Discarder(
                running, lambda error: self._queue_broken(True, error), self._reconsider
            )
        elif mode is _Mode.PUMP:
            assert isinstance(self._end, DescriptorEnd)
            self._stop_residue_writer()
            self._transmit_flow = self._require_owner().pump.guest_to_host(
                running.queue,
                write_fd=self._end.write_fd,
                kick_fd=running.kick_fd,
                call_fd=running.call_fd,
                on_event=self._transmit_event,
                lossy=self.console or self.single,
                residue=self._residue,
            )
            self._residue = b""
        else:
            assert self._transport is not None
            self._transport.start_transmitq(running, self._delivered)
            self._delivered = 0

    def _stop_transmit(self) -> None:
        mode, self._transmit_mode = self._transmit_mode, _Mode.IDLE
        if self._discarder is not None:
            self._discarder.stop()
            self._discarder = None
        if self._transmit_flow is not None:
            flow, self._transmit_flow = self._transmit_flow, None
            self._residue = flow.detach()
        if mode is _Mode.TRANSPORT and self._transport is not None:
            self._delivered = self._transport.stop_transmitq()

    def _reconsider(self) -> None:
        """Before bytes are discarded: has the driver opened the port meanwhile?

        Control messages and bytes come on queues of their own; a driver that opens the port and
        writes at once is known to have opened it only if its control queue is looked at afterwards.
        """
        if not (self.console or self.single):
            self._require_owner().poll_control()

    def _transmit_event(self, event: FlowEvent, detail: int | RingError | None) -> None:
        if isinstance(detail, RingError):
            self._queue_broken(True, detail)
        elif event == FlowEvent.OVERFLOW:
            self._dropped(detail or 0)
        else:
            self._write_failed = True
            self._peer_gone(detail)

    # --- host to guest

    def _start_receive(self, mode: _Mode) -> None:
        self._receive_mode = mode
        if mode is _Mode.IDLE:
            return
        running = self._queues[False]
        if mode is _Mode.PUMP:
            assert isinstance(self._end, DescriptorEnd)
            self._receive_flow = self._require_owner().pump.host_to_guest(
                running.queue,
                read_fd=self._end.read_fd,
                kick_fd=running.kick_fd,
                call_fd=running.call_fd,
                on_event=self._receive_event,
            )
        else:
            assert self._transport is not None
            self._transport.start_receiveq(running)

    def _stop_receive(self) -> None:
        self._receive_mode = _Mode.IDLE
        if self._receive_flow is not None:
            flow, self._receive_flow = self._receive_flow, None
            flow.detach()
        if self._transport is not None:
            self._transport.stop_receiveq()

    def _receive_event(self, event: FlowEvent, detail: int | RingError | None) -> None:
        if isinstance(detail, RingError):
            self._queue_broken(False, detail)
        else:
            self._read_ended = True
            self._peer_gone(detail)

    # --- host ends that are descriptors

    def _peer_gone(self, errno: int | None) -> None:
        reason = OSError(errno, os.strerror(errno)) if errno else None
        if reason is not None:
            self._say_failed(reason)
        self._update()
        self.chardev.peer_gone(reason)

    def _update_residue(self) -> None:
        """Bytes of the guest's that wait for the host go on also while no flow takes them along."""
        end = self._end
        if (
            self._transmit_mode is _Mode.PUMP
            or not isinstance(end, DescriptorEnd)
            or end.write_fd < 0
            or self._write_failed
        ):
            self._stop_residue_writer()
        elif self._residue and self._residue_writer is None:
            residue, self._residue = self._residue, b""
            self._residue_writer = ResidueWriter(end.write_fd, residue, self._residue_written)

    def _stop_residue_writer(self) -> None:
        if self._residue_writer is not None:
            writer, self._residue_writer = self._residue_writer, None
            self._residue = writer.stop()

    def _residue_written(self, error: OSError | None) -> None:
        self._stop_residue_writer()
        if error is not None:
            self._write_failed = True
            self._say_failed(error)
            self._update()
            self.chardev.peer_gone(error)

    # --- host ends that are Python code

    def _update_transport(self) -> None:
        """Connect a protocol: for a console as soon as there is one, else when the guest opens."""
        if self._transport is not None or not isinstance(self._end, ProtocolEnd):
            return
        if not self._session_over and (self.console or self.single or self.guest_open):
            self._connect(self._end)

    def _deliver_late(self) -> None:
        """What the guest wrote before it closed, with nobody there, is worth a connection."""
        end, running = self._end, self._queues.get(True)
        if (
            isinstance(end, ProtocolEnd)
            and self._transport is None
            and not self._session_over
            and self._state is PortState.CLOSED
            and running is not None
            and running.queue.available()
        ):
            self._connect(end)
            self._update()
            if self._transport is not None:
                self._transport.guest_closed()

    def _connect(self, end: ProtocolEnd) -> None:
        try:
            protocol = end.factory()
        except Exception as error:
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"{self.label}: no protocol for its host end", "exception": error}
            )
            self._session_over = True
            return
        if self._end is not end or self._transport is not None:
            return  # the factory closed its own end
        self._transport = PortTransport(
            protocol,
            lossy=self.console or self.single,
            extra={"port": self.nr, "name": self.name, "console": self.console},
            on_lost=self._session_lost,
            on_broken=self._queue_broken,
            on_dropped=self._dropped,
        )

    def _end_session(self, guest_closed: bool) -> None:
        transport = self._transport
        assert transport is not None
        if guest_closed:
            transport.guest_closed()
        elif self._end is None or not (self.console or self.single):
            transport.disconnect()

    def _session_lost(self, by_protocol: bool) -> None:
        """The transport's connection is over; its queues are taken back here."""
        self._stop_transmit()
        self._stop_receive()
        self._transport = None
        self._session_over = by_protocol
        if by_protocol:
            self._update()
            self.chardev.peer_gone()
        elif self._end is not None:
            self._update()

    # --- both

    def _say_failed(self, error: OSError) -> None:
        text = f"{self.label}: {self.chardev.description}: {error.strerror}"
        self._said.log(logging.INFO, "%s", text)

    def _queue_broken(self, is_transmit: bool, error: RingError) -> None:
        self._broken.add(is_transmit)
        self._update()
        self._require_owner().port_queue_broken(self, is_transmit, error)

    def _dropped(self, count: int) -> None:
        self._require_owner().emit(OutputDropped(self.nr, count))

    def _require_owner(self) -> PortOwner:
        assert self._owner is not None, "the port belongs to no controller"
        return self._owner
