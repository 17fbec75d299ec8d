"""Notification data (NOTIFICATION_DATA) as the device reads it (virtio 1.3, 2.9)."""

from __future__ import annotations

from typing import NamedTuple

from vring.errors import LocalMisuseError


class NotificationData(NamedTuple):
    """The fields of the 32 bits of an available buffer notification.

    The driver's side makes them with :meth:`vring.Driver.notification_data`. Use them only for
    debugging and as hints: the ring itself says what is available, and a driver may send the same
    data again without having added anything.

    Attributes:
        queue: the queue's index (4.1.5.2, 4.2.3.3), or with NOTIF_CONFIG_DATA the notification
            data of its configuration; 16 bits, unchecked.
        next_offset: next position that the driver writes, 15 bits. Packed: a descriptor index,
            unchecked, so it may be past the ring's end. Split: low bits of the available index.
        next_wrap: packed: the driver's wrap counter there. Split: bit 15 of the available index.
    """

    queue: int
    next_offset: int
    next_wrap: bool

    @classmethod
    def unpack(cls, value: int) -> NotificationData:
        """Split the 32-bit number that the driver wrote (little-endian) into its fields.

        Raises:
            LocalMisuseError: `value` does not fit 32 bits.
        """
        if not 0 <= value < 1 << 32:
            raise LocalMisuseError(f"notification data {value:#x} is not of 32 bits")
        return cls(value & 0xFFFF, value >> 16 & 0x7FFF, bool(value >> 31))

    @property
    def avail_index(self) -> int:
        """Next available index of the driver, in the form of ``queue.avail_index``."""
        return self.next_offset | self.next_wrap << 15
