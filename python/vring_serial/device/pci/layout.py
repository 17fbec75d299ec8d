"""The places of the structures of a virtio function, and their capabilities (4.1.4)."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from vring_serial.device.pci.config_space import Bar
from vring_serial.device.pci.state import ENTRY_SIZE

#: BAR numbers: legacy drivers demand 0 for their registers.
LEGACY_BAR = 0
MSIX_BAR = 1
VIRTIO_BAR = 4

COMMON_CFG = 0x0000
COMMON_CFG_SIZE = 0x40
ISR_CFG = 0x1000
ISR_CFG_SIZE = 4
DEVICE_CFG = 0x2000
DEVICE_CFG_MAX = 0x1000
NOTIFY_CFG = 0x3000
#: Bytes between the places where two queues are notified; a driver with NOTIFICATION_DATA writes 4.
NOTIFY_MULTIPLIER = 4

#: Capability ids.
VENDOR_CAPABILITY = 0x09
MSIX_CAPABILITY = 0x11
_PBA_ALIGNMENT = 0x800


class CapabilityType(enum.IntEnum):
    """cfg_type (4.1.4)."""

    COMMON_CFG = 1
    NOTIFY_CFG = 2
    ISR_CFG = 3
    DEVICE_CFG = 4
    PCI_CFG = 5


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes and places that depend on the device.

    Attributes:
        num_queues, config_size: the device's.
        vectors: entries of the MSI-X table.
    """

    num_queues: int
    config_size: int
    vectors: int

    @property
    def notify_size(self) -> int:
        """Bytes of the notification structure."""
        return NOTIFY_MULTIPLIER * self.num_queues

    @property
    def pba_offset(self) -> int:
        """Offset of the pending bit array in its BAR."""
        return -(-ENTRY_SIZE * self.vectors // _PBA_ALIGNMENT) * _PBA_ALIGNMENT

    @property
    def virtio_bar(self) -> Bar:
        """The BAR of all virtio structures."""
        return Bar(VIRTIO_BAR, power_of_two(NOTIFY_CFG + self.notify_size))

    @property
    def msix_bar(self) -> Bar:
        """The BAR of the MSI-X table and pending bits."""
        pba_size = (self.vectors + 63) // 64 * 8
        return Bar(MSIX_BAR, max(power_of_two(self.pba_offset + pba_size), 0x1000))

    def msix_capability(self) -> bytes:
        """Return the MSI-X capability (PCI 3.0, 6.8.2)."""
        return struct.pack(
            "<BBHII",
            MSIX_CAPABILITY,
            0,
            self.vectors - 1,
            MSIX_BAR,
            self.pba_offset | MSIX_BAR,
        )

    def virtio_capabilities(self) -> list[bytes]:
        """Return the capabilities of the structures in the BAR, the preferred ones first."""
        common = virtio_capability(CapabilityType.COMMON_CFG, COMMON_CFG, COMMON_CFG_SIZE)
        multiplier = struct.pack("<I", NOTIFY_MULTIPLIER)
        notify = virtio_capability(
            CapabilityType.NOTIFY_CFG, NOTIFY_CFG, self.notify_size, multiplier
        )
        isr = virtio_capability(CapabilityType.ISR_CFG, ISR_CFG, ISR_CFG_SIZE)
        if not self.config_size:
            return [common, notify, isr]
        device = virtio_capability(CapabilityType.DEVICE_CFG, DEVICE_CFG, self.config_size)
        return [common, notify, isr, device]


def virtio_capability(kind: CapabilityType, offset: int, length: int, extra: bytes = b"") -> bytes:
    """Return a struct virtio_pci_cap (4.1.4) followed by ``extra``."""
    size = 16 + len(extra)
    head = struct.pack(
        "<BBBBBB2xII", VENDOR_CAPABILITY, 0, size, kind, VIRTIO_BAR, 0, offset, length
    )
    return head + extra


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()
