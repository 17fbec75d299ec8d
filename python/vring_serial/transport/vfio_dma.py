"""The client's memory as it maps it for DMA (VFIO_USER_DMA_MAP, VFIO_USER_DMA_UNMAP)."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from vring import GuestMemory, MemoryWatch, Region
from vring.errors import VringError
from vring_serial.errors import ProtocolError
from vring_serial.proto.vfio_user import VfioUserError
from vring_serial.proto.vfio_user_wire import DmaFlag, DmaMap, DmaUnmap, UnmapFlag


@dataclass(frozen=True, slots=True)
class DmaRegion:
    """One mapping.

    Attributes:
        address, size: where, and how many bytes.
        flags: DmaFlag.
        region: the mapped memory; None if there is no descriptor.
    """

    address: int
    size: int
    flags: int
    region: Region | None

    @property
    def end(self) -> int:
        return self.address + self.size


class DmaTable:
    """All mappings of one client.

    Args:
        most: mappings that there may be at once.
        watch: tells of lost memory.
    """

    def __init__(self, most: int, watch: MemoryWatch) -> None:
        self._most = most
        self._watch: MemoryWatch | None = watch
        self._regions: dict[int, DmaRegion] = {}  # by address
        self._copies: dict[int, Region | None] = {}  # of regions without a descriptor

    @property
    def mapped(self) -> GuestMemory:
        """The memory that is shared with the client."""
        found = (each.region for each in self._regions.values())
        return GuestMemory(region for region in found if region is not None)

    @property
    def memory(self) -> GuestMemory:
        """The shared memory, and copies of our own where only the client has memory.

        A copy costs what is used of it. It stays the same as long as its region is mapped.
        """
        for each in self._regions.values():
            if each.region is None and each.address not in self._copies:
                self._copies[each.address] = _make_copy(each)
        regions = (each.region or self._copies[each.address] for each in self._regions.values())
        return GuestMemory(region for region in regions if region is not None)

    def is_remote(self, address: int) -> bool:
        """Whether only the client can access it."""
        return any(
            each.address <= address < each.end
            for each in self._regions.values()
            if each.region is None
        )

    def map(self, asked: DmaMap, fd: int) -> None:
        """Add a mapping; ``fd`` is -1 if there is no descriptor, and stays the caller's.

        Raises:
            VfioUserError: it overlaps another (EEXIST), there are too many (ENOSPC), or the
                descriptor cannot be mapped so.
        """
        if not asked.flags:
            raise ProtocolError("a region that can be neither read nor written")
        end = asked.address + asked.size
        for other in self._regions.values():
            if other.address < end and asked.address < other.end:
                raise VfioUserError(
                    "DMA_MAP",
                    f"{asked.size:#x} bytes at {asked.address:#x} overlap "
                    f"{other.size:#x} at {other.address:#x}",
                    errno.EEXIST,
                )
        if len(self._regions) >= self._most:
            raise VfioUserError("DMA_MAP", f"all {self._most} mappings are taken", errno.ENOSPC)
        region = self._map(asked, fd) if fd >= 0 else None
        self._regions[asked.address] = DmaRegion(asked.address, asked.size, asked.flags, region)

    def close(self) -> None:
        """Unmap everything, and let go of the watch. Nothing is mapped after that."""
        self._regions.clear()
        self._copies.clear()
        self._watch = None

    def unmap(self, asked: DmaUnmap) -> None:
        """Remove what was mapped exactly so, or everything.

        Raises:
            VfioUserError: there is no such mapping (ENOENT).
        """
        if asked.flags & UnmapFlag.ALL:
            self._regions.clear()
            self._copies.clear()
            return
        found = self._regions.get(asked.address)
        if found is None or found.size != asked.size:
            raise VfioUserError(
                "DMA_UNMAP",
                f"{asked.size:#x} bytes at {asked.address:#x} are not mapped so",
                errno.ENOENT,
            )
        del self._regions[asked.address]
        self._copies.pop(asked.address, None)

    def _map(self, asked: DmaMap, fd: int) -> Region:
        return Region.map(
            fd,
            asked.size,
            offset=asked.offset,
            guest_addr=asked.address,
            # What the device must not write is its own copy: writing changes nothing.
            private=not asked.flags & DmaFlag.WRITE,
            watch=self._watch,
        )


def _make_copy(asked: DmaRegion) -> Region | None:
    """Memory of our own in the place of the client's; None if there is not as much."""
    fd = -1
    try:
        fd = os.memfd_create("vring-remote", os.MFD_CLOEXEC)
        os.ftruncate(fd, asked.size)
        return Region.map(fd, asked.size, guest_addr=asked.address)
    except (OSError, OverflowError, VringError):
        return None
    finally:
        if fd >= 0:
            os.close(fd)
