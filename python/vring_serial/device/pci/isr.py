"""From what happens in the device to INTx and MSI-X (virtio 1.3, 4.1.4.5 and 4.1.5.3)."""

from __future__ import annotations

from vring_serial.device.pci.msix import Msix
from vring_serial.device.registers.driver_registers import DriverRegisters
from vring_serial.device.registers.host import Host
from vring_serial.device.registers.interrupts import Event, EventStatus
from vring_serial.device.registers.queues import NO_VECTOR, QueueSetup


class PciInterrupts:
    """The ISR status, INTA#, and the vectors of queues and configuration.

    Args:
        msix: delivers vectors.
        registers: of the same function.
        host: changes what the loop watches.
    """

    def __init__(self, msix: Msix, registers: DriverRegisters, host: Host) -> None:
        self._msix = msix
        self._registers = registers
        self._host = host
        self._config_vector = NO_VECTOR
        self._intx_disabled = False
        self._events = EventStatus(lambda level: msix.sink.set_intx(level))

    @property
    def level(self) -> bool:
        """The level of INTA#."""
        return self._events.level

    @property
    def status(self) -> bool:
        """The Interrupt Status bit: INTA# would be asserted, were it not disabled."""
        return bool(self._events.bits) and not self._msix.enabled

    def disable_intx(self, disabled: bool) -> None:
        """Interrupt Disable of the command register."""
        self._intx_disabled = disabled
        self._events.masked = disabled or self._msix.enabled

    def set_msix(self, enabled: bool, function_masked: bool) -> None:
        """Message control was written: MSI-X takes the place of INTx, or INTx that of MSI-X."""
        self._msix.set_control(enabled, function_masked)
        self._events.masked = self._intx_disabled or enabled
        self.masks_changed()

    def masks_changed(self) -> None:
        """What can be delivered, and how, is another thing now; what is pending may be."""
        self.route_all()
        self._msix.deliver_pending()

    def reset(self) -> None:
        """The driver reset the device: no event has happened, none has a vector."""
        self._events.take()
        self._config_vector = NO_VECTOR
        self._msix.forget_pending()

    # --- what happens

    def queue(self, queue: QueueSetup) -> None:
        """The driver of a queue is to look at used buffers."""
        if self._msix.enabled:
            self._msix.fire(queue.vector)
        else:
            self._events.set(Event.QUEUE)

    def configuration(self) -> None:
        """The driver is to look at configuration and status."""
        self._events.set(Event.CONFIGURATION)
        if self._msix.enabled:
            self._msix.fire(self._config_vector)

    # --- what the driver accesses

    def read_isr(self) -> int:
        """The ISR status, which is 0 from then on; INTA# is not asserted any more."""
        return self._events.take()

    def read_config_vector(self) -> int:
        return self._config_vector

    def write_config_vector(self, vector: int) -> None:
        self._config_vector = self._checked(vector)

    def read_queue_vector(self) -> int:
        registers = self._registers
        if registers.queue_select >= len(registers.queues):
            return NO_VECTOR
        return registers.queues[registers.queue_select].vector

    def write_queue_vector(self, vector: int) -> None:
        registers = self._registers
        if registers.queue_select < len(registers.queues):
            queue = registers.queues[registers.queue_select]
            queue.vector = self._checked(vector)
            self.route(queue)

    def write_table(self, offset: int, value: int, size: int) -> None:
        """Write to the MSI-X table; what is unmasked by it is delivered."""
        self._msix.write_table(offset, value, size)
        self.masks_changed()

    # --- descriptors

    def route(self, queue: QueueSetup) -> None:
        """Let calls go to the vector's own descriptor where there is one, without our doing."""
        fd = -1
        if self._msix.enabled and queue.vector != NO_VECTOR and not self._msix.masked(queue.vector):
            fd = self._msix.sink.msix_descriptor(queue.vector)
        if fd >= 0 or queue.direct:
            self._host.run(lambda: self._registers.queues.route(queue, fd))

    def route_all(self) -> None:
        """As :meth:`route`, for all queues."""
        for index in range(len(self._registers.queues)):
            self.route(self._registers.queues[index])

    # --- internals

    def _checked(self, vector: int) -> int:
        return vector if vector < self._msix.vectors else NO_VECTOR
