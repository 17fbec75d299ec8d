"""The guest's RAM: one memfd that the backend maps too, and where in it things are."""

from __future__ import annotations

import fcntl
import mmap
import os

from vring import GuestMemory, Region, VringError
from vring_serial.errors import ResourceError
from vring_serial.guest.errors import GuestMemoryError

#: Where RAM begins in the guest's address space, and among user addresses, which are names to a
#: backend and need not be where this process maps it. Neither is 0 and they differ, so that a
#: backend which confuses vhost-user's kinds of addresses is found out at once.
GUEST_BASE = 0x4000_0000
USER_BASE = 0x1000_0000_0000
PAGE = mmap.PAGESIZE


class GuestRam:
    """Guest RAM in a memfd, sealed: it can neither shrink nor grow under the backend.

    The mapping lives as long as any view of it does; :meth:`close` only gives up the descriptor.

    Attributes:
        fd: the memfd, owned by this object.
        size: bytes.
        guest_addr: guest address of the first byte.
        user_addr: the user address of the first byte, as vhost-user calls it.
        memory: the region table over it, for rings.
    """

    def __init__(self, size: int) -> None:
        """Make RAM of ``size`` bytes, rounded up to pages. Raises ResourceError."""
        self.size = -(-size // PAGE) * PAGE
        self.guest_addr, self.user_addr = GUEST_BASE, USER_BASE
        try:
            self.fd = os.memfd_create("vring-guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise ResourceError(f"guest RAM of {self.size} bytes: {error.strerror}") from error
        try:
            os.ftruncate(self.fd, self.size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            region = Region.map(
                self.fd, self.size, guest_addr=self.guest_addr, user_addr=self.user_addr
            )
        except (OSError, OverflowError, VringError) as error:
            os.close(self.fd)
            raise ResourceError(f"guest RAM of {self.size} bytes: {error}") from error
        self.memory = GuestMemory((region,))
        self._next = 0

    def allocate(self, size: int, align: int = 8) -> int:
        """Guest address of ``size`` fresh zero bytes, aligned to ``align`` (a power of two).

        Nothing is ever given back: rings and buffers live as long as the guest.
        Raises GuestMemoryError when RAM is used up.
        """
        start = (self._next + align - 1) & -align
        if start + size > self.size:
            raise GuestMemoryError(
                f"guest RAM of {self.size >> 20} MiB is used up: {size} bytes more do not fit"
            )
        self._next = start + size
        return self.guest_addr + start

    def view(self, address: int, size: int) -> memoryview:
        """Writable bytes at a guest address that :meth:`allocate` returned."""
        return self.memory.view(address, size)

    def user_address(self, address: int) -> int:
        """Return the user address of a guest address, as SET_VRING_ADDR wants it."""
        return address - self.guest_addr + self.user_addr

    def close(self) -> None:
        """Close the descriptor. Safe to call twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
