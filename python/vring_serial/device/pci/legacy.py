"""The legacy interface in I/O space (virtio 1.3, 4.1.4.10).

Guests are taken to be little-endian, as the rings are.
"""

from __future__ import annotations

from collections.abc import Callable

from vring_serial.device.pci.config_space import Bar
from vring_serial.device.pci.layout import LEGACY_BAR, power_of_two
from vring_serial.device.pci.modern import VectorRegisters
from vring_serial.device.registers.bank import RegisterBank
from vring_serial.device.registers.driver_registers import DriverRegisters

_PAGE = 4096
#: Device configuration follows the header, which MSI-X makes longer.
_CONFIG = 20
_CONFIG_MSIX = 24


class LegacyRegisters:
    """Two banks, of which one is there: with the vector registers while MSI-X is enabled.

    Args:
        read_isr: reads and clears the ISR status.
    """

    def __init__(
        self,
        registers: DriverRegisters,
        vectors: VectorRegisters,
        read_isr: Callable[[], int],
    ) -> None:
        self._registers = registers
        config_size = registers.device.config_size
        self.bar = Bar(LEGACY_BAR, max(power_of_two(_CONFIG_MSIX + config_size), 32), io=True)
        self.banks = (RegisterBank(self.bar.size), RegisterBank(self.bar.size))
        for bank, config in zip(self.banks, (_CONFIG, _CONFIG_MSIX), strict=True):
            bank.register(0, 4, self._read_device_features)
            bank.register(4, 4, registers.read_driver_feature, registers.write_legacy_features)
            bank.register(8, 4, self._read_queue_address, self._write_queue_address)
            bank.register(12, 2, registers.read_queue_size)
            bank.register(14, 2, self._read_queue_select, self._write_queue_select)
            bank.register(16, 2, None, registers.notify_queue)
            bank.register(18, 1, registers.read_status, self._write_status)
            bank.register(19, 1, read_isr)
            if config_size:
                bank.window(config, config_size, registers.read_config, registers.write_config)
        with_msix = self.banks[True]
        with_msix.register(20, 2, vectors.read_config_vector, vectors.write_config_vector)
        with_msix.register(22, 2, vectors.read_queue_vector, vectors.write_queue_vector)

    def _read_device_features(self) -> int:
        return self._registers.offered_legacy

    def _write_status(self, value: int) -> None:
        if value:
            self._registers.legacy = True
        self._registers.write_status(value)

    def _read_queue_select(self) -> int:
        return self._registers.queue_select

    def _write_queue_select(self, value: int) -> None:
        self._registers.queue_select = value

    def _read_queue_address(self) -> int:
        return self._registers.read_legacy_address() // _PAGE

    def _write_queue_address(self, page: int) -> None:
        """A page number starts the selected queue, 0 ends it (4.1.5.1.3.1)."""
        self._registers.write_legacy_address(page * _PAGE)
