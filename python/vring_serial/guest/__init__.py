"""The embedded guest: RAM, a virtio-console driver and a SPICE guest agent in one process.

:class:`EmbeddedGuest` drives any vhost-user console backend; each of its ports is a
:class:`GuestPort` with asyncio streams. The errors are in :mod:`vring_serial.guest.errors`.
"""

from __future__ import annotations

from vring_serial.guest.guest import BackendLost, EmbeddedGuest, GuestEvent
from vring_serial.guest.port import GuestPort

__all__ = ["EmbeddedGuest", "GuestPort", "GuestEvent", "BackendLost"]
