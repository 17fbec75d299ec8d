"""The legacy interface in I/O space (virtio 1.3, 4.1.4.10).

Guests are taken to be little-endian, as the rings are.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from functools import partial

from vring_serial.device.pci.config_space import Bar
from vring_serial.device.pci.layout import LEGACY_BAR, power_of_two
from vring_serial.device.pci.modern import VectorRegisters
from vring_serial.device.registers.bank import RegisterBank
from vring_serial.device.registers.driver_registers import DriverRegisters

#: Bytes of a page in the registers of queue addresses.
PAGE = 4096


class LegacyRegister(enum.IntEnum):
    """Offsets of the header (4.1.4.10); the device configuration follows it."""

    DEVICE_FEATURES = 0
    DRIVER_FEATURES = 4
    QUEUE_ADDRESS = 8
    QUEUE_SIZE = 12
    QUEUE_SELECT = 14
    QUEUE_NOTIFY = 16
    DEVICE_STATUS = 18
    ISR_STATUS = 19
    CONFIG_WITHOUT_MSIX = 20
    CONFIG_MSIX_VECTOR = 20
    QUEUE_MSIX_VECTOR = 22
    CONFIG_WITH_MSIX = 24


class LegacyRegisters:
    """The legacy registers, whose header is longer while MSI-X is enabled.

    Args:
        registers: of the function.
        vectors: the registers that are there with MSI-X alone.
        read_isr: reads and clears the ISR status.

    Attributes:
        bar: where they lie.
        without_msix, with_msix: the registers while MSI-X is disabled, and while it is enabled.
    """

    def __init__(
        self,
        registers: DriverRegisters,
        vectors: VectorRegisters,
        read_isr: Callable[[], int],
    ) -> None:
        self._registers = registers
        self._read_isr = read_isr
        reg = LegacyRegister
        size = reg.CONFIG_WITH_MSIX + registers.device.config_size
        self.bar = Bar(LEGACY_BAR, max(power_of_two(size), 32), io=True)
        self.without_msix = self._make_bank(reg.CONFIG_WITHOUT_MSIX)
        self.with_msix = self._make_bank(reg.CONFIG_WITH_MSIX)
        at = self.with_msix.register
        at(reg.CONFIG_MSIX_VECTOR, 2, vectors.read_config_vector, vectors.write_config_vector)
        at(reg.QUEUE_MSIX_VECTOR, 2, vectors.read_queue_vector, vectors.write_queue_vector)

    def _make_bank(self, config: int) -> RegisterBank:
        """Return a bank with the device configuration at ``config``."""
        registers, state, features = (
            self._registers,
            self._registers.state,
            self._registers.features,
        )
        bank, reg = RegisterBank(self.bar.size), LegacyRegister
        at = bank.register
        at(reg.DEVICE_FEATURES, 4, lambda: features.offered_legacy)
        at(reg.DRIVER_FEATURES, 4, features.read_driver, registers.write_legacy_features)
        at(reg.QUEUE_ADDRESS, 4, self._read_queue_address, self._write_queue_address)
        at(reg.QUEUE_SIZE, 2, registers.selected.read_size)
        at(
            reg.QUEUE_SELECT,
            2,
            partial(getattr, state, "queue_select"),
            partial(setattr, state, "queue_select"),
        )
        at(reg.QUEUE_NOTIFY, 2, None, registers.notify_queue)
        at(reg.DEVICE_STATUS, 1, registers.read_status, self._write_status)
        at(reg.ISR_STATUS, 1, self._read_isr)
        if size := registers.device.config_size:
            bank.window(config, size, registers.read_config, registers.write_config)
        return bank

    def _write_status(self, value: int) -> None:
        if value:
            self._registers.state.legacy = True
        self._registers.write_status(value)

    def _read_queue_address(self) -> int:
        return self._registers.selected.read_legacy_address() // PAGE

    def _write_queue_address(self, page: int) -> None:
        """Start the selected queue at a page number, or stop it with 0 (4.1.5.1.3.1)."""
        self._registers.selected.write_legacy_address(page * PAGE)
