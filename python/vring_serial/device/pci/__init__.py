"""Any virtio device as a PCI function, modern or transitional."""

from __future__ import annotations

from vring_serial.device.interrupts import InterruptSink
from vring_serial.device.pci.config_space import Bar
from vring_serial.device.pci.device import NotifyOffset, PciDevice

__all__ = ["PciDevice", "Bar", "NotifyOffset", "InterruptSink"]
