"""The keeper: starts workers, holds what must outlive them, and parses nothing that a peer sent.

It has one thread, and all modules that a worker needs are loaded in it, so that a worker is a fork
that serves after a few milliseconds and shares its memory. What a worker wants kept it says with
systemd's descriptor store protocol; what it must not forget it writes into its journal.
"""

from __future__ import annotations

import contextlib
import enum
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from vring_serial.errors import ResourceError
from vring_serial.service.descriptor_store import DescriptorStore, Notifier
from vring_serial.service.journal import Journal, checksum

#: A worker that dies so often in so many seconds, and each time leaves the same state, is not
#: started with that again.
DEATHS_MAX = 5
DEATHS_SECONDS = 10.0
#: Seconds that workers have to stop, until they are killed, and then to be gone.
STOP_SECONDS = 15.0
KILL_SECONDS = 2.0
#: Seconds before a worker that died without any state is started again; doubled each time.
PAUSE_SECONDS = 0.1
PAUSE_MOST = 10.0
#: Messages of one worker before those of another.
MESSAGES = 64
#: More than the kernel keeps for a socket that nobody reads (net.unix.max_dgram_qlen).
UNREAD_MOST = 4096


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What a worker finds when it begins.

    Attributes:
        journal: descriptor of its journal; not the worker's to close.
        descriptors: what its predecessors stored, by name, oldest first; the worker's to close.
        notifier: to the keeper.
        restarts: how many workers died before it. 0: it is the first.
    """

    journal: int
    descriptors: dict[str, list[int]]
    notifier: Notifier
    restarts: int


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker.

    Attributes:
        name: for the log and the process's title.
        run: serves until SIGTERM, in the worker's process; returns its exit status. It says READY=1
            when it serves. A status other than 0 before that ends the service.
    """

    name: str
    run: Callable[[Inheritance], int]


class _Stop(enum.Enum):
    """How far the end of the service is."""

    NOT = enum.auto()
    ASKED = enum.auto()
    KILLED = enum.auto()


@dataclass(slots=True)
class _Worker:
    """A worker as the keeper knows it: all of its lives.

    Attributes:
        spec: what it does.
        journal: descriptor.
        store: what it stored.
        keeper_end: where its messages arrive.
        worker_end: its end of that.
        pid: 0 while it does not live.
        pidfd: becomes readable when it dies; -1 while it does not live.
        ready: it said READY=1, in this life.
        restarts: how many lives it had before.
        deaths: when (monotonic) the last lives ended that left the same state.
        left: checksum of what the last one left.
        start_at: when (monotonic) its next life begins; None while it lives, or is done.
        pause: seconds before the next life without state.
    """

    spec: WorkerSpec
    journal: int
    store: DescriptorStore
    keeper_end: socket.socket
    worker_end: socket.socket
    pid: int = 0
    pidfd: int = -1
    ready: bool = False
    restarts: int = 0
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=DEATHS_MAX))
    left: int = 0
    start_at: float | None = 0.0
    pause: float = PAUSE_SECONDS


