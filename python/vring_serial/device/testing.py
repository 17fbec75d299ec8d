"""A driver's view of registers, for tests, benchmarks and examples: one driver per layout.

They do what a driver must (virtio 1.3, 3.1) and no more; rings are the caller's business.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol

from vring_serial.device.pci.config_space import Command, Register
from vring_serial.device.pci.layout import MSIX_CAPABILITY, VENDOR_CAPABILITY, CapabilityType
from vring_serial.device.pci.legacy import PAGE, LegacyRegister
from vring_serial.device.pci.modern import COMMON_AREAS, CommonRegister
from vring_serial.device.registers.mmio import MMIO_AREAS, MmioRegister
from vring_serial.device.registers.state import NO_VECTOR
from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.virtio import MMIO_MAGIC, Feature, Status

Read = Callable[[int, int], int]
Write = Callable[[int, int, int], None]

_READY = Status.ACKNOWLEDGE | Status.DRIVER


class RegisterDriver(Protocol):
    """What every layout of registers lets a driver do.

    Attributes:
        alignment: of the used ring in a queue that is laid out as legacy drivers do; 0: the three
            areas may be anywhere.
    """

    alignment: int

    @property
    def status(self) -> int:
        """The device status (2.1); set it to write the register."""
        ...

    @status.setter
    def status(self, value: int) -> None: ...
    def accept(self, wanted: int) -> int:
        """Reset the device, accept the features of ``wanted`` that it offers, and return them.

        Raises RemoteProtocolError if the device does not take them.
        """
        ...

    def queue_size(self, index: int) -> int:
        """Return the largest size of a queue; 0 if there is no such queue."""
        ...

    def start_queue(
        self, index: int, size: int, areas: tuple[int, int, int], *, vector: int = NO_VECTOR
    ) -> None:
        """Enable a queue; ``areas``: guest addresses of descriptor, driver and device area."""
        ...

    def reset_queue(self, index: int) -> None:
        """Reset a queue, or disable it where that is all there is."""
        ...

    def notify(self, index: int, data: int | None = None) -> None:
        """Notify the device of available buffers.

        ``data``: with NOTIFICATION_DATA, the result of ``vring.Driver.notification_data(index)``.
        """
        ...

    def take_events(self) -> int:
        """Return the events of the interrupt, and acknowledge them."""
        ...

    def read_config(self, offset: int, size: int) -> int:
        """Return ``size`` bytes of the device configuration, little-endian."""
        ...

    def write_config(self, offset: int, value: int, size: int) -> None:
        """Write ``size`` bytes of the device configuration, little-endian."""
        ...


def _negotiate(driver: RegisterDriver, write_features: Callable[[], None], modern: bool) -> None:
    driver.status = Status(0)
    if driver.status != 0:
        raise RemoteProtocolError("the device is not reset")
    driver.status = Status.ACKNOWLEDGE
    driver.status = _READY
    write_features()
    if modern:
        driver.status = _READY | Status.FEATURES_OK
        if not driver.status & Status.FEATURES_OK:
            raise RemoteProtocolError("the device does not take these features")


class PciDriver(RegisterDriver):
    """Drives a PCI function through the structures that its capabilities name.

    Args:
        config_read, config_write: its configuration space.
        bar: returns how to read and write behind a BAR.
    """

    alignment = 0

    def __init__(
        self,
        config_read: Read,
        config_write: Write,
        bar: Callable[[int], tuple[Read, Write]],
    ) -> None:
        self._config_read = config_read
        self.structures: dict[int, tuple[int, int, int]] = {}  # by cfg_type: bar, offset, length
        self.msix_capability = 0
        self.window_capability = 0
        self._multiplier = 0
        self._walk()
        config_write(Register.COMMAND, Command.MEMORY_SPACE | Command.BUS_MASTER, 2)
        self._bar, self._common, _ = self.structures[CapabilityType.COMMON_CFG]
        self._read, self._write = bar(self._bar)
        _, self._notify_at, _ = self.structures[CapabilityType.NOTIFY_CFG]

    def _walk(self) -> None:
        at = self._config_read(Register.CAPABILITIES, 1)
        while at:
            kind = self._config_read(at, 1)
            if kind == MSIX_CAPABILITY:
                self.msix_capability = at
            elif kind == VENDOR_CAPABILITY:
                raw = self._config_read(at, 20).to_bytes(20, "little")
                cfg_type, bar, offset, length, extra = struct.unpack_from("<3xBB3xIII", raw)
                if cfg_type == CapabilityType.PCI_CFG:
                    self.window_capability = at
                else:
                    self.structures.setdefault(cfg_type, (bar, offset, length))
                    if cfg_type == CapabilityType.NOTIFY_CFG:
                        self._multiplier = extra
            at = self._config_read(at + 1, 1)

    def read_common(self, offset: int, size: int) -> int:
        """From the common configuration structure."""
        return self._read(self._common + offset, size)

    def write_common(self, offset: int, value: int, size: int) -> None:
        """To the common configuration structure."""
        self._write(self._common + offset, value, size)

    @property
    def status(self) -> int:
        return self.read_common(CommonRegister.DEVICE_STATUS, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.write_common(CommonRegister.DEVICE_STATUS, value, 1)

    def offered(self) -> int:
        """Return the feature bits that the device offers."""
        bits = 0
        for word in (0, 1):
            self.write_common(CommonRegister.DEVICE_FEATURE_SELECT, word, 4)
            bits |= self.read_common(CommonRegister.DEVICE_FEATURE, 4) << 32 * word
        return bits

    def accept(self, wanted: int) -> int:
        bits = self.offered() & wanted

        def write() -> None:
            for word in (0, 1):
                self.write_common(CommonRegister.DRIVER_FEATURE_SELECT, word, 4)
                self.write_common(CommonRegister.DRIVER_FEATURE, bits >> 32 * word & 0xFFFFFFFF, 4)

        _negotiate(self, write, modern=True)
        return bits

    def queue_size(self, index: int) -> int:
        self.write_common(CommonRegister.QUEUE_SELECT, index, 2)
        return self.read_common(CommonRegister.QUEUE_SIZE, 2)

    def start_queue(
        self, index: int, size: int, areas: tuple[int, int, int], *, vector: int = NO_VECTOR
    ) -> None:
        self.write_common(CommonRegister.QUEUE_SELECT, index, 2)
        self.write_common(CommonRegister.QUEUE_SIZE, size, 2)
        self.write_common(CommonRegister.QUEUE_MSIX_VECTOR, vector, 2)
        for offset, address in zip(COMMON_AREAS, areas, strict=True):
            self.write_common(offset, address & 0xFFFFFFFF, 4)
            self.write_common(offset + 4, address >> 32, 4)
        self.write_common(CommonRegister.QUEUE_ENABLE, 1, 2)

    def reset_queue(self, index: int) -> None:
        self.write_common(CommonRegister.QUEUE_SELECT, index, 2)
        self.write_common(CommonRegister.QUEUE_RESET, 1, 2)

    def notify(self, index: int, data: int | None = None) -> None:
        self.write_common(CommonRegister.QUEUE_SELECT, index, 2)
        offset = (
            self._notify_at
            + self.read_common(CommonRegister.QUEUE_NOTIFY_OFF, 2) * self._multiplier
        )
        if data is None:
            self._write(offset, index, 2)
        else:
            self._write(offset, data, 4)

    def take_events(self) -> int:
        return self._read(self.structures[CapabilityType.ISR_CFG][1], 1)

    def read_config(self, offset: int, size: int) -> int:
        return self._read(self.structures[CapabilityType.DEVICE_CFG][1] + offset, size)

    def write_config(self, offset: int, value: int, size: int) -> None:
        self._write(self.structures[CapabilityType.DEVICE_CFG][1] + offset, value, size)


class LegacyPciDriver(RegisterDriver):
    """Drives a transitional PCI function through its I/O registers.

    Attributes:
        msix: set by the caller while MSI-X is enabled, which moves the configuration.
    """

    alignment = PAGE

    def __init__(self, config_write: Write, read: Read, write: Write) -> None:
        config_write(Register.COMMAND, Command.IO_SPACE | Command.BUS_MASTER, 2)
        self._read = read
        self._write = write
        self.msix = False

    @property
    def _config(self) -> int:
        reg = LegacyRegister
        return reg.CONFIG_WITH_MSIX if self.msix else reg.CONFIG_WITHOUT_MSIX

    @property
    def status(self) -> int:
        return self._read(LegacyRegister.DEVICE_STATUS, 1)

    @status.setter
    def status(self, value: int) -> None:
        self._write(LegacyRegister.DEVICE_STATUS, value, 1)

    def accept(self, wanted: int) -> int:
        bits = self._read(LegacyRegister.DEVICE_FEATURES, 4) & wanted
        _negotiate(self, lambda: self._write(LegacyRegister.DRIVER_FEATURES, bits, 4), modern=False)
        return bits

    def queue_size(self, index: int) -> int:
        self._write(LegacyRegister.QUEUE_SELECT, index, 2)
        return self._read(LegacyRegister.QUEUE_SIZE, 2)

    def start_queue(
        self, index: int, size: int, areas: tuple[int, int, int], *, vector: int = NO_VECTOR
    ) -> None:
        self._write(LegacyRegister.QUEUE_SELECT, index, 2)
        self._write(LegacyRegister.QUEUE_ADDRESS, areas[0] // PAGE, 4)
        if self.msix:
            self._write(LegacyRegister.QUEUE_MSIX_VECTOR, vector, 2)

    def reset_queue(self, index: int) -> None:
        self._write(LegacyRegister.QUEUE_SELECT, index, 2)
        self._write(LegacyRegister.QUEUE_ADDRESS, 0, 4)

    def notify(self, index: int, data: int | None = None) -> None:
        self._write(LegacyRegister.QUEUE_NOTIFY, index, 2)

    def take_events(self) -> int:
        return self._read(LegacyRegister.ISR_STATUS, 1)

    def read_config(self, offset: int, size: int) -> int:
        return self._read(self._config + offset, size)

    def write_config(self, offset: int, value: int, size: int) -> None:
        self._write(self._config + offset, value, size)


class MmioDriver(RegisterDriver):
    """Drives a virtio-mmio device of either version.

    Raises RemoteProtocolError if there is none.
    """

    def __init__(self, read: Read, write: Write) -> None:
        self._read = read
        self._write = write
        if read(MmioRegister.MAGIC_VALUE, 4) != MMIO_MAGIC:
            raise RemoteProtocolError("no virtio-mmio device")
        self.version = read(MmioRegister.VERSION, 4)
        self.alignment = PAGE if self.version == 1 else 0

    @property
    def status(self) -> int:
        return self._read(MmioRegister.STATUS, 4)

    @status.setter
    def status(self, value: int) -> None:
        self._write(MmioRegister.STATUS, value, 4)

    def offered(self) -> int:
        """Return the feature bits that the device offers."""
        bits = 0
        for word in (0, 1):
            self._write(MmioRegister.DEVICE_FEATURES_SEL, word, 4)
            bits |= self._read(MmioRegister.DEVICE_FEATURES, 4) << 32 * word
        return bits

    def accept(self, wanted: int) -> int:
        bits = self.offered() & wanted

        def write() -> None:
            for word in (0, 1):
                self._write(MmioRegister.DRIVER_FEATURES_SEL, word, 4)
                self._write(MmioRegister.DRIVER_FEATURES, bits >> 32 * word & 0xFFFFFFFF, 4)
            if self.version == 1:
                self._write(MmioRegister.GUEST_PAGE_SIZE, PAGE, 4)

        _negotiate(self, write, modern=self.version == 2)
        return bits

    def queue_size(self, index: int) -> int:
        self._write(MmioRegister.QUEUE_SEL, index, 4)
        return self._read(MmioRegister.QUEUE_NUM_MAX, 4)

    def start_queue(
        self, index: int, size: int, areas: tuple[int, int, int], *, vector: int = NO_VECTOR
    ) -> None:
        self._write(MmioRegister.QUEUE_SEL, index, 4)
        self._write(MmioRegister.QUEUE_NUM, size, 4)
        if self.version == 1:
            self._write(MmioRegister.QUEUE_ALIGN, self.alignment, 4)
            self._write(MmioRegister.QUEUE_PFN, areas[0] // PAGE, 4)
            return
        for offset, address in zip(MMIO_AREAS, areas, strict=True):
            self._write(offset, address & 0xFFFFFFFF, 4)
            self._write(offset + 4, address >> 32, 4)
        self._write(MmioRegister.QUEUE_READY, 1, 4)

    def reset_queue(self, index: int) -> None:
        self._write(MmioRegister.QUEUE_SEL, index, 4)
        legacy = self.version == 1
        self._write(MmioRegister.QUEUE_PFN if legacy else MmioRegister.QUEUE_READY, 0, 4)

    def notify(self, index: int, data: int | None = None) -> None:
        self._write(MmioRegister.QUEUE_NOTIFY, index if data is None else data, 4)

    def take_events(self) -> int:
        events = self._read(MmioRegister.INTERRUPT_STATUS, 4)
        self._write(MmioRegister.INTERRUPT_ACK, events, 4)
        return events

    def read_config(self, offset: int, size: int) -> int:
        return self._read(MmioRegister.CONFIG + offset, size)

    def write_config(self, offset: int, value: int, size: int) -> None:
        self._write(MmioRegister.CONFIG + offset, value, size)


_NOT_ANY = int(Feature.RING_PACKED | Feature.IN_ORDER | Feature.NOTIFICATION_DATA)
#: What a driver that knows the device and the rings accepts, and that notifies without data. A
#: number's complement, for that of a Feature has no bit that is unknown here.
ANY_FEATURE = (1 << 64) - 1 & ~_NOT_ANY
