"""From what happens in the device to INTx and MSI-X (virtio 1.3, 4.1.4.5 and 4.1.5.3)."""

from __future__ import annotations

import enum
from threading import Lock

from vring_serial.device.driver_registers import DriverRegisters
from vring_serial.device.pci.config_space import ConfigSpace, Register, StatusBit
from vring_serial.device.pci.msix import Msix
from vring_serial.device.queue_setup import NO_VECTOR, QueueSetup


class Isr(enum.IntFlag):
    """Bits of the ISR status."""

    QUEUE = 1
    CONFIGURATION = 2


class PciInterrupts:
    """The ISR status, the vectors of queues and configuration, and INTA#.

    Args:
        msix: delivers vectors.
        registers: of the same function.
        config: has the Interrupt Status bit.
    """

    def __init__(self, msix: Msix, registers: DriverRegisters, config: ConfigSpace) -> None:
        self._msix = msix
        self._registers = registers
        self._config = config
        self._isr = 0
        self._config_vector = NO_VECTOR
        self._intx_disabled = False
        self._level = False
        # The driver reads the ISR status in its own thread, where it has one.
        self._lock = Lock()

    @property
    def level(self) -> bool:
        """The level of INTA#."""
        return self._level

    @property
    def intx_disabled(self) -> bool:
        """Interrupt Disable of the command register."""
        return self._intx_disabled

    @intx_disabled.setter
    def intx_disabled(self, disabled: bool) -> None:
        self._intx_disabled = disabled
        self._update()

    def set_msix_enabled(self, enabled: bool) -> None:
        """MSI-X takes the place of INTx, or INTx that of MSI-X."""
        self._msix.enabled = enabled
        self._update()
        self.masks_changed()

    def masks_changed(self) -> None:
        """What can be delivered, and how, is another thing now; what is pending may be."""
        self.route_all()
        self._msix.deliver_pending()

    def reset(self) -> None:
        """The driver reset the device: no event has happened, none has a vector."""
        with self._lock:
            self._isr = 0
        self._config_vector = NO_VECTOR
        self._msix.forget_pending()
        self._update()

    # --- what happens

    def queue(self, queue: QueueSetup) -> None:
        """The driver of a queue is to look at used buffers."""
        if self._msix.enabled:
            self._msix.fire(queue.vector)
        else:
            self._set(Isr.QUEUE)

    def configuration(self) -> None:
        """The driver is to look at configuration and status."""
        self._set(Isr.CONFIGURATION)
        if self._msix.enabled:
            self._msix.fire(self._config_vector)

    # --- what the driver accesses

    def read_isr(self) -> int:
        """The ISR status, which is 0 from then on; INTA# is not asserted any more."""
        with self._lock:
            isr, self._isr = self._isr, 0
        if isr:
            self._update()
        return isr

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
        self._registers.queues.route(queue, fd)

    def route_all(self) -> None:
        """As :meth:`route`, for all queues."""
        for index in range(len(self._registers.queues)):
            self.route(self._registers.queues[index])

    # --- internals

    def _checked(self, vector: int) -> int:
        return vector if vector < self._msix.vectors else NO_VECTOR

    def _set(self, bit: Isr) -> None:
        with self._lock:
            self._isr |= bit
        self._update()

    def _update(self) -> None:
        waiting = bool(self._isr) and not self._msix.enabled
        status = self._config.data[Register.STATUS] & ~StatusBit.INTERRUPT
        self._config.data[Register.STATUS] = status | (StatusBit.INTERRUPT if waiting else 0)
        level = waiting and not self._intx_disabled
        if level != self._level:
            self._level = level
            self._msix.sink.set_intx(level)
