"""A driver's view of registers, for tests, benchmarks and examples: one driver per layout.

They do what a driver must (virtio 1.3, 3.1) and no more; rings are the caller's business.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol

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
    def status(self) -> int: ...
    @status.setter
    def status(self, value: int) -> None: ...
    def accept(self, wanted: int) -> int:
        """Reset the device and accept those of ``wanted`` that it offers; returns them.

        Raises RemoteProtocolError if the device does not take them.
        """
        ...

    def queue_size(self, index: int) -> int:
        """The largest size of a queue; 0 if there is no such queue."""
        ...

    def start_queue(
        self, index: int, size: int, areas: tuple[int, int, int], *, vector: int = 0xFFFF
    ) -> None:
        """Enable a queue: guest addresses of descriptor, driver and device area."""
        ...

    def reset_queue(self, index: int) -> None:
        """Reset a queue, or disable it where that is all there is."""
        ...

    def notify(self, index: int, data: int | None = None) -> None:
        """The driver has made buffers available. ``data``: with NOTIFICATION_DATA, what
        ``vring.Driver.notification_data(index)`` says."""
        ...

    def take_events(self) -> int:
        """The interrupt's events, which are acknowledged by this."""
        ...

    def read_config(self, offset: int, size: int) -> int:
        """From the device's configuration."""
        ...

    def write_config(self, offset: int, value: int, size: int) -> None:
        """To the device's configuration."""
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


