"""The client's memory in the hands of its function, as the client maps and unmaps it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vring_serial.device.pci import PciDevice
from vring_serial.lifetime import Closing
from vring_serial.proto.vfio_user_features import MigrationState
from vring_serial.transport.vfio_user.dirty import DmaLog
from vring_serial.transport.vfio_user.dma import DmaTable
from vring_serial.transport.vfio_user.state import ClientState

#: Seconds in which more maps are expected after a piece of RAM was unmapped: firmware takes RAM
#: apart and puts it together again, and a ring may be back before the buffers that it names.
MORE_SECONDS = 0.05
#: Bytes from which on a mapping is taken for RAM, and not for a buffer behind an IOMMU.
RAM_BYTES = 256 << 10


class FunctionMemory(Closing):
    """Gives a function the memory that its client has mapped.

    Args:
        pci: the function.
        dma: what is mapped.
        state: of the client, which may have stopped the function to migrate it.
        started: called after rings that had waited for memory were started.
    """

    def __init__(
        self, pci: PciDevice, dma: DmaTable, state: ClientState, started: Callable[[], None]
    ) -> None:
        self._pci = pci
        self._dma = dma
        self._state = state
        self._started = started
        self._changed = False
        self._lost = 0  # bytes of the largest mapping that went since the function got memory
        self._later: asyncio.TimerHandle | None = None  # starts rings that wait
        self._size = 0  # bytes of memory that the function has,
        self._wanted = 0  # and had when the rings that wait were stopped

    def note_change(self, lost: int = 0) -> None:
        """Remember that something was mapped or unmapped: see :meth:`settle`.

        ``lost``: bytes of the largest mapping that went.
        """
        self._changed = True
        self._lost = max(self._lost, lost)

    def settle(self, log: DmaLog, *, complete: bool) -> None:
        """Give the function the memory as it is mapped now.

        Maps come many at a time, and each exchange costs: once for all that came together, before
        any of them is answered and before anything else is done.

        Args:
            log: of the function's writes, which is to have a bit for each page.
            complete: no more maps come for now. Otherwise all rings wait a little after RAM went.

        Raises OSError: there is not enough memory for the log.
        """
        if self._changed:
            self._changed = False
            if not log.fits():
                self._pci.set_memory(None)
                log.grow()
            if self._runs and self._dma.all_shared:
                self._move()
            elif self._runs:
                self._give()
        if complete and self._later is not None:
            self._start()

    def set_running(self, running: bool) -> None:
        """Give the function the memory, or take it away."""
        if running:
            self._give()
        else:
            self.take()

    def restart(self, change: Callable[[], None]) -> None:
        """Change something that rings take over when they start."""
        self.take()
        change()
        if self._runs:
            self._give()

    def take(self) -> None:
        """Take the memory away: all rings stop."""
        self._cancel()
        self._pci.set_memory(None)

    def close(self) -> None:
        self.take()

    @property
    def _runs(self) -> bool:
        return self._state.phase is MigrationState.RUNNING

    def _give(self) -> None:
        self._cancel()
        self._size, self._wanted = self._dma.size, 0
        self._pci.set_memory(self._dma.memory)

    def _move(self) -> None:
        """Give it under running rings: behind an IOMMU this happens twice for each buffer."""
        self._cancel()
        before, self._size = self._size, self._dma.size
        lost, self._lost = self._lost, 0
        if self._size < before and lost >= RAM_BYTES:
            self._pci.set_memory(None)
        self._pci.move_memory(self._dma.memory)
        if self._pci.any_waiting:
            self._wanted = max(self._wanted, before)
            if self._size >= self._wanted:
                self._start()
            else:
                loop = asyncio.get_running_loop()
                self._later = loop.call_later(MORE_SECONDS, self._start)

    def _start(self) -> None:
        self._cancel()
        self._wanted = 0
        self._pci.start_waiting()
        self._started()

    def _cancel(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
