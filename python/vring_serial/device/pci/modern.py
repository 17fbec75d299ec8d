"""The common configuration structure (virtio 1.3, 4.1.4.3)."""

from __future__ import annotations

import enum
from functools import partial
from typing import Protocol

from vring_serial.device.pci.layout import COMMON_CFG
from vring_serial.device.registers.bank import ReadHandler, RegisterBank, WriteHandler
from vring_serial.device.registers.driver_registers import DriverRegisters
from vring_serial.device.registers.state import QUEUE_AREAS


class VectorRegisters(Protocol):
    """The registers that map events to MSI-X vectors; drivers read back what they got."""

    def read_config_vector(self) -> int:
        """Return config_msix_vector."""
        ...

    def write_config_vector(self, vector: int) -> None:
        """Set config_msix_vector, or NO_VECTOR if there is no such vector."""
        ...

    def read_queue_vector(self) -> int:
        """Return queue_msix_vector of the selected queue."""
        ...

    def write_queue_vector(self, vector: int) -> None:
        """Set queue_msix_vector of the selected queue, or NO_VECTOR if there is no such vector."""
        ...


class CommonRegister(enum.IntEnum):
    """Offsets in struct virtio_pci_common_cfg."""

    DEVICE_FEATURE_SELECT = 0
    DEVICE_FEATURE = 4
    DRIVER_FEATURE_SELECT = 8
    DRIVER_FEATURE = 12
    CONFIG_MSIX_VECTOR = 16
    NUM_QUEUES = 18
    DEVICE_STATUS = 20
    CONFIG_GENERATION = 21
    QUEUE_SELECT = 22
    QUEUE_SIZE = 24
    QUEUE_MSIX_VECTOR = 26
    QUEUE_ENABLE = 28
    QUEUE_NOTIFY_OFF = 30
    QUEUE_DESC = 32
    QUEUE_DRIVER = 40
    QUEUE_DEVICE = 48
    QUEUE_NOTIF_CONFIG_DATA = 56
    QUEUE_RESET = 58


#: The addresses of the areas, 8 bytes each.
COMMON_AREAS = (
    CommonRegister.QUEUE_DESC,
    CommonRegister.QUEUE_DRIVER,
    CommonRegister.QUEUE_DEVICE,
)


class CommonConfig:
    """Puts struct virtio_pci_common_cfg into a bank."""

    def __init__(
        self, registers: DriverRegisters, vectors: VectorRegisters, bank: RegisterBank
    ) -> None:
        self._selected = selected = registers.selected
        features, state, reg = registers.features, registers.state, CommonRegister

        def at(
            offset: int,
            width: int,
            read: ReadHandler | None = None,
            write: WriteHandler | None = None,
        ) -> None:
            bank.register(COMMON_CFG + offset, width, read, write)

        for offset, width, name in (
            (reg.DEVICE_FEATURE_SELECT, 4, "device_feature_select"),
            (reg.DRIVER_FEATURE_SELECT, 4, "driver_feature_select"),
            (reg.QUEUE_SELECT, 2, "queue_select"),
        ):
            at(offset, width, partial(getattr, state, name), partial(setattr, state, name))
        at(reg.DEVICE_FEATURE, 4, features.read_device)
        at(reg.DRIVER_FEATURE, 4, features.read_driver, features.write_driver)
        at(reg.CONFIG_MSIX_VECTOR, 2, vectors.read_config_vector, vectors.write_config_vector)
        at(reg.NUM_QUEUES, 2, lambda: len(registers.queues))
        at(reg.DEVICE_STATUS, 1, registers.read_status, registers.write_status)
        at(reg.CONFIG_GENERATION, 1, lambda: state.config_generation)
        at(reg.QUEUE_SIZE, 2, selected.read_size, selected.write_size)
        at(reg.QUEUE_MSIX_VECTOR, 2, vectors.read_queue_vector, vectors.write_queue_vector)
        at(reg.QUEUE_ENABLE, 2, selected.read_enable, self._write_queue_enable)
        at(reg.QUEUE_NOTIFY_OFF, 2, self._read_queue_index)
        for offset, area in zip(COMMON_AREAS, QUEUE_AREAS, strict=True):
            for half in (0, 1):
                at(
                    offset + 4 * half,
                    4,
                    partial(selected.read_area, area, 32 * half),
                    partial(selected.write_area, area, 32 * half),
                )
        at(reg.QUEUE_NOTIF_CONFIG_DATA, 2, self._read_queue_index)
        # A reset is over before the write that asks for it returns: it never reads as 1.
        at(reg.QUEUE_RESET, 2, None, self._write_queue_reset)

    def _write_queue_enable(self, value: int) -> None:
        # A driver must not write 0 here; RING_RESET is the way.
        if value == 1:
            self._selected.enable()

    def _read_queue_index(self) -> int:
        setup = self._selected.setup
        return 0 if setup is None else setup.index

    def _write_queue_reset(self, value: int) -> None:
        if value == 1:
            self._selected.reset()