class PciDriver:
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
        config_write(0x04, 0b110, 2)  # memory space and bus mastering
        self._bar, self._common, _ = self.structures[1]
        self._read, self._write = bar(self._bar)
        _, self._notify_at, _ = self.structures[2]

    def _walk(self) -> None:
        at = self._config_read(0x34, 1)
        while at:
            kind = self._config_read(at, 1)
            if kind == 0x11:
                self.msix_capability = at
            elif kind == 0x09:
                raw = self._config_read(at, 20).to_bytes(20, "little")
                cfg_type, bar, offset, length, extra = struct.unpack_from("<3xBB3xIII", raw)
                if cfg_type == 5:
                    self.window_capability = at
                else:
                    self.structures.setdefault(cfg_type, (bar, offset, length))
                    if cfg_type == 2:
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
        return self.read_common(20, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.write_common(20, value, 1)

    def offered(self) -> int:
        """The device's features."""
        bits = 0
        for word in (0, 1):
            self.write_common(0, word, 4)
            bits |= self.read_common(4, 4) << 32 * word
        return bits

    def accept(self, wanted: int) -> int:
        bits = self.offered() & wanted

        def write() -> None:
            for word in (0, 1):
                self.write_common(8, word, 4)
                self.write_common(12, bits >> 32 * word & 0xFFFFFFFF, 4)

        _negotiate(self, write, modern=True)
        return bits

    def queue_size(self, index: int) -> int:
        self.write_common(22, index, 2)
        return self.read_common(24, 2)

    def start_queue(
        self, index: int, size: int, areas: tuple[int, int, int], *, vector: int = 0xFFFF
    ) -> None:
        self.write_common(22, index, 2)
        self.write_common(24, size, 2)
        self.write_common(26, vector, 2)
        for offset, address in zip((32, 40, 48), areas, strict=True):
            self.write_common(offset, address & 0xFFFFFFFF, 4)
            self.write_common(offset + 4, address >> 32, 4)
        self.write_common(28, 1, 2)

    def reset_queue(self, index: int) -> None:
        self.write_common(22, index, 2)
        self.write_common(58, 1, 2)

    def notify(self, index: int, data: int | None = None) -> None:
        self.write_common(22, index, 2)
        offset = self._notify_at + self.read_common(30, 2) * self._multiplier
        if data is None:
            self._write(offset, index, 2)
        else:
            self._write(offset, data, 4)

    def take_events(self) -> int:
        return self._read(self.structures[3][1], 1)

    def read_config(self, offset: int, size: int) -> int:
        return self._read(self.structures[4][1] + offset, size)

    def write_config(self, offset: int, value: int, size: int) -> None:
        self._write(self.structures[4][1] + offset, value, size)


class LegacyPciDriver:
    """Drives a transitional PCI function through its I/O registers."""

    alignment = 4096

    def __init__(self, config_write: Write, read: Read, write: Write) -> None:
        config_write(0x04, 0b101, 2)  # I/O space and bus mastering
        self._read = read
        self._write = write
        self.msix = False  # enabled: the configuration lies elsewhere

    @property
    def status(self) -> int:
        return self._read(18, 1)

    @status.setter
    def status(self, value: int) -> None:
        self._write(18, value, 1)

    def accept(self, wanted: int) -> int:
        bits = self._read(0, 4) & wanted
        _negotiate(self, lambda: self._write(4, bits, 4), modern=False)
        return bits

    def queue_size(self, index: int) -> int:
        self._write(14, index, 2)
        return self._read(12, 2)

    def start_queue(
        self, index: int, size: int, areas: tuple[int, int, int], *, vector: int = 0xFFFF
    ) -> None:
        self._write(14, index, 2)
        self._write(8, areas[0] >> 12, 4)
        if self.msix:
            self._write(22, vector, 2)

    def reset_queue(self, index: int) -> None:
        self._write(14, index, 2)
        self._write(8, 0, 4)

    def notify(self, index: int, data: int | None = None) -> None:
        self._write(16, index, 2)

    def take_events(self) -> int:
        return self._read(19, 1)

    def read_config(self, offset: int, size: int) -> int:
        return self._read((24 if self.msix else 20) + offset, size)

    def write_config(self, offset: int, value: int, size: int) -> None:
        self._write((24 if self.msix else 20) + offset, value, size)


class MmioDriver:
    """Drives a virtio-mmio device of either version.

    Raises RemoteProtocolError if there is none.
    """

    def __init__(self, read: Read, write: Write) -> None:
        self._read = read
        self._write = write
        if read(0, 4) != MMIO_MAGIC:
            raise RemoteProtocolError("no virtio-mmio device")
        self.version = read(4, 4)
        self.alignment = 4096 if self.version == 1 else 0

    @property
    def status(self) -> int:
        return self._read(0x70, 4)

    @status.setter
    def status(self, value: int) -> None:
        self._write(0x70, value, 4)

    def offered(self) -> int:
        """The device's features."""
        bits = 0
        for word in (0, 1):
            self._write(0x14, word, 4)
            bits |= self._read(0x10, 4) << 32 * word
        return bits

    def accept(self, wanted: int) -> int:
        bits = self.offered() & wanted

        def write() -> None:
            for word in (0, 1):
                self._write(0x24, word, 4)
                self._write(0x20, bits >> 32 * word & 0xFFFFFFFF, 4)
            if self.version == 1:
                self._write(0x28, 4096, 4)

        _negotiate(self, write, modern=self.version == 2)
        return bits

    def queue_size(self, index: int) -> int:
        self._write(0x30, index, 4)
        return self._read(0x34, 4)

    def start_queue(
        self, index: int, size: int, areas: tuple[int, int, int], *, vector: int = 0xFFFF
    ) -> None:
        self._write(0x30, index, 4)
        self._write(0x38, size, 4)
        if self.version == 1:
            self._write(0x3C, self.alignment, 4)
            self._write(0x40, areas[0] // 4096, 4)
            return
        for offset, address in zip((0x80, 0x90, 0xA0), areas, strict=True):
            self._write(offset, address & 0xFFFFFFFF, 4)
            self._write(offset + 4, address >> 32, 4)
        self._write(0x44, 1, 4)

    def reset_queue(self, index: int) -> None:
        self._write(0x30, index, 4)
        self._write(0x40 if self.version == 1 else 0x44, 0, 4)

    def notify(self, index: int, data: int | None = None) -> None:
        self._write(0x50, index if data is None else data, 4)

    def take_events(self) -> int:
        events = self._read(0x60, 4)
        self._write(0x64, events, 4)
        return events

    def read_config(self, offset: int, size: int) -> int:
        return self._read(0x100 + offset, size)

    def write_config(self, offset: int, value: int, size: int) -> None:
        self._write(0x100 + offset, value, size)


_NOT_ANY = int(Feature.RING_PACKED | Feature.IN_ORDER | Feature.NOTIFICATION_DATA)
#: What a driver that knows the device and the rings accepts, and that notifies without data. A
#: number's complement, for that of a Feature has no bit that is unknown here.
ANY_FEATURE = (1 << 64) - 1 & ~_NOT_ANY
