"""DMA logging: which pages of the client's memory the device writes (DEVICE_FEATURE)."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable

from vring import LOG_PAGE, DirtyLog
from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.vfio_user import VfioUserError
from vring_serial.proto.vfio_user_features import LoggingControl, LoggingReport
from vring_serial.transport.vfio_user.dma import DmaTable
from vring_serial.transport.vfio_user.rings import RemoteRings
from vring_serial.transport.vfio_user.state import ClientState

_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
_PAGES_EACH = 8 * mmap.PAGESIZE  # for which a page of the log has bits


class DmaLog:
    """The log of one client, which has a bit for every page that is mapped.

    Args:
        state: of the client; ``logging`` is kept up to date here.
        dma: what is mapped.
        rings: get the log when they start.
        restart: stops all rings, calls its argument, and starts them again if they ran.
    """

    def __init__(
        self,
        state: ClientState,
        dma: DmaTable,
        rings: RemoteRings,
        restart: Callable[[Callable[[], None]], None],
    ) -> None:
        self._state = state
        self._dma = dma
        self._rings = rings
        self._restart = restart

    def start(self, control: LoggingControl) -> LoggingControl:
        """Begin; all is logged, whatever ranges are asked for. Again: what is marked stays.

        Raises OSError: there is not enough memory.
        """
        if not self._state.logging:
            log = self._make()
            self._restart(lambda: self._use(log))
            self._state.logging = True
        return LoggingControl(LOG_PAGE, control.ranges)

    def stop(self, control: LoggingControl) -> LoggingControl:
        """End. Raises RemoteProtocolError if it has not begun."""
        self._check_started()
        self._restart(lambda: self._use(None))
        self._state.logging = False
        return control

    def report(self, asked: LoggingReport, most: int) -> LoggingReport:
        """Return what was marked in a range, and clear it.

        Raises:
            RemoteProtocolError: logging has not begun; more than ``most`` bytes of bits.
            VfioUserError: not all of the range is mapped (ENOENT).
        """
        self._check_started()
        if asked.bitmap:
            raise RemoteProtocolError("a bitmap in a request")
        if asked.bitmap_size > most or asked.length // LOG_PAGE > 8 * most:
            raise RemoteProtocolError(f"{asked.pages} pages; {most} bytes of bits are allowed")
        if not self._dma.is_mapped(asked.address, asked.length):
            where = f"{asked.length:#x} bytes at {asked.address:#x}"
            raise VfioUserError("DEVICE_FEATURE", f"{where} are not mapped", errno.ENOENT)
        log = self._rings.log
        assert log is not None
        bits = log.take(asked.address, asked.length, asked.page_size)
        bits += bytes(asked.bitmap_size - len(bits))
        return LoggingReport(asked.address, asked.length, asked.page_size, bytes(bits))

    def fits(self) -> bool:
        """Return whether every page that is mapped has a bit, or there is no log."""
        return self._rings.log is None or self._dma.end <= self._rings.log.end

    def grow(self) -> None:
        """Make the log longer; no ring runs. Raises OSError: there is not enough memory."""
        older, newer = self._rings.log, self._make()
        assert older is not None
        for start in range(0, older.end, _PAGES_EACH * LOG_PAGE):
            bits = older.take(start, min(_PAGES_EACH * LOG_PAGE, older.end - start))
            if any(bits):
                memoryview(newer.buffer)[start // LOG_PAGE // 8 :][: len(bits)] = bits
        self._use(newer)

    def resume(self) -> None:
        """Go on after a predecessor, whose marks went with it: all of memory may be written."""
        if self._state.logging:
            log = self._make()
            for region in self._state.regions.values():
                log.mark(region.address, region.size)
            self._use(log)

    def _use(self, log: DirtyLog | None) -> None:
        self._rings.log = log

    def _make(self) -> DirtyLog:
        pages = -(-self._dma.end // (_PAGES_EACH * LOG_PAGE)) or 1
        try:
            bits = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=_FLAGS)
        except (OverflowError, ValueError) as error:
            raise OSError(errno.ENOMEM, str(error)) from None
        bits.madvise(mmap.MADV_DONTDUMP)
        return DirtyLog(bits)

    def _check_started(self) -> None:
        if not self._state.logging:
            raise RemoteProtocolError("DMA logging was not started")
