"""The virtio-console driver: what Linux's virtio_console does between its ports and the rings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from vring_serial.guest.errors import BackendTimeoutError, GuestMemoryError
from vring_serial.guest.memory import PAGE, GuestRam
from vring_serial.guest.port import GuestPort, removed_error
from vring_serial.guest.queue import DriverQueue, ReceiveBuffers, TransmitBuffers
from vring_serial.proto.console import CONTROL_RECEIVEQ, CONTROL_TRANSMITQ, queues_of_port
from vring_serial.proto.control import (
    ControlDriver,
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

log = logging.getLogger(__name__)

#: Most bytes that Linux writes at once.
TRANSMIT_SIZE = 32 << 10
#: Transmit buffers per port: enough to keep a device busy, few enough to stay in a CPU's cache.
TRANSMIT_COUNT = 64
#: Buffers for control messages to the device, and their size: a header without payload.
CONTROL_TRANSMIT_COUNT = 32
CONTROL_TRANSMIT_SIZE = 8
#: Messages without sense that are logged.
MAX_REFUSED_LOGGED = 20
#: Control messages handled before the event loop has its turn.
CONTROL_BATCH = 64


class ConsoleDriver:
    """Drives the queues of one console device.

    Attributes:
        ports: the ports there are now, by number.
        on_event: told what the device said, after ``ports`` shows it.
    """

    def __init__(
        self,
        ram: GuestRam,
        queues: Mapping[int, DriverQueue],
        *,
        multiport: bool,
        max_ports: int,
        receive_size: int,
        timeout: float,
        on_event: Callable[[DriverSideEvent], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        """Take the queues of a device that is set up; :meth:`start` begins to use them.

        Args:
            queues: by index; they stay the caller's.
            multiport: whether MULTIPORT is negotiated; without it there is port 0 and no control.
            max_ports: max_nr_ports of the configuration space.
            receive_size: bytes of one receive buffer of a port.
            timeout: seconds in which the device must use a control message.
            on_failure: the device broke a ring or the protocol; called once, the driver is over.

        Raises:
            GuestMemoryError: no room for the control buffers.
        """
        self.ports: dict[int, GuestPort] = {}
        self.on_event = on_event
        self._ram = ram
        self._queues = queues
        self._receive_size = receive_size
        self._timeout = timeout
        self._on_failure = on_failure
        self._failed = False
        self._refused = 0
        self._receive_buffers: dict[int, ReceiveBuffers] = {}
        self._transmit_buffers: dict[int, TransmitBuffers] = {}
        self._overdue: asyncio.TimerHandle | None = None
        self._control: ControlDriver | None = None
        for queue in queues.values():
            queue.on_broken = self._fail
        if multiport:
            self._control = ControlDriver(max_ports)
            receive, transmit = queues[CONTROL_RECEIVEQ], queues[CONTROL_TRANSMITQ]
            self._control_rx = ReceiveBuffers(receive, ram, receive.size, PAGE)
            count = min(transmit.size, CONTROL_TRANSMIT_COUNT)
            self._control_tx = TransmitBuffers(transmit, ram, count, CONTROL_TRANSMIT_SIZE)

    def start(self) -> None:
        """After DRIVER_OK: fill the control receive queue and say DEVICE_READY.

        Raises GuestMemoryError, without MULTIPORT only.
        """
        if self._control is None:
            self._start_port(0)
            self.ports[0].set_console(settled=True)
            self.on_event(PortAdded(0))
            self.on_event(PortIsConsole(0))
            return
        self._control_rx.queue.listen(self._control_received)
        self._control_tx.queue.listen(self._control_used)
        self._control_rx.fill()
        self._control.start()
        self._send_control()

    def stop(self, error: Exception) -> None:
        """Take all ports away from their users, for ``error``. Safe to call twice."""
        self._failed = True
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
        ports = tuple(self.ports.values())
        self.ports.clear()
        for port in ports:
            port.remove(error)

    def _fail(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            self._on_failure(error)

    def resize_console(self, cols: int, rows: int) -> None:
        """Take a new size of a single-port device's console from the configuration space."""
        if 0 in self.ports and self.ports[0].size != (cols, rows):
            self.ports[0].size = (cols, rows)
            self.on_event(PortResized(0, cols, rows))

    # --- control queues

    def _control_received(self) -> None:
        """Linux's control work: one message after the other, each buffer back when it is done."""
        control = self._control
        if self._failed or control is None:
            return
        rx = self._control_rx
        rx.queue.disable_notifications()
        slots, messages = rx.take(CONTROL_BATCH)
        for message in messages:
            for event in control.receive_message(bytes(message)):
                self._handle(event)
        self._send_control()
        if messages:
            rx.give_back(slots)
        if messages or rx.queue.enable_notifications():
            asyncio.get_running_loop().call_soon(self._control_received)

    def _send_control(self) -> None:
        """Send what waits. The device has limited time to take it; Linux would spin until then."""
        control = self._control
        if self._failed or control is None:
            return
        tx = self._control_tx
        progress = tx.reclaim() > 0
        while (data := control.outbox.peek()) is not None and tx.send(memoryview(data)):
            control.outbox.sent()
        while tx.in_flight and tx.wait_used():
            progress = tx.reclaim() > 0 or progress
        if self._overdue is not None and (progress or not tx.in_flight):
            self._overdue.cancel()
            self._overdue = None
        if not tx.in_flight:
            for port in self.ports.values():
                port.control_settled()
        elif self._overdue is None:
            loop = asyncio.get_running_loop()
            self._overdue = loop.call_later(self._timeout, self._control_overdue)

    def _control_used(self) -> None:
        self._control_tx.queue.disable_notifications()
        self._send_control()

    def _control_overdue(self) -> None:
        self._overdue = None
        self._fail(
            BackendTimeoutError(
                f"control queue: the device did not take a message in {self._timeout:g} s"
            )
        )

    # --- what the device says

    def _handle(self, event: DriverSideEvent) -> None:
        match event:
            case PortAdded(nr):
                if not self._add_port(nr):
                    return
            case PortRemoved(nr):
                self.ports.pop(nr).remove(removed_error(nr))
            case PortNamed(nr, name):
                self.ports[nr].set_name(name.decode("utf-8", "backslashreplace"))
            case PortIsConsole(nr):
                self.ports[nr].set_console(settled=False)
            case PortResized(nr, cols, rows):
                self.ports[nr].size = (cols, rows)
            case PortOpened(nr):
                self.ports[nr].set_host_connected(True)
            case PortClosed(nr):
                self.ports[nr].set_host_connected(False)
            case Refused(why):
                self._log_refused(why)
        self.on_event(event)

    def _log_refused(self, why: str) -> None:
        """Log the first messages of a device that are refused; it could send nothing else."""
        self._refused += 1
        if self._refused <= MAX_REFUSED_LOGGED:
            log.warning("the device sent %s", why)
        if self._refused == MAX_REFUSED_LOGGED:
            log.warning(
                "the device sent %d messages that make no sense: no more of them here",
                self._refused,
            )

    def _add_port(self, nr: int) -> bool:
        assert self._control is not None
        try:
            self._start_port(nr)
        except (GuestMemoryError, KeyError) as error:
            why = error if isinstance(error, GuestMemoryError) else "no queues for it"
            log.warning("port %d: %s", nr, why)
            self._control.port_ready(nr, False)
            return False
        self._control.port_ready(nr)
        return True

    def _start_port(self, nr: int) -> None:
        """Fill the port's receive queue. Raises GuestMemoryError, KeyError without queues.

        Buffers stay with the queues when a port goes, for the device has some of them; as in Linux
        the next port of that number goes on with them.
        """
        receive = self._receive_buffers.get(nr)
        if receive is None:
            index, _ = queues_of_port(nr)
            queue = self._queues[index]
            receive = ReceiveBuffers(queue, self._ram, queue.size, self._receive_size)
            self._receive_buffers[nr] = receive
            queue.listen(lambda: self._received(nr))
            receive.fill()
        self.ports[nr] = port = GuestPort(nr, self, receive)
        port.schedule_receive()

    def _received(self, nr: int) -> None:
        if nr in self.ports:
            self.ports[nr].receive()

    def _transmitted(self, nr: int) -> None:
        if nr in self.ports:
            self.ports[nr].notified_transmit()

    # --- PortOwner

    def port_opened(self, port: GuestPort, is_open: bool) -> bool:
        """Send PORT_OPEN and return whether the device has used it; see :class:`PortOwner`.

        Without the multiport protocol nothing is sent, and it returns True.
        """
        if self._control is None:
            return True
        if is_open:
            self._control.open(port.nr)
        else:
            self._control.close(port.nr)
        self._send_control()
        return not self._control_tx.in_flight

    def transmit_buffers(self, port: GuestPort) -> TransmitBuffers:
        """Return the port's transmit buffers, made when first wanted.

        At most TRANSMIT_COUNT buffers of TRANSMIT_SIZE bytes, and no more than the queue's size.

        Raises:
            GuestMemoryError: there is no guest memory left for them.
        """
        transmit = self._transmit_buffers.get(port.nr)
        if transmit is None:
            _, index = queues_of_port(port.nr)
            queue = self._queues[index]
            count = min(queue.size, TRANSMIT_COUNT)
            transmit = TransmitBuffers(queue, self._ram, count, TRANSMIT_SIZE)
            self._transmit_buffers[port.nr] = transmit
            queue.listen(lambda: self._transmitted(port.nr))
        return transmit
