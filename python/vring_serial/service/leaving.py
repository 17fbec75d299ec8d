"""Processes that have stopped for their successors, until they are gone."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Collection

from vring_serial.service.worker import Worker
from vring_serial.unix_fds import close_all

#: Seconds that one has to end, until it is killed, and then to be gone.
KILL_SECONDS = 2.0


class Leaving:
    """Waits for such processes, and kills those that do not end.

    Args:
        poll: gets what is to be waited for.
    """

    def __init__(self, poll: select.poll) -> None:
        self._poll = poll
        self._processes: dict[int, tuple[int, float]] = {}  # pidfd: process id, and when to kill

    def __bool__(self) -> bool:
        return bool(self._processes)

    @property
    def pids(self) -> set[int]:
        """Their process ids."""
        return {pid for pid, _ in self._processes.values()}

    @property
    def deadlines(self) -> list[float]:
        """When (monotonic) to :meth:`see_off` them again."""
        return [kill_at for _, kill_at in self._processes.values()]

    def add(self, worker: Worker) -> None:
        """Take over the process of a worker, whose next life is to begin."""
        self._poll.unregister(worker.pidfd)
        pid, pidfd = worker.pid, worker.leave()
        self._poll.register(pidfd, select.POLLIN)
        self._processes[pidfd] = pid, time.monotonic() + KILL_SECONDS

    def see_off(self, ready: Collection[int]) -> None:
        """Reap those that have ended, and kill those that do not end."""
        for pidfd, (pid, kill_at) in list(self._processes.items()):
            if pidfd in ready:
                self._poll.unregister(pidfd)
                os.waitpid(pid, 0)
                os.close(pidfd)
                del self._processes[pidfd]
            elif time.monotonic() > kill_at:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                self._processes[pidfd] = pid, kill_at + KILL_SECONDS

    def close(self) -> None:
        """Close what is open, in this process."""
        close_all(self._processes)
