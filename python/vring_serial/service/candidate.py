"""The new code, tried: a child of the keeper that forks workers until the keeper becomes it."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
from collections.abc import Callable, Sequence

from vring_serial.errors import StateError
from vring_serial.service.descriptor_store import DescriptorStore, Notifier
from vring_serial.service.succession import Arrival, WorkerState
from vring_serial.service.worker import Inheritance, WorkerSpec, be

#: A worker's descriptors are not limited here: its keeper has done so.
_STORE_MOST = 1 << 20


class Candidate:
    """Says that it could take over, and then starts workers that the keeper names.

    Messages are those of the descriptor store protocol. From here: ``READY=1``, ``VERSION=`` and
    ``FORMATS=``; ``STARTED=`` a worker's process id. To here: what a worker stored, then ``START=``
    its number.

    A worker is forked twice, so that it becomes a child of the keeper, which asked the kernel for
    orphans.

    Args:
        arrival: from the keeper.
        specs: the workers, as the keeper's.
        check: raises StateError if the state in a worker's journal is not understood.
        version, formats: see Keeper.
    """

    def __init__(
        self,
        arrival: Arrival,
        specs: Sequence[WorkerSpec],
        check: Callable[[int], None],
        *,
        version: str,
        formats: str,
    ) -> None:
        self._arrival = arrival
        self._specs = specs
        self._check = check
        self._about = (f"VERSION={version}", f"FORMATS={formats}")
        self._channel = socket.socket(fileno=arrival.channel)
        self._notifier = Notifier(self._channel)
        self._store = DescriptorStore(_STORE_MOST)
        self._ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN

    def run(self) -> int:
        """Serve the keeper until it has enough; return the exit status.

        Raises StateError: this code cannot go on from what the keeper has.
        """
        workers = self._arrival.state.workers
        if [worker.name for worker in workers] != [spec.name for spec in self._specs]:
            raise StateError("the configuration is another: it has other workers")
        for worker in workers:
            self._check(worker.journal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the keeper hears it, too
        gc.collect()
        gc.freeze()
        os.dup2(self._arrival.stderr, 2)  # what was written there until now, the keeper reads
        self._notifier.notify("READY=1", *self._about)
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        while True:
            ((_, events),) = poll.poll()
            fields = self._store.receive(self._channel)
            if fields is not None and "START" in fields:
                number, restarts = int(fields["START"]), int(fields["RESTARTS"])
                died = fields.get("DIED") == "1"
                pid = self._start(self._specs[number], workers[number], restarts, died)
                self._notifier.notify(f"STARTED={pid}")
                self._store.forsake()  # the keeper and the worker have them
                self._store = DescriptorStore(_STORE_MOST)
            elif not fields and events & select.POLLHUP:
                return 0

    def _start(self, spec: WorkerSpec, state: WorkerState, restarts: int, died: bool) -> int:
        """Fork a worker that is the keeper's child; return its process id."""
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                worker = os.fork()
                if not worker:
                    os.close(reader)
                    os.close(writer)
                    be(
                        spec,
                        lambda: self._inherit(state, restarts, died),
                        ignore_hangup=self._ignores_hangup,
                    )
                os.write(writer, b"%d" % worker)
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as told:
            pid = told.read()
        os.waitpid(child, 0)
        return int(pid or b"0")

    def _inherit(self, state: WorkerState, restarts: int, died: bool) -> Inheritance:
        self._channel.close()
        os.close(self._arrival.stderr)
        for other in self._arrival.state.workers:
            if other is not state:
                os.close(other.journal)
                os.close(other.worker_end)
        worker_end = socket.socket(fileno=state.worker_end)
        return Inheritance(
            state.journal,
            self._store.descriptors,
            Notifier(worker_end),
            self._arrival.keeper,
            restarts,
            died,
        )
