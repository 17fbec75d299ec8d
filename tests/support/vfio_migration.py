"""What a VMM that speaks vfio-user does with a guest's memory to move it."""

from __future__ import annotations

from tests.support.migration import MovedMemory
from tests.support.vfio_guest import VfioGuest
from vring import LOG_PAGE
from vring_serial.proto.vfio_user_features import (
    FeatureIndex,
    FeatureMethod,
    LoggingControl,
    LoggingReport,
)


class VfioMigration(MovedMemory):
    """The memory of a guest on its way, by DMA logging.

    Args:
        guest: which goes on meanwhile.
    """

    def __init__(self, guest: VfioGuest) -> None:
        super().__init__(guest.ram, guest.queues)
        self._vfio = guest

    def start(self) -> None:
        """Have everything that is written from now on marked, and copy all."""
        packed = LoggingControl(LOG_PAGE).pack()
        self._vfio.feature(FeatureMethod.SET, FeatureIndex.DMA_LOGGING_START, packed)
        self._new[:] = self._old[:]

    def copy_round(self) -> None:
        """Copy what was marked since the last round."""
        asked = LoggingReport(self._ram.guest_addr, self._ram.size, LOG_PAGE).pack()
        data = self._vfio.feature(FeatureMethod.GET, FeatureIndex.DMA_LOGGING_REPORT, asked)
        self._copy_marked(LoggingReport.unpack(data).bitmap, 0)

    def end(self) -> None:
        """Have nothing marked any more."""
        packed = LoggingControl(LOG_PAGE).pack()
        self._vfio.feature(FeatureMethod.SET, FeatureIndex.DMA_LOGGING_STOP, packed)

    def _copy_last(self) -> None:
        self.copy_round()
