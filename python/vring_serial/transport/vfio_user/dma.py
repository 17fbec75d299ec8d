"""The client's memory as it maps it for DMA (VFIO_USER_DMA_MAP, VFIO_USER_DMA_UNMAP)."""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial

from vring import GuestMemory, MemoryWatch, Region
from vring_serial.errors import RemoteProtocolError, StateError
from vring_serial.proto.vfio_user import VfioUserError
from vring_serial.proto.vfio_user_dma import DmaFlag, DmaMap, DmaUnmap, UnmapFlag
from vring_serial.transport.vfio_user.copies import Copy, make_copy
from vring_serial.transport.vfio_user.state import DmaRegion


class DmaTable:
    """All mappings of one client.

    Args:
        most: mappings that there may be at once.
        watch: reports lost memory.
        regions: the mappings, by address; kept up to date here.
        keep_copy: keeps the descriptor of a copy, under the number of its region, for a successor
            of this process; None: there is none.
    """

    def __init__(
        self,
        most: int,
        watch: MemoryWatch,
        regions: dict[int, DmaRegion],
        keep_copy: Callable[[int, int], None] | None = None,
    ) -> None:
        self._most = most
        self._watch: MemoryWatch | None = watch
        self._regions = regions
        self._keep_copy = keep_copy
        self._mapped: dict[int, Region] = {}  # of regions with a descriptor, by address
        self._copies: dict[int, Copy | None] = {}  # of regions without a descriptor
        self._remote: list[DmaRegion] | None = None  # those, by address; None: to be made

    @property
    def mapped(self) -> GuestMemory:
        """The memory that the client shares."""
        return GuestMemory(self._mapped.values())

    @property
    def memory(self) -> GuestMemory:
        """The shared memory, and copies of our own where only the client has memory.

        A copy stays the same as long as its region is mapped.
        """
        for each in self._regions.values():
            if not each.shared and each.address not in self._copies:
                keep = self._keep_copy
                self._copies[each.address] = make_copy(
                    each.address, each.size, None if keep is None else partial(keep, each.serial)
                )
        copies = (copy.region for copy in self._copies.values() if copy is not None)
        return GuestMemory((*self.mapped.regions, *copies))

    @property
    def end(self) -> int:
        """The first address behind all mappings."""
        return max((each.end for each in self._regions.values()), default=0)

    def is_mapped(self, address: int, length: int) -> bool:
        """Return whether all of a range is mapped."""
        at, end = address, address + length
        for each in sorted(self._regions.values(), key=_address):
            if each.address <= at < each.end:
                at = each.end
        return at >= end

    def is_remote(self, address: int) -> bool:
        """Return whether only the client can access ``address``."""
        return any(self.remote_parts(address, 1))

    def remote_parts(self, address: int, length: int) -> Iterator[tuple[int, int, Copy | None]]:
        """Yield address, bytes and copy of each part of a range that only the client can access.

        The copy is None where there was not enough memory for one.
        """
        if self._remote is None:
            remote = (each for each in self._regions.values() if not each.shared)
            self._remote = sorted(remote, key=_address)
        at = max(bisect_right(self._remote, address, key=_address) - 1, 0)
        for each in self._remote[at:]:
            if each.address >= address + length:
                return
            start, end = max(address, each.address), min(address + length, each.end)
            if start < end:
                yield start, end - start, self._copies.get(each.address)

    def resume(self, take: Callable[[int], int], take_copy: Callable[[int], int]) -> None:
        """Map what a predecessor of this process had mapped, and its copies.

        Args:
            take: returns the descriptor with this number, which stays the caller's.
            take_copy: the same for a copy's; -1 if there is none.

        Raises MemoryMapError or OSError if one cannot be mapped so, and what the two raise.
        """
        for at, each in self._regions.items():
            if each.shared:
                self._mapped[at] = self._map(each, take(each.serial))
            else:
                fd = take_copy(each.serial)
                if fd >= 0 and os.fstat(fd).st_size < each.size:
                    raise StateError(f"the copy {each.serial} is shorter than its region")
                if fd >= 0:
                    self._copies[at] = Copy(at, each.size, fd)

    def has_copy(self, address: int) -> bool:
        """Return whether there is a copy of what only the client can access at ``address``."""
        return all(copy is not None for _, _, copy in self.remote_parts(address, 1))

    def free_unused(self) -> None:
        """Free what no ring uses of the copies."""
        for copy in self._copies.values():
            if copy is not None:
                copy.free_unused()

    def map(self, asked: DmaMap, fd: int, serial: int = 0) -> None:
        """Add a mapping; ``fd`` is -1 if there is no descriptor, and stays the caller's.

        ``serial`` is the number under which it is kept.

        Raises:
            VfioUserError: it overlaps another (EEXIST), there are too many (ENOSPC), or the
                descriptor cannot be mapped so.
        """
        if not asked.flags:
            raise RemoteProtocolError("a region that can be neither read nor written")
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
        at, shared = asked.address, fd >= 0
        if shared:
            self._mapped[at] = self._map(asked, fd)
        self._regions[at] = DmaRegion(at, asked.size, asked.flags, asked.offset, shared, serial)
        self._remote = None

    def close(self) -> None:
        """Unmap everything, and let go of the watch. Nothing is mapped after that."""
        self._clear()
        self._watch = None

    def unmap(self, asked: DmaUnmap) -> None:
        """Remove what was mapped exactly so, or everything.

        Raises:
            VfioUserError: there is no such mapping (ENOENT).
        """
        if asked.flags & UnmapFlag.ALL:
            self._clear()
            return
        found = self._regions.get(asked.address)
        if found is None or found.size != asked.size:
            raise VfioUserError(
                "DMA_UNMAP",
                f"{asked.size:#x} bytes at {asked.address:#x} are not mapped so",
                errno.ENOENT,
            )
        del self._regions[asked.address]
        self._mapped.pop(asked.address, None)
        self._copies.pop(asked.address, None)
        self._remote = None

    def _clear(self) -> None:
        self._regions.clear()
        self._mapped.clear()
        self._copies.clear()
        self._remote = None

    def _map(self, asked: DmaMap | DmaRegion, fd: int) -> Region:
        return Region.map(
            fd,
            asked.size,
            offset=asked.offset,
            guest_addr=asked.address,
            # What the device must not write is its own copy: writing changes nothing.
            private=not asked.flags & DmaFlag.WRITE,
            watch=self._watch,
        )


def _address(region: DmaRegion) -> int:
    return region.address
