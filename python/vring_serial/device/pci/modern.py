"""The common configuration structure (virtio 1.3, 4.1.4.3)."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from vring_serial.device.pci.layout import COMMON_CFG
from vring_serial.device.registers.bank import RegisterBank
from vring_serial.device.registers.driver_registers import DriverRegisters


class VectorRegisters(Protocol):
    """The registers that map events to MSI-X vectors; drivers read back what they got."""

    def read_config_vector(self) -> int: ...
    def write_config_vector(self, vector: int) -> None: ...
    def read_queue_vector(self) -> int: ...
    def write_queue_vector(self, vector: int) -> None: ...


class CommonConfig:
    """Puts struct virtio_pci_common_cfg into a bank."""

    def __init__(
        self, registers: DriverRegisters, vectors: VectorRegisters, bank: RegisterBank
    ) -> None:
        self._registers = registers
        at = partial(bank.register)
        base = COMMON_CFG
        at(base + 0, 4, self._read_device_feature_select, self._write_device_feature_select)
        at(base + 4, 4, registers.read_device_feature)
        at(base + 8, 4, self._read_driver_feature_select, self._write_driver_feature_select)
        at(base + 12, 4, registers.read_driver_feature, registers.write_driver_feature)
        at(base + 16, 2, vectors.read_config_vector, vectors.write_config_vector)
        at(base + 18, 2, self._read_num_queues)
        at(base + 20, 1, registers.read_status, registers.write_status)
        at(base + 21, 1, self._read_generation)
        at(base + 22, 2, self._read_queue_select, self._write_queue_select)
        at(base + 24, 2, registers.read_queue_size, registers.write_queue_size)
        at(base + 26, 2, vectors.read_queue_vector, vectors.write_queue_vector)
        at(base + 28, 2, registers.read_queue_enable, self._write_queue_enable)
        at(base + 30, 2, self._read_queue_notify_off)
        areas = ("descriptor_area", "driver_area", "device_area")
        for offset, area in zip((32, 40, 48), areas, strict=True):
            for half in (0, 1):
                at(
                    base + offset + 4 * half,
                    4,
                    partial(registers.read_area, area, 32 * half),
                    partial(registers.write_area, area, 32 * half),
                )
        at(base + 56, 2, self._read_notif_config_data)
        # A reset is over before the write that asks for it returns: it never reads as 1.
        at(base + 58, 2, None, self._write_queue_reset)

    def _read_device_feature_select(self) -> int:
        return self._registers.device_feature_select

    def _write_device_feature_select(self, value: int) -> None:
        self._registers.device_feature_select = value

    def _read_driver_feature_select(self) -> int:
        return self._registers.driver_feature_select

    def _write_driver_feature_select(self, value: int) -> None:
        self._registers.driver_feature_select = value

    def _read_num_queues(self) -> int:
        return len(self._registers.queues)

    def _read_generation(self) -> int:
        return self._registers.generation

    def _read_queue_select(self) -> int:
        return self._registers.queue_select

    def _write_queue_select(self, value: int) -> None:
        self._registers.queue_select = value

    def _write_queue_enable(self, value: int) -> None:
        # A driver must not write 0 here; RING_RESET is the way.
        if value == 1:
            self._registers.enable_queue()

    def _read_queue_notify_off(self) -> int:
        index = self._registers.queue_select
        return index if index < len(self._registers.queues) else 0

    def _read_notif_config_data(self) -> int:
        return self._read_queue_notify_off()

    def _write_queue_reset(self, value: int) -> None:
        if value == 1:
            self._registers.reset_queue()