class Keeper:
    """Runs workers until it is told to stop.

    SIGTERM and SIGINT stop the workers, SIGHUP is passed on to them. Must run in a process with one
    thread; it installs signal handlers and reaps its children.

    Args:
        specs: the workers.
        log: for what happens to them: level, event, text and fields.
        descriptors: how many each worker may store.
    """

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        log: Callable[..., None],
        *,
        descriptors: int = 4096,
    ) -> None:
        self._log = log
        self._stop = _Stop.NOT
        self._status = 0
        self._deadline = 0.0
        self._poll = select.poll()
        self._workers: list[_Worker] = []
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll.register(self._wake_reader, select.POLLIN)
        for spec in specs:
            keeper_end, worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            keeper_end.setblocking(False)
            self._poll.register(keeper_end, select.POLLIN)
            store = DescriptorStore(descriptors)
            self._workers.append(_Worker(spec, Journal.create(), store, keeper_end, worker_end))

    def run(self) -> int:
        """Serve until the service ends; return its exit status."""
        gc.collect()
        gc.freeze()  # else a collection in a worker copies every page that has an object
        try:
            with self._signals():
                while self._alive():
                    self._start_due()
                    self._wait()
        finally:
            gc.unfreeze()
            self._release()
        return self._status

    # --- the loop

    def _alive(self) -> bool:
        if self._stop is _Stop.KILLED and time.monotonic() > self._deadline:
            names = ", ".join(w.spec.name for w in self._workers if w.pid)
            if names:
                self._say(logging.ERROR, "worker_stuck", f"cannot be killed, and is left: {names}")
            return False
        return any(worker.pid or worker.start_at is not None for worker in self._workers)

    def _wait(self) -> None:
        """Wait for the next thing to happen, and act on it."""
        times = [w.start_at for w in self._workers if w.start_at is not None]
        if self._stop is not _Stop.NOT:
            times.append(self._deadline)
        timeout = None
        if times:
            timeout = max(0.0, min(times) - time.monotonic()) * 1000 + 1
        ready = {fd for fd, _ in self._poll.poll(timeout)}
        if self._wake_reader in ready:
            self._take_signals()
        for worker in self._workers:
            if worker.keeper_end.fileno() in ready:
                self._take_messages(worker)
            if worker.pidfd >= 0 and worker.pidfd in ready:
                self._reap(worker)
        if self._stop is _Stop.ASKED and time.monotonic() > self._deadline:
            self._kill()

    def _take_messages(self, worker: _Worker, most: int = MESSAGES) -> None:
        for _ in range(most):
            if (fields := worker.store.receive(worker.keeper_end)) is None:
                return
            if fields.get("READY") == "1":
                worker.ready = True

    # --- workers

    def _start_due(self) -> None:
        for worker in self._workers:
            if worker.start_at is not None and worker.start_at <= time.monotonic():
                self._start(worker)

    def _start(self, worker: _Worker) -> None:
        assert not worker.pid
        if len(os.listdir("/proc/self/task")) != 1:
            raise ResourceError("the keeper has more than one thread; a fork would be unsafe")
        worker.start_at = None
        worker.ready = False
        pid = os.fork()
        if not pid:
            self._be(worker)
        worker.pid = pid
        worker.pidfd = os.pidfd_open(pid)
        self._poll.register(worker.pidfd, select.POLLIN)

    def _be(self, worker: _Worker) -> None:
        """Be the worker; this does not return."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            # The keeper hears an interrupt as well, and tells us.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            os.close(self._wake_reader)
            os.close(self._wake_writer)
            for other in self._workers:
                other.keeper_end.close()
                if other is not worker:
                    other.worker_end.close()
                    os.close(other.journal)
                    other.store.close()
                    if other.pidfd >= 0:
                        os.close(other.pidfd)
            gc.enable()
            inheritance = Inheritance(
                worker.journal,
                worker.store.descriptors,
                Notifier(worker.worker_end),
                worker.restarts,
            )
            status = worker.spec.run(inheritance)
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            logging.shutdown()
            os._exit(status)

    def _reap(self, worker: _Worker) -> None:
        _, status = os.waitpid(worker.pid, 0)
        self._poll.unregister(worker.pidfd)
        os.close(worker.pidfd)
        worker.pid, worker.pidfd = 0, -1
        self._take_messages(worker, UNREAD_MOST)  # what it sent just before
        code = os.waitstatus_to_exitcode(status)
        if self._stop is not _Stop.NOT or code == 0 or (not worker.ready and not worker.restarts):
            self._status = self._status or max(code, 0)
            if code and self._stop is _Stop.NOT:
                self._ask_to_stop()
            return
        self._start_again(worker, code)

    def _start_again(self, worker: _Worker, code: int) -> None:
        now = time.monotonic()
        left = checksum(worker.journal)
        if left != worker.left:
            worker.left = left
            worker.deaths.clear()
        worker.deaths.append(now)
        worker.restarts += 1
        worker.start_at = now
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        text = f"{worker.spec.name}: its worker ended {how}; another one goes on"
        if len(worker.deaths) == DEATHS_MAX and now - worker.deaths[0] < DEATHS_SECONDS:
            self._forget(worker)
            worker.start_at = now + worker.pause
            worker.pause = min(2 * worker.pause, PAUSE_MOST)
            text = (
                f"{worker.spec.name}: its worker ended {how}, {DEATHS_MAX} times in "
                f"{DEATHS_SECONDS:g} s; its sessions end here, and another one begins anew"
            )
        self._say(
            logging.ERROR, "worker_ended", text, worker=worker.spec.name, restarts=worker.restarts
        )

    def _forget(self, worker: _Worker) -> None:
        """Close and drop all that the worker left."""
        worker.deaths.clear()
        worker.store.close()
        os.close(worker.journal)
        worker.journal = Journal.create()

    # --- signals and the end

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = [signal.signal(number, lambda *_: None) for number in numbers]
        wakeup = signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _take_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._wake_reader, 64):
                if number == signal.SIGHUP:
                    self._send(signal.SIGHUP)
                elif self._stop is _Stop.NOT:
                    self._ask_to_stop()
                elif self._stop is _Stop.ASKED:
                    self._kill()

    def _ask_to_stop(self) -> None:
        self._stop = _Stop.ASKED
        self._deadline = time.monotonic() + STOP_SECONDS
        for worker in self._workers:
            worker.start_at = None
        self._send(signal.SIGTERM)

    def _kill(self) -> None:
        self._stop = _Stop.KILLED
        self._deadline = time.monotonic() + KILL_SECONDS
        self._status = self._status or 1
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for worker in self._workers:
            if worker.pid:
                signal.pidfd_send_signal(worker.pidfd, number)

    def _release(self) -> None:
        for worker in self._workers:
            worker.store.close()
            worker.keeper_end.close()
            worker.worker_end.close()
            os.close(worker.journal)
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _say(self, level: int, event: str, text: str, **fields: object) -> None:
        self._log(level, event, text, **fields)
