"""The dirty log of a migration: which pages of guest memory the device writes ("Migration")."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vring import DirtyLog, GuestMemory, MemoryWatch, Region, VirtQueue, notify
from vring_serial.errors import RemoteProtocolError, StateError
from vring_serial.keeping import Keeping
from vring_serial.proto.vhost_user import (
    F_LOG_ALL,
    U64,
    Empty,
    LogArea,
    ProtocolFeature,
    Request,
    VringAddress,
)
from vring_serial.transport.closer import Closer
from vring_serial.transport.event_fds import check_event_descriptor
from vring_serial.transport.session import Handler
from vring_serial.transport.vhost_user.state import FrontendState

#: Role of the log's descriptor (see Keeping).
LOG = "log"
#: Seconds between two notices that the log may have changed, to a frontend that wants them.
NOTICE_INTERVAL = 0.1


class MigrationLog:
    """Takes a frontend's log, and gives it to the queues that are to mark their writes in it.

    Queues change their log only while they do not run: pages marked in an old log after the
    frontend was told of the new one would be lost.

    Args:
        state: the frontend's; ``log`` is kept up to date here.
        memory: returns guest memory.
        watch: told when the log's file is cut off.
        closer: closes the frontend's descriptors.
        keep: keeps a descriptor in a role for a successor of this process.
        restart: stops all queues and runs them again.
    """

    def __init__(
        self,
        state: FrontendState,
        *,
        memory: Callable[[], GuestMemory],
        watch: MemoryWatch,
        closer: Closer,
        keep: Callable[[str, int], None],
        restart: Callable[[], None],
    ) -> None:
        self._state = state
        self._memory = memory
        self._watch: MemoryWatch | None = watch
        self._closer = closer
        self._keep = keep
        self._restart = restart
        self._area = GuestMemory()  # the log, mapped
        self._log: DirtyLog | None = None
        self._notice_fd = -1
        self._timer: asyncio.TimerHandle | None = None

    @property
    def handlers(self) -> dict[int, Handler]:
        """What a frontend may ask about the log."""
        return {Request.SET_LOG_BASE: self._set_log_base, Request.SET_LOG_FD: self._set_log_fd}

    @property
    def roles(self) -> set[str]:
        """In which roles descriptors are kept for a successor."""
        return set() if self._log is None else {LOG}

    @property
    def loss(self) -> str | None:
        """That the log's file was cut off, for log lines; None if it was not."""
        if not self._area.lost:
            return None
        size = sum(region.size for region in self._area.regions)
        return f"its dirty log, {size:#x} bytes, is gone: the file was cut off"

    def give(self, queue: VirtQueue, address: VringAddress) -> None:
        """Have a queue that does not run yet mark its writes, if that was asked for.

        A queue marks all that it writes or nothing: more marks than were asked for do no harm.
        """
        ring = bool(address.flags & VringAddress.F_LOG)
        if self._log is not None and (ring or self._state.features >> F_LOG_ALL & 1):
            queue.set_log(self._log, address.log if ring else None)

    def resume(self, keeping: Keeping) -> None:
        """Go on with a predecessor's log, in which its last marks may be missing.

        Raises:
            StateError: its descriptor is not there.
            RemoteProtocolError, MemoryMapError: it cannot be the log any more.
        """
        if self._state.log is None:
            return
        fd = keeping.take(LOG)
        if fd is None:
            raise StateError("the dirty log is not there")
        try:
            self._log = self._map(self._state.log, fd)
        finally:
            self._closer.close([fd])
        for region in self._memory().regions:
            self._log.mark(region.guest_addr, region.size)

    def close(self) -> None:
        """Unmap the log and close what is the frontend's. Safe to call twice."""
        self._log = self._watch = None
        self._area = GuestMemory()
        self._closer.close([self._notice_fd])
        self._notice_fd = -1
        if self._timer is not None:
            self._timer.cancel()

    def _map(self, area: LogArea, fd: int) -> DirtyLog:
        """Map a log that has a bit for each page of guest memory."""
        end = max((r.guest_addr + r.size for r in self._memory().regions), default=0)
        region = Region.map(
            fd, area.size, offset=area.offset, guest_addr=0, watch=self._watch, name="the dirty log"
        )
        mapped = GuestMemory([region])
        log = DirtyLog(mapped.view(0, area.size))
        if log.end < end:
            raise RemoteProtocolError(
                f"a log of {area.size} bytes ends at guest address {log.end:#x}, memory at {end:#x}"
            )
        self._area = mapped
        return log

    def _set_log_base(self, area: LogArea, fds: list[int]) -> U64:
        if ProtocolFeature.LOG_SHMFD not in self._state.protocol_features:
            raise RemoteProtocolError("LOG_SHMFD was not negotiated")
        self._log = self._map(area, fds[0])
        self._state.log = area
        self._keep(LOG, fds[0])
        self._restart()
        # Answered also without NEED_REPLY: the old log is the frontend's own from here on.
        return U64(0)

    def _set_log_fd(self, _: Empty, fds: list[int]) -> None:
        check_event_descriptor(fds[0], writable=True)
        self._closer.close([self._notice_fd])
        self._notice_fd = fds.pop()
        if self._timer is None:
            self._notice()

    def _notice(self) -> None:
        """Tell of changes: there may be some all the time."""
        if self._log is not None:
            notify(self._notice_fd)
        self._timer = asyncio.get_running_loop().call_later(NOTICE_INTERVAL, self._notice)
