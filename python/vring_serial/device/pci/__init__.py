"""Any virtio device as a PCI function, modern or transitional."""

from __future__ import annotations

from vring_serial.device.pci.config_space import Bar
from vring_serial.device.pci.device import NotifyOffset, PciDevice
from vring_serial.device.registers.interrupts import InterruptSink

__all__ = ["PciDevice", "Bar", "NotifyOffset", "InterruptSink"]
