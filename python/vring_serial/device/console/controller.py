"""The virtio-serial controller: one console device with its ports, queues and configuration."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from vring import Pump, RingError
from vring_serial.callbacks import Listener, tell
from vring_serial.chardev.base import Chardev
from vring_serial.device.console import config_space as space
from vring_serial.device.console import events as ev
from vring_serial.device.console.control_queues import ControlQueues
from vring_serial.device.console.event_log import EventLog
from vring_serial.device.console.events import DeviceEvent, Side
from vring_serial.device.console.loop_pump import LoopPump
from vring_serial.device.console.port import Port
from vring_serial.device.console.recorder import Recorder
from vring_serial.device.console.state import (
    CONSOLE,
    ConsoleState,
    ControllerState,
    check_console,
)
from vring_serial.device.served import Discarder
from vring_serial.device.virtqueue import RunningQueue, is_fresh
from vring_serial.errors import LocalProtocolError, RemoteProtocolError
from vring_serial.keeping import Keeping
from vring_serial.lifetime import Starting
from vring_serial.proto import control as ctl
from vring_serial.proto.console import (
    CONTROL_TRANSMITQ,
    DEVICE_ID,
    ConsoleFeature,
    port_of_queue,
    queue_count,
    queues_of_port,
)
from vring_serial.proto.virtio import QUEUE_SIZE_MAX, Status, feature_names


class Controller(Starting):
    """A console device (virtio 1.3, 5.3), for any transport: see ``device.base.VirtioDevice``.

    All methods are for the event loop's thread.

    Args:
        name: for logs.
        max_ports: port numbers are below this; 2*(max_ports+1) queues.
        pump: moves bytes for ports whose host ends are descriptors; whoever made it has the loop
            watch its ``event_fd``. Without one, the controller makes its own at :meth:`start`.
        features: offered feature bits.
        queue_size_max: largest queue, in descriptors.
        state: to go on from; taken over. Its ports are to be added, each with its own state, before
            a queue starts.
        keeping: where the state is written down for a successor of this process, or None.

    Attributes:
        state: kept up to date here alone; see :meth:`settled`.
        on_event: called with everything that happens, after it was logged. One listener: setting
            another raises LocalProtocolError until it is None again.
        started: between :meth:`start` and :meth:`aclose`.
        on_config_change, on_needs_reset: see VirtioDevice.
    """

    device_id = DEVICE_ID
    config_size = space.SIZE
    on_event = Listener[Callable[[DeviceEvent], object]]()
    on_config_change = Listener[Callable[[], None]]()
    on_needs_reset = Listener[Callable[[RingError], None]]()

    def __init__(
        self,
        *,
        name: str = "virtio-serial0",
        max_ports: int = 31,
        pump: Pump | None = None,
        features: int = space.DEFAULT_FEATURES,
        queue_size_max: int = QUEUE_SIZE_MAX,
        state: ControllerState | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        self.name = name
        self.max_ports = max_ports
        self.device_features = int(features)
        self.num_queues = queue_count(max_ports, bool(features & ConsoleFeature.MULTIPORT))
        self.queue_size_max = queue_size_max
        self._take(state or ControllerState())
        self._ports: dict[int, Port] = {}
        self._pump = pump
        self._own_pump: LoopPump | None = None
        self.started = False
        self._queues: dict[int, RunningQueue] = {}
        self._discarder: Discarder | None = None  # of single-port mode without a port 0
        self._log = EventLog()
        self._recorder = Recorder(max_ports, keeping)

    def _take(self, state: ControllerState) -> None:
        self.state = state
        self._control = control = ctl.ControlDevice(self.max_ports, state.control)
        self._control_queues = ControlQueues(control, self._control_events, self._queue_broken)

    # --- for those who build it

    @property
    def ports(self) -> Mapping[int, Port]:
        """The ports by number."""
        return MappingProxyType(self._ports)

    @property
    def pump(self) -> Pump:
        """The pump that ports use. Raises LocalProtocolError before :meth:`start` without one."""
        if self._pump is not None:
            return self._pump
        if self._own_pump is None:
            raise LocalProtocolError(f"{self.name} has no pump: it was not started")
        return self._own_pump.pump

    def add_port(self, port: Port) -> None:
        """Add a port; a guest that runs is told.

        Its chardev is started by :meth:`start`, or was started before; for a port added later, see
        :meth:`plug_port`.

        Raises:
            LocalProtocolError: the number is taken or not below ``max_ports``; the name is taken or
                cannot be one; the chardev has a user already.
        """
        self._control.add_port(port.nr, port.name, console=port.console)
        try:
            port.bind(self)
        except LocalProtocolError:
            self._control.remove_port(port.nr)
            raise
        self._ports[port.nr] = port
        if self.state.still:
            port.settle()
        self.emit(ev.PortAdded(port.nr, port.name.decode(errors="backslashreplace")))
        self.port_resized(port)
        self._console_changed()
        self._set_guest(port)
        if port.chardev.end is not None:  # it was started before
            port.end_opened(port.chardev.end)
        self._serve_unclaimed()
        for is_transmit, index in enumerate(queues_of_port(port.nr)):
            if index in self._queues:
                port.start_queue(bool(is_transmit), self._queues[index])
        self._control_queues.flush()
        if self.started:
            self._record()

    async def plug_port(self, port: Port) -> None:
        """Add a port while the device is started, with its chardev.

        Raises LocalProtocolError as :meth:`add_port`, ResourceError as the chardev; the port is not
        there then.
        """
        self.add_port(port)
        try:
            await port.chardev.start_with_log()
        except BaseException:
            await self.remove_port(port.nr)
            raise
        if not self.state.still:
            port.go_on()  # there is a log now

    async def change_chardev(self, nr: int, chardev: Chardev) -> None:
        """Give a port another host end, already started, and stop the one that it had.

        Raises LocalProtocolError if there is no such port, or the chardev has a user.
        """
        port = self._known(nr)
        old = port.chardev
        port.change_chardev(chardev)
        await old.aclose_with_log()

    async def remove_port(self, nr: int, *, keep_chardev: bool = False) -> None:
        """Take a port away from host and guest, and stop its chardev unless that is to be kept.

        Raises LocalProtocolError if there is no such port.
        """
        port = self._known(nr)
        # Before the guest hears of it: a driver takes its buffers back without another word.
        port.release()
        del self._ports[nr]
        self._control.remove_port(nr)
        self._control_queues.flush()
        self._serve_unclaimed()
        self._console_changed()
        self.emit(ev.PortRemoved(nr))
        self._record()
        if keep_chardev:
            port.chardev.detach()
        else:
            await port.chardev.aclose_with_log()
        await asyncio.sleep(0)  # a protocol hears of it in the loop's next turn

    async def start(self) -> None:
        """Start all chardevs. Raises ResourceError; those that had started are stopped then."""
        if self._pump is None and self._own_pump is None:
            self._own_pump = LoopPump()
        try:
            for port in list(self._ports.values()):
                await port.chardev.start_with_log()
        except BaseException:
            await self.aclose()
            raise
        for port in self._ports.values():
            # A predecessor's end need not be there any more.
            self._control.set_host_open(port.nr, port.host_open)
        self._record()
        self.started = True

    async def aclose(self) -> None:
        """Leave all queues and stop all chardevs. Safe to call twice.

        All of them are stopped, also if one fails to or if this is cancelled; that is raised then.
        """
        self.started = False
        self.reset()
        try:
            async with contextlib.AsyncExitStack() as stack:
                for port in reversed(self._ports.values()):
                    stack.callback(port.report_residue)
                    stack.push_async_callback(port.chardev.aclose_with_log)
            await asyncio.sleep(0)  # as in remove_port
        finally:
            if self._own_pump is not None:
                self._own_pump.close()
                self._own_pump = None

    # --- for transports: features, status, configuration

    @property
    def status(self) -> int:
        """The device status (2.1)."""
        return self.state.status

    @property
    def config_generation(self) -> int:
        """Counts changes of the configuration space."""
        return self.state.config_generation

    @property
    def driver_features(self) -> int:
        """What the driver accepted; 0 if it has not yet."""
        return self.state.features or 0

    @property
    def single_port(self) -> bool:
        """Whether the driver did not accept MULTIPORT: one port, without control queues."""
        bits = self.device_features if self.state.features is None else self.state.features
        return not bits & ConsoleFeature.MULTIPORT

    def set_driver_features(self, bits: int) -> None:
        """Take the features that the driver accepted; raise RemoteProtocolError on others."""
        if bits & ~self.device_features:
            extra = feature_names(bits & ~self.device_features, ConsoleFeature)
            raise RemoteProtocolError(
                f"{self.name}: the driver accepted what was not offered: {extra}"
            )
        if bits != self.state.features:
            self.state.features = bits
            self.emit(ev.FeaturesNegotiated(bits))
            self._console_changed()
            self._serve_unclaimed()
            self._sync_guest()
            self._record()

    def set_status(self, status: int) -> None:
        """Take over the device status that was written: see VirtioDevice."""
        needs_reset = self.state.status & Status.DEVICE_NEEDS_RESET
        self.state.status = status | needs_reset if status else 0
        self._record()

    def read_config(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of the configuration space; what lies outside reads as zero."""
        return space.read_space(self._console_size(), self.max_ports, offset, length)

    def write_config(self, offset: int, data: bytes) -> None:
        """Act on a write to the configuration space: emerg_wr, or nothing that counts."""
        char = space.emergency_char(self.device_features, offset, data)
        if char is not None:
            self.emit(ev.EmergencyWrite(char))
            console = space.console_of(self._ports, single_port=self.single_port)
            if console is not None:
                console.emergency_write(char)

    # --- for transports: queues

    def start_queue(self, index: int, queue: RunningQueue) -> None:
        """Serve a queue that runs now, without waiting for a kick.

        Raises:
            LocalProtocolError: there is no such queue, or it runs already.
            OSError: its kick descriptor cannot be watched.
        """
        if not 0 <= index < self.num_queues:
            raise LocalProtocolError(f"{self.name}: there is no queue {index}")
        if index in self._queues:
            raise LocalProtocolError(f"{self.name}: queue {index} runs already")
        position = queue.queue.avail_index
        if is_fresh(queue.queue) and self.state.stopped_at.get(index, position) != position:
            self._start_anew()
        # The driver said DEVICE_READY there to a device of which nothing is left.
        resumed = (
            index == CONTROL_TRANSMITQ
            and not (is_fresh(queue.queue) or index in self.state.stopped_at)
            and not (self.single_port or self._control.driver_ready)
        )
        if self.state.stopped_at.pop(index, None) is not None:
            self._record()  # else a successor takes a ring that has come round for a new driver's
        self._end_standstill()
        self._queues[index] = queue
        try:
            self._serve(index, queue)
        except BaseException:
            self.stop_queue(index)
            raise
        if resumed:
            self._control_events(self._control.resume())

    def stop_queue(self, index: int) -> int:
        """Leave a queue alone: nothing is in flight when this returns.

        Returns the available index to resume from; 0 if it did not run.
        """
        queue = self._queues.pop(index, None)
        if queue is None:
            return 0
        port = self._port_of(index)
        if port is not None:
            port.stop_queue(bool(port_of_queue(index)[1]))
        elif port_of_queue(index)[0] is None:
            self._control_queues.stop(index)
        self._serve_unclaimed()
        self.state.stopped_at[index] = queue.queue.avail_index
        self._record()
        return queue.queue.avail_index

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Hold all queues, so that every part's state is exact, inside a ``with`` without await.

        ``avail_index`` and ``used_index`` of the queues are exact as well, and nothing is in
        flight. On leaving, all go on as if nothing had happened.
        """
        for port in list(self._ports.values()):
            port.settle()
        for index, running in self._queues.items():
            self.state.stopped_at[index] = running.queue.avail_index
        try:
            yield
        finally:
            if not self.state.still:
                self._go_on()

    def hand_over(self) -> None:
        """Write down all that a successor needs, just before this process ends.

        The pump, which moves bytes until it is halted, has records of its own for all but consoles.
        """
        for port in self._ports.values():
            port.hand_over()
        self._record()

    def _go_on(self) -> None:
        for port in list(self._ports.values()):
            port.go_on()

    def _end_standstill(self) -> None:
        if self.state.still:
            self.state.still = False
            self._record()
            self._go_on()

    def save_state(self) -> bytes:
        """See VirtioDevice: ports with what they owe, and connections of protocols."""
        self.state.still = True
        self._record()
        ports = {nr: port.state for nr, port in self._ports.items()}
        return CONSOLE.pack(ConsoleState(self.max_ports, self.state, ports))

    def check_state(self, saved: bytes) -> Callable[[], None]:
        """See VirtioDevice; the ports are added before, and are those of the state."""
        if self._queues:
            raise LocalProtocolError(f"{self.name}: queue {min(self._queues)} runs")
        state = CONSOLE.unpack(saved)
        check_console(
            state,
            max_ports=self.max_ports,
            ports={nr: (port.name, port.console) for nr, port in self._ports.items()},
            num_queues=self.num_queues,
            features=self.device_features,
        )
        return lambda: self._take_over(state)

    def _take_over(self, state: ConsoleState) -> None:
        """Go on from a state; host ends, and the sizes of their terminals, are this device's."""
        state.controller.still = self.started
        self._take(state.controller)
        for nr, port in self._ports.items():
            self._control.add_port(nr, port.name, console=port.console)
            if self.started:
                port.settle()
            port.take_state(state.ports[nr])
            self._set_guest(port)
        if self.started:
            for port in self._ports.values():
                self._control.set_host_open(port.nr, port.host_open)
                self.port_resized(port)
            self._console_changed()
            self._record()

    def release_state(self, *, gone: bool) -> None:
        """See VirtioDevice."""
        if gone and self.state.still:
            self.reset()
            for port in self._ports.values():
                port.drop_state()
                self._set_guest(port)
        self._end_standstill()

    def save_with(self, write: Callable[[bytes], None] | None) -> None:
        """See ``transport.vhost_user.inflight.Resumable``."""
        self._recorder.write_with(write)
        if write is not None:
            self._record()

    def restore(self, saved: bytes) -> bool:
        """See ``transport.vhost_user.inflight.Resumable``.

        What the driver knows of the ports counts, what it is still to be told, and the bytes that
        are owed to a port's host end; host ends and sizes are this process's.
        """
        state = CONSOLE.unpack(saved)
        known = state.controller.control
        if self._control.driver_ready or not known.driver_ready:
            return False
        for nr, port in self._ports.items():
            left, owed = known.ports.get(nr), state.ports.get(nr)
            is_it = left is not None and (left.name, left.console) == (port.name, port.console)
            if is_it and owed is not None:
                port.inherit(owed.chain.residue)
        self._control_events(self._control.resume(known))
        return True

    def reset_queue(self, index: int) -> None:
        """Forget where the queue, which does not run, was stopped; its driver is the same one."""
        self.state.stopped_at.pop(index, None)
        port = self._port_of(index)
        if port is not None and port_of_queue(index)[1]:
            port.forget_driver()

    def reset(self) -> None:
        """Stop all queues and forget the driver."""
        for index in list(self._queues):
            self.stop_queue(index)
        self.state.status = 0
        had_driver = self.state.features is not None
        self.state.features = None
        self._console_changed()
        self._start_anew(silent=not had_driver)

    @property
    def running(self) -> Mapping[int, RunningQueue]:
        """The queues that run, by index; where others stopped is in ``state``."""
        return MappingProxyType(self._queues)

    # --- for ports

    def poll_control(self) -> None:
        """See PortOwner."""
        self._control_queues.poll()

    def host_end_changed(self, port: Port, is_open: bool) -> None:
        """See PortOwner."""
        event = ev.PortOpened if is_open else ev.PortClosed
        self.emit(event(Side.HOST, port.nr))
        self._control.set_host_open(port.nr, is_open)
        self._record()
        self._control_queues.flush()

    def residue_changed(self) -> None:
        """See PortOwner."""
        self._record()

    def residue_record(self, port: Port) -> memoryview | None:
        """See PortOwner."""
        return self._recorder.of_residue(port.nr)

    def port_resized(self, port: Port) -> None:
        """See PortOwner."""
        if port.size is None:
            return
        self._control.set_size(port.nr, *port.size)
        self._control_queues.flush()
        self._console_changed()

    def port_queue_broken(self, port: Port, is_transmit: bool, error: RingError) -> None:
        """See PortOwner."""
        self._queue_broken(queues_of_port(port.nr)[is_transmit], error)

    def emit(self, event: DeviceEvent) -> None:
        """Log what happened, and tell ``on_event``."""
        port = self._ports.get(getattr(event, "nr", -1))
        self._log.write(f"{self.name}: {port.label}" if port else self.name, event)
        tell(self._log.failures, f"{self.name}: on_event", self.on_event, event)

    # --- internals

    def _known(self, nr: int) -> Port:
        if nr not in self._ports:
            raise LocalProtocolError(f"{self.name} has no port {nr}")
        return self._ports[nr]

    def _record(self) -> None:
        self._recorder.record(self.state, self._ports)

    def _console_changed(self) -> None:
        """Tell the driver if the console, or its size, is another now."""
        size = self._console_size()
        if size == self.state.size_told or self._control.unclaimed:
            return
        self.state.size_told = size
        self.state.config_generation += 1
        if self.driver_features & ConsoleFeature.SIZE:
            tell(self._log.failures, f"{self.name}: on_config_change", self.on_config_change)

    def _console_size(self) -> tuple[int, int]:
        console = space.console_of(self._ports, single_port=self.single_port)
        return space.size_of(console, self.device_features)

    def _port_of(self, index: int) -> Port | None:
        nr, _ = port_of_queue(index)
        return None if nr is None else self._ports.get(nr)

    def _serve(self, index: int, queue: RunningQueue) -> None:
        nr, is_transmit = port_of_queue(index)
        port = self._port_of(index)
        if port is not None:
            port.start_queue(is_transmit, queue)
        elif nr is not None:
            self._serve_unclaimed()
        elif not self.single_port:
            self._control_queues.start(index, queue)
        if self.single_port and index == 0:
            self.emit(ev.DriverReady())

    def _serve_unclaimed(self) -> None:
        """Discard what a driver without MULTIPORT writes while no port 0 is there to take it."""
        _, transmitq = queues_of_port(0)
        queue = self._queues.get(transmitq) if self.single_port and 0 not in self._ports else None
        if queue is not None and self._discarder is None:
            self._discarder = Discarder(queue, lambda error: self._queue_broken(transmitq, error))
        elif queue is None and self._discarder is not None:
            self._discarder.stop()
            self._discarder = None

    def _set_guest(self, port: Port) -> None:
        port.set_guest(self._control.port_state(port.nr), single=self.single_port and port.nr == 0)

    def _sync_guest(self) -> None:
        for port in list(self._ports.values()):
            self._set_guest(port)

    def _control_events(self, events: list[ctl.DeviceSideEvent]) -> None:
        """Act on what a control message of the driver made happen."""
        for event in events:
            if isinstance(event, ctl.PortClosed):  # first: the host may send for the next opening
                self._set_guest(self._ports[event.nr])
            self.emit(ev.of_control(event))
            match event:
                case ctl.PeerReady():
                    self._sync_guest()
                case ctl.PortReady(nr) | ctl.PortOpened(nr):
                    self._set_guest(self._ports[nr])
        self._record()
        self._control_queues.flush()

    def _start_anew(self, *, silent: bool = False) -> None:
        """Expect a driver that knows nothing of the ports, or none."""
        closed = self._control.reset()
        self.state.stopped_at.clear()
        for event in closed:
            if isinstance(event, ctl.PortClosed):
                self.emit(ev.PortClosed(Side.GUEST, event.nr))
        self._sync_guest()
        for port in self._ports.values():
            port.forget_driver()
        self._record()
        if not silent:
            self.emit(ev.DeviceReset())

    def _queue_broken(self, index: int, error: RingError) -> None:
        self.state.status |= Status.DEVICE_NEEDS_RESET
        self.emit(ev.QueueBroken(index, error))
        tell(self._log.failures, f"{self.name}: on_needs_reset", self.on_needs_reset, error)
