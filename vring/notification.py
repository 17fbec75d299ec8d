"""What a kick carries with NOTIFICATION_DATA, as the device reads it (virtio 1.3, 2.9)."""

from __future__ import annotations

from typing import NamedTuple

from vring.errors import LocalMisuseError


class NotificationData(NamedTuple):
    """The 32 bits of an available buffer notification, taken apart.

    The driver's side makes them with :meth:`vring.Driver.notification_data`. They are the driver's
    word, for debugging and for hints: the ring itself says what is available, and a driver may send
    the same data again without having added anything.

    Attributes:
        queue: the queue's index (4.1.5.2, 4.2.3.3), or the notification data of its
            configuration with NOTIF_CONFIG_DATA; 16 bits, to be checked.
        next_offset: where the driver writes next, 15 bits. Packed: a descriptor index, which a
            wrong driver may put past the ring's end. Split: the available index's low bits.
        next_wrap: packed: the driver's wrap counter there. Split: bit 15 of the available index.
    """

    queue: int
    next_offset: int
    next_wrap: bool

    @classmethod
    def unpack(cls, value: int) -> NotificationData:
        """Take apart the little-endian 32-bit number that the driver wrote.

        Raises:
            LocalMisuseError: `value` is not of 32 bits.
        """
        if not 0 <= value < 1 << 32:
            raise LocalMisuseError(f"notification data {value:#x} is not of 32 bits")
        return cls(value & 0xFFFF, value >> 16 & 0x7FFF, bool(value >> 31))

    @property
    def avail_index(self) -> int:
        """The driver's next available index, in the form of ``queue.avail_index``."""
        return self.next_offset | self.next_wrap << 15
