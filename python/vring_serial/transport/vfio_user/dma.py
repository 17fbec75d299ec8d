"""The client's memory as it maps it for DMA (VFIO_USER_DMA_MAP, VFIO_USER_DMA_UNMAP)."""

from __future__ import annotations

import errno
import os
from bisect import bisect_left, bisect_right, insort
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
        self._starts = sorted(regions)
        self._size = sum(region.size for region in regions.values())
        self._mapped = GuestMemory()  # regions with a descriptor
        self._copies: dict[int, Copy | None] = {}  # of regions without a descriptor

    @property
    def mapped(self) -> GuestMemory:
        """The memory that the client shares."""
        return self._mapped

    @property
    def all_shared(self) -> bool:
        """Whether the client shares all that it has mapped."""
        return len(self._mapped.regions) == len(self._regions)

    @property
    def memory(self) -> GuestMemory:
        """The shared memory, and copies of our own where only the client has memory.

        A copy stays the same as long as its region is mapped.
        """
        if self.all_shared:
            return self._mapped
        for each in self._regions.values():
            if not each.shared and each.address not in self._copies:
                keep = self._keep_copy
                self._copies[each.address] = make_copy(
                    each.address, each.size, None if keep is None else partial(keep, each.serial)
                )
        copies = (copy.region for copy in self._copies.values() if copy is not None)
        return GuestMemory((*self.mapped.regions, *copies))

    @property
    def size(self) -> int:
        """Bytes of all mappings."""
        return self._size

    @property
    def end(self) -> int:
        """The first address behind all mappings."""
        return self._regions[self._starts[-1]].end if self._starts else 0

    def is_mapped(self, address: int, length: int) -> bool:
        """Return whether all of a range is mapped."""
        at = address
        for each in self._touched(address, address + length):
            if at < each.address:
                return False
            at = each.end
        return at >= address + length

    def is_remote(self, address: int) -> bool:
        """Return whether only the client can access ``address``."""
        return any(self.remote_parts(address, 1))

    def remote_parts(self, address: int, length: int) -> Iterator[tuple[int, int, Copy | None]]:
        """Yield address, bytes and copy of each part of a range that only the client can access.

        The copy is None where there was not enough memory for one.
        """
        for each in self._touched(address, address + length):
            start, end = max(address, each.address), min(address + length, each.end)
            if not each.shared and start < end:
                yield start, end - start, self._copies.get(each.address)

    def resume(self, take: Callable[[int], int], take_copy: Callable[[int], int]) -> None:
        """Map what a predecessor of this process had mapped, and its copies.

        Args:
            take: returns the descriptor with this number, which stays the caller's.
            take_copy: the same for a copy's; -1 if there is none.

        Raises MemoryMapError or OSError if one cannot be mapped so, and what the two raise.
        """
        shared = []
        for at, each in self._regions.items():
            if each.shared:
                shared.append(self._map(each, take(each.descriptor)))
            else:
                fd = take_copy(each.serial)
                if fd >= 0 and os.fstat(fd).st_size < each.size:
                    raise StateError(f"the copy {each.serial} is shorter than its region")
                if fd >= 0:
                    self._copies[at] = Copy(at, each.size, fd)
        self._mapped = GuestMemory(shared)

    def has_copy(self, address: int) -> bool:
        """Return whether there is a copy of what only the client can access at ``address``."""
        return all(copy is not None for _, _, copy in self.remote_parts(address, 1))

    def free_unused(self) -> None:
        """Free what no ring uses of the copies."""
        for copy in self._copies.values():
            if copy is not None:
                copy.free_unused()

    def map(self, asked: DmaMap, fd: int, serial: int = 0, file: int = -1) -> None:
        """Add a mapping; ``fd`` is -1 if there is no descriptor, and stays the caller's.

        ``serial`` is the mapping's number, ``file`` that of one whose descriptor serves.

        Raises:
            VfioUserError: it overlaps another (EEXIST), there are too many (ENOSPC), or the
                descriptor cannot be mapped so.
        """
        if not asked.flags:
            raise RemoteProtocolError("a region that can be neither read nor written")
        end = asked.address + asked.size
        for other in self._touched(asked.address, end):
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
            self._mapped = self._mapped.with_region(self._map(asked, fd))
        region = DmaRegion(at, asked.size, asked.flags, asked.offset, shared, serial, file)
        self._regions[at] = region
        insort(self._starts, at)
        self._size += asked.size

    def close(self) -> None:
        """Unmap everything, and let go of the watch. Nothing is mapped after that."""
        self._clear()
        self._watch = None

    def unmap(self, asked: DmaUnmap) -> int:
        """Remove the mappings in a range, or everything; return the size of the largest.

        A client whose guest is behind an IOMMU may remove many by one range that covers them, as
        the VFIO of Linux lets it.

        Raises:
            VfioUserError: there is no mapping in the range (ENOENT), or one is only in part
                (EINVAL); all stay then.
        """
        if asked.flags & UnmapFlag.ALL:
            largest = max((region.size for region in self._regions.values()), default=0)
            self._clear()
            return largest
        end = asked.address + asked.size
        found = list(self._touched(asked.address, end))
        what = f"{asked.size:#x} bytes at {asked.address:#x}"
        if not found:
            raise VfioUserError("DMA_UNMAP", f"{what}: nothing is mapped there", errno.ENOENT)
        for each in (found[0], found[-1]):
            if each.address < asked.address or each.end > end:
                why = f"{what} hold a part of {each.size:#x} at {each.address:#x}"
                raise VfioUserError("DMA_UNMAP", why, errno.EINVAL)
        first = bisect_left(self._starts, asked.address)
        del self._starts[first : first + len(found)]
        for each in found:
            del self._regions[each.address]
            self._size -= each.size
            self._copies.pop(each.address, None)
            if each.shared:
                self._mapped = self._mapped.without_region(each.address, each.size)
        return max(each.size for each in found)

    def _touched(self, address: int, end: int) -> Iterator[DmaRegion]:
        """Yield the mappings that have bytes in a range, in ascending order."""
        place = max(bisect_right(self._starts, address) - 1, 0)
        while place < len(self._starts) and self._starts[place] < end:
            region = self._regions[self._starts[place]]
            if region.end > address:
                yield region
            place += 1

    def _clear(self) -> None:
        self._regions.clear()
        self._starts.clear()
        self._size = 0
        self._mapped = GuestMemory()
        self._copies.clear()

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
