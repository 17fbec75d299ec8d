"""Memory of our own in the place of what only the client can access, and how much of it there is.

A copy has the size of the client's region, and costs what is touched of it. So pages are touched
only for chains that are on their way, and given back when the chains are completed; how much may
be on its way is bounded (:class:`Room`).
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable
from contextlib import suppress

from vring import Region
from vring.errors import VringError

#: Bytes of pages, for chains of one queue that are on their way.
QUEUE_BYTES = 256 << 10
#: Bytes of pages for chains that are larger than that: a queue has one such at a time, and all
#: queues of a client have no more than this in them. No chain may be larger.
LARGE_BYTES = 64 << 20

_PAGE = mmap.PAGESIZE
_MAP_NORESERVE = 0x4000
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_KEPT = mmap.MAP_SHARED | _MAP_NORESERVE


class Copy:
    """Memory at the guest addresses of one region; zeros until it is written to.

    Args:
        address, size: of the region.
        fd: a file of :func:`make_file`, which the copy is then; stays the caller's.

    Attributes:
        kept: whether it outlives the process.
        region: it, as memory.

    Raises:
        OSError, OverflowError, ValueError, VringError: there is not as much.
    """

    def __init__(self, address: int, size: int, fd: int = -1) -> None:
        self.kept = fd >= 0
        self._map = mmap.mmap(fd, size, flags=_KEPT if self.kept else _PRIVATE)
        with suppress(OSError):  # a kernel without huge pages
            # A byte would cost 2 MiB, and giving back one page of them nothing.
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self._map.madvise(mmap.MADV_DONTDUMP)
        self._address = address
        self._users: dict[int, int] = {}  # by page
        self.region = Region(address, self._map)

    def pages(self, address: int, length: int) -> range:
        """Return the numbers of the pages of a range, which must lie in the region."""
        start = address - self._address
        return range(start // _PAGE, (start + length - 1) // _PAGE + 1)

    def hold(self, pages: range) -> None:
        """Count a user of these pages."""
        for page in pages:
            self._users[page] = self._users.get(page, 0) + 1

    def release(self, pages: range, *, free_them: bool = True) -> None:
        """Uncount a user of these pages, and free those that have no other.

        If not ``free_them``, they stay as they are, for whoever holds them next.
        """
        free: list[int] = []
        for page in pages:
            users = self._users[page] - 1
            if users:
                self._users[page] = users
            else:
                del self._users[page]
                free.append(page)
        while free and free_them:
            last = first = free.pop()
            while free and free[-1] == first - 1:
                first = free.pop()
            self._free(first, last + 1)

    def free_unused(self) -> None:
        """Free all pages that have no user: a predecessor of this process may have left some."""
        first = 0
        for page in sorted(self._users):
            if first < page:
                self._free(first, page)
            first = page + 1
        end = (len(self._map) + _PAGE - 1) // _PAGE
        if first < end:
            self._free(first, end)

    def _free(self, first: int, end: int) -> None:
        """Free the pages from ``first`` to the one before ``end``."""
        start, end = first * _PAGE, min(end * _PAGE, len(self._map))
        how = mmap.MADV_REMOVE if self.kept else mmap.MADV_DONTNEED
        self._map.madvise(how, start, end - start)


def make_file(size: int) -> int:
    """Return the descriptor of a file of so many bytes in memory. Raises OSError."""
    fd = os.memfd_create("vring-copy", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_copy(address: int, size: int, keep: Callable[[int], None] | None = None) -> Copy | None:
    """Return a copy, or None if there is not enough memory.

    Args:
        address, size: of the region.
        keep: keeps a duplicate of the copy's descriptor for a successor; None: there is none.
    """
    try:
        if keep is None:
            return Copy(address, size)
        fd = make_file(size)
        try:
            copy = Copy(address, size, fd)
            keep(fd)
        finally:
            os.close(fd)
    except (OSError, OverflowError, ValueError, VringError):
        return None
    return copy


class Held:
    """The pages of copies that one chain, or a ring, uses."""

    def __init__(self) -> None:
        self._pages: list[tuple[Copy, range]] = []
        self.cost = 0  # bytes of the pages; one that is named twice counts twice

    @property
    def kept(self) -> bool:
        """Whether all of them outlive the process."""
        return all(copy.kept for copy, _ in self._pages)

    def add(self, copy: Copy, address: int, length: int) -> None:
        """Add a range in ``copy``; nothing is touched yet, and nothing held before :meth:`hold`."""
        pages = copy.pages(address, length)
        self._pages.append((copy, pages))
        self.cost += len(pages) * _PAGE

    def hold(self) -> None:
        """Count a user of all pages that were added; :meth:`release` gives them back."""
        for copy, pages in self._pages:
            copy.hold(pages)

    def release(self, *, free_them: bool = True) -> None:
        """Give the pages back. Safe to call twice; see Copy.release."""
        pages, self._pages = self._pages, []
        for copy, part in pages:
            copy.release(part, free_them=free_them)


class LargeChains:
    """Counts the bytes of chains that are larger than QUEUE_BYTES, of all queues of one client.

    Attributes:
        bytes: of pages, for all such chains that are on their way.
        waiting: of queues that wait for room; all are set when some is given back.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.waiting: set[asyncio.Event] = set()

    def give(self, cost: int) -> None:
        """Uncount ``cost`` bytes, and wake the queues that wait for room."""
        self.bytes -= cost
        for room in self.waiting:
            room.set()


class Room:
    """Bounds the chains of one queue that are fetched and not completed.

    Args:
        large: of the same client.
    """

    def __init__(self, large: LargeChains) -> None:
        self._all_large = large
        self._small = self._large = 0
        self._changed = asyncio.Event()
        self._closed = False

    def has(self, cost: int) -> bool:
        """Return whether a chain of ``cost`` bytes may be fetched now."""
        if cost <= QUEUE_BYTES:
            return self._small + cost <= QUEUE_BYTES
        return not self._large and self._all_large.bytes + cost <= LARGE_BYTES

    async def wait_for(self, cost: int) -> None:
        """Wait until :meth:`has` returns True."""
        while not self.has(cost):
            self._changed.clear()
            self._all_large.waiting.add(self._changed)
            try:
                await self._changed.wait()
            finally:
                self._all_large.waiting.discard(self._changed)

    def take(self, cost: int) -> None:
        """Count a chain of ``cost`` bytes."""
        if cost <= QUEUE_BYTES:
            self._small += cost
        else:
            self._large = cost
            self._all_large.bytes += cost

    def give(self, cost: int) -> None:
        """Uncount a chain that is completed and released."""
        if self._closed:
            return
        if cost <= QUEUE_BYTES:
            self._small -= cost
        else:
            self._large = 0
            self._all_large.give(cost)
        self._changed.set()

    def close(self) -> None:
        """Uncount all: the queue has stopped."""
        self._closed = True
        if self._large:
            self._all_large.give(self._large)
