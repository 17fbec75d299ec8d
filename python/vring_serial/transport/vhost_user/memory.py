"""Guest memory as a frontend maps it, as one table or region by region."""

from __future__ import annotations

from collections.abc import Callable

from vring import GuestMemory, MemoryWatch, Region
from vring_serial.errors import RemoteProtocolError, StateError
from vring_serial.keeping import Keeping
from vring_serial.proto.vhost_user import (
    U64,
    Empty,
    MemoryRegion,
    MemoryTable,
    Request,
    SingleRegion,
)
from vring_serial.transport.closer import Closer
from vring_serial.transport.session import Handler
from vring_serial.transport.vhost_user.state import MAX_MEM_SLOTS, FrontendState

#: Role of a region's descriptor by its number (see Keeping).
MEMORY = "memory.{}"


class FrontendMemory:
    """Maps a frontend's regions, and exchanges the memory under the running queues.

    Args:
        state: the frontend's; ``regions`` and their numbers are kept up to date here.
        watch: reports lost memory.
        closer: closes the frontend's descriptors.
        keep: keeps a descriptor in a role for a successor of this process.
        stop: stops all queues.
        run: runs all queues that are to run, with the memory as it is then.
    """

    def __init__(
        self,
        state: FrontendState,
        *,
        watch: MemoryWatch,
        closer: Closer,
        keep: Callable[[str, int], None],
        stop: Callable[[], None],
        run: Callable[[], None],
    ) -> None:
        self._state = state
        self._watch: MemoryWatch | None = watch
        self._closer = closer
        self._keep = keep
        self._stop = stop
        self._run = run
        self._mapped = GuestMemory()

    @property
    def handlers(self) -> dict[int, Handler]:
        """What a frontend may ask about its memory."""
        return {
            Request.SET_MEM_TABLE: self._set_table,
            Request.GET_MAX_MEM_SLOTS: self._get_max_slots,
            Request.ADD_MEM_REG: self._add_region,
            Request.REM_MEM_REG: self._remove_region,
        }

    @property
    def mapped(self) -> GuestMemory:
        """The memory as it is mapped now."""
        return self._mapped

    @property
    def roles(self) -> set[str]:
        """In which roles descriptors are kept for a successor."""
        return {MEMORY.format(serial) for serial in self._state.serials}

    def resume(self, keeping: Keeping) -> None:
        """Map what a predecessor of this process had mapped.

        Raises:
            StateError: a descriptor is not there.
            MemoryMapError: it cannot be mapped so any more.
        """
        pairs = zip(self._state.regions, self._state.serials, strict=True)
        self._mapped = GuestMemory([self._map_kept(keeping, *pair) for pair in pairs])

    def close(self) -> None:
        """Unmap everything, and let go of the watch. Safe to call twice."""
        self._mapped = GuestMemory()
        self._watch = None

    def _map_kept(self, keeping: Keeping, region: MemoryRegion, serial: int) -> Region:
        fd = keeping.take(MEMORY.format(serial))
        if fd is None:
            raise StateError(f"the descriptor {MEMORY.format(serial)} is not there")
        try:
            return self._map(region, fd)
        finally:
            self._closer.close([fd])

    def _map(self, region: MemoryRegion, fd: int) -> Region:
        """Map one region. Raises MemoryMapError if the descriptor cannot be mapped so."""
        return Region.map(
            fd,
            region.size,
            offset=region.mmap_offset,
            guest_addr=region.guest_address,
            user_addr=region.user_address,
            watch=self._watch,
        )

    def _set_table(self, table: MemoryTable, fds: list[int]) -> None:
        pairs = zip(table.regions, fds, strict=True)
        memory = GuestMemory([self._map(region, fd) for region, fd in pairs])
        self._exchange(memory, list(table.regions), [self._keep_region(fd) for fd in fds])

    def _keep_region(self, fd: int) -> int:
        """Keep a region's descriptor; return the number that it has."""
        serial = self._state.next_serial
        self._state.next_serial += 1
        self._keep(MEMORY.format(serial), fd)
        return serial

    def _get_max_slots(self, _: Empty, fds: list[int]) -> U64:
        return U64(MAX_MEM_SLOTS)

    def _add_region(self, added: SingleRegion, fds: list[int]) -> None:
        if len(self._state.regions) >= MAX_MEM_SLOTS:
            raise RemoteProtocolError(f"all {MAX_MEM_SLOTS} memory slots are taken")
        memory = self._mapped.with_region(self._map(added.region, fds[0]))
        serials = [*self._state.serials, self._keep_region(fds[0])]
        self._exchange(memory, [*self._state.regions, added.region], serials)

    def _remove_region(self, removed: SingleRegion, fds: list[int]) -> None:
        address = removed.region.guest_address
        memory = self._mapped.without_region(address, removed.region.size)
        left = [
            (region, serial)
            for region, serial in zip(self._state.regions, self._state.serials, strict=True)
            if region.guest_address != address
        ]
        regions, serials = [region for region, _ in left], [serial for _, serial in left]
        self._exchange(memory, regions, serials)

    def _exchange(
        self, memory: GuestMemory, regions: list[MemoryRegion], serials: list[int]
    ) -> None:
        """Exchange the memory under the running queues; user addresses are translated anew."""
        self._stop()
        self._mapped = memory
        self._state.regions = regions
        self._state.serials = serials
        self._run()
