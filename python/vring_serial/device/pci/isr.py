"""Interrupts of a PCI function: events become INTx or MSI-X (virtio 1.3, 4.1.4.5, 4.1.5.3)."""

from __future__ import annotations

from vring_serial.device.pci.msix import Msix
from vring_serial.device.registers.driver_registers import DriverRegisters
from vring_serial.device.registers.host import Host
from vring_serial.device.registers.interrupts import Event, EventStatus
from vring_serial.device.registers.state import NO_VECTOR, QueueSetup


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
        self._state = registers.state
        self._intx_disabled = False
        self._events = EventStatus(self._state, lambda level: msix.sink.set_intx(level))

    @property
    def level(self) -> bool:
        """The level of INTA#."""
        return self._events.level

    @property
    def status(self) -> bool:
        """The Interrupt Status bit: INTA# would be asserted, were it not disabled."""
        return bool(self._events.bits) and not self._msix.enabled

    def disable_intx(self, disabled: bool) -> None:
        """Apply Interrupt Disable of the command register."""
        self._intx_disabled = disabled
        self._events.masked = disabled or self._msix.enabled

    def set_msix(self, enabled: bool, function_masked: bool) -> None:
        """Handle a write to Message Control, which chooses between MSI-X and INTx."""
        self._msix.set_control(enabled, function_masked)
        self._events.masked = self._intx_disabled or enabled
        self.masks_changed()

    def masks_changed(self) -> None:
        """Route all queues anew and deliver pending vectors, after masks or descriptors changed."""
        self.route_all()
        self._msix.deliver_pending()

    def reset(self) -> None:
        """Forget all events and vectors, as the driver has reset the device."""
        self._events.take()
        self._state.config_vector = NO_VECTOR
        self._msix.forget_pending()

    # --- what happens

    def queue(self, queue: QueueSetup) -> None:
        """Interrupt the driver for used buffers in ``queue``."""
        if self._msix.enabled:
            self._msix.fire(queue.vector)
        else:
            self._events.set(Event.QUEUE)

    def configuration(self) -> None:
        """Interrupt the driver for a changed configuration or status."""
        self._events.set(Event.CONFIGURATION)
        if self._msix.enabled:
            self._msix.fire(self._state.config_vector)

    def tell_again(self) -> None:
        """Interrupt the driver for everything, in case a predecessor owed it that."""
        registers = self._registers
        if registers.driver_ready:
            for index in range(len(registers.queues)):
                if registers.queues.is_running(registers.queues[index]):
                    self.queue(registers.queues[index])
            self.configuration()

    # --- what the driver accesses

    def read_isr(self) -> int:
        """Return and clear the ISR status, which deasserts INTA#."""
        return self._events.take()

    def read_config_vector(self) -> int:
        """Return config_msix_vector."""
        return self._state.config_vector

    def write_config_vector(self, vector: int) -> None:
        """Set config_msix_vector, or NO_VECTOR if there is no such vector."""
        self._state.config_vector = self._checked(vector)

    def read_queue_vector(self) -> int:
        """Return queue_msix_vector of the selected queue."""
        queue = self._registers.selected.setup
        return NO_VECTOR if queue is None else queue.vector

    def write_queue_vector(self, vector: int) -> None:
        """Set queue_msix_vector of the selected queue, or NO_VECTOR if there is no such vector."""
        queue = self._registers.selected.setup
        if queue is not None:
            queue.vector = self._checked(vector)
            self._registers.queues.changed.add(queue.index)
            self.route(queue)

    def write_table(self, offset: int, value: int, size: int) -> None:
        """Write to the MSI-X table, and deliver vectors that this unmasks."""
        self._msix.write_table(offset, value, size)
        self.masks_changed()

    # --- descriptors

    def route(self, queue: QueueSetup) -> None:
        """Let the queue's calls write to the descriptor of its vector, if the sink has one."""
        fd = -1
        if self._msix.enabled and queue.vector != NO_VECTOR and not self._msix.masked(queue.vector):
            fd = self._msix.sink.msix_descriptor(queue.vector)
        if fd >= 0 or self._registers.queues.is_routed(queue):
            self._host.run(lambda: self._registers.queues.route(queue, fd))

    def route_all(self) -> None:
        """Route all queues; see :meth:`route`."""
        for index in range(len(self._registers.queues)):
            self.route(self._registers.queues[index])

    # --- internals

    def _checked(self, vector: int) -> int:
        return vector if vector < self._msix.vectors else NO_VECTOR
