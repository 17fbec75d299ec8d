"""What any virtio device has: identification, feature bits, status, limits of its queues.

Section numbers are those of the virtio specification 1.3.
"""

from __future__ import annotations

import enum

#: PCI vendor of virtio functions (4.1.2), and what QEMU's virtio-mmio devices give as theirs.
VENDOR_ID = 0x1AF4
#: MagicValue of virtio-mmio: "virt", little-endian (4.2.2).
MMIO_MAGIC = 0x74726976
#: Most descriptors of one queue (2.7, 2.8).
QUEUE_SIZE_MAX = 32768
#: Feature bits below this one belong to the device type (2.2).
DEVICE_TYPE_BITS = 24


class Feature(enum.IntFlag):
    """Feature bits of any device, by their place in the 64-bit feature word (6)."""

    NOTIFY_ON_EMPTY = 1 << 24
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    NOTIF_CONFIG_DATA = 1 << 39
    RING_RESET = 1 << 40


class Status(enum.IntFlag):
    """Device status bits (2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


def feature_names(bits: int, device_type: type[enum.IntFlag] = Feature) -> str:
    """Return the names of feature bits for logs: ``SIZE VERSION_1``; unknown ones as ``bit N``.

    Args:
        bits: a feature word.
        device_type: the bits of the device type, such as ``ConsoleFeature``.
    """
    names = []
    for place in range(bits.bit_length()):
        if bits >> place & 1:
            flags = device_type if place < DEVICE_TYPE_BITS else Feature
            names.append(flags(1 << place).name or f"bit {place}")
    return " ".join(names) or "none"
