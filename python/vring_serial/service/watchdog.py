"""Whether workers are well, and the answer to the service manager's watchdog."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence

from vring_serial.service.systemd import ServiceManager
from vring_serial.service.worker import Worker

#: How often a worker says that it is well, and the keeper that all are, within the time that the
#: service manager waits.
ANSWERS = 4
#: Part of that time after which a worker that says nothing is replaced.
PATIENCE = 0.5


class Watchdog:
    """Answers the service manager while all workers are well, and replaces those that are not.

    Workers say WATCHDOG=1 themselves.

    Args:
        manager: the service manager.
        hung: called with a worker that has said nothing for too long, before it is ended.
    """

    def __init__(self, manager: ServiceManager, hung: Callable[[Worker], None]) -> None:
        self._manager = manager
        self._hung = hung
        self._seconds = manager.watchdog
        self._next = time.monotonic()

    @property
    def deadline(self) -> float | None:
        """Return when (monotonic) to :meth:`look` again; None: never."""
        return None if self._seconds is None else self._next

    def look(self, workers: Sequence[Worker]) -> None:
        """Do what is due."""
        now = time.monotonic()
        if self._seconds is None or now < self._next:
            return
        self._next = now + self._seconds / ANSWERS
        well = True
        for worker in workers:
            if worker.pid and worker.ready and now - worker.seen > self._seconds * PATIENCE:
                well = False
                self._hung(worker)
                worker.signal(signal.SIGABRT)
        if well:
            self._manager.alive()
