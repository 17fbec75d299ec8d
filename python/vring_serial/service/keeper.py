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
from vring_serial.unix_fds import allow_descriptors

#: A worker that dies so often in so many seconds, and each time leaves the same state, is not
#: started with that again.
DEATHS_MAX = 5
DEATHS_SECONDS = 10.0
#: Seconds that a worker which goes on has to begin, before it is told to stop: only then it removes
#: what its predecessors made.
BEGIN_SECONDS = 2.0
#: Seconds that workers have to stop, until they are killed, and then to be gone.
STOP_SECONDS = 15.0
KILL_SECONDS = 2.0
#: Seconds before a worker that died without any state is started again; doubled each time.
PAUSE_SECONDS = 0.1
PAUSE_MOST = 10.0
#: Descriptors that the keeper needs for itself.
OWN_DESCRIPTORS = 64
#: Added to a worker's oom_score_adj, which counts thousandths of the memory: of two that hold
#: about the same memory, the worker is killed and the keeper is not.
OOM_SCORE = 100
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
        keeper: pidfd of the keeper, which becomes readable when that ends.
        restarts: how many workers died before it. 0: it is the first.
    """

    journal: int
    descriptors: dict[str, list[int]]
    notifier: Notifier
    keeper: int
    restarts: int


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker.

    Attributes:
        name: for the log.
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
        unready: how many lives ended one after another before READY=1.
        told_to_stop: it got SIGTERM, in this life.
        clears: it began when its predecessor died instead of stopping.
        refused: descriptors were not kept, and that was logged.
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
    unready: int = 0
    told_to_stop: bool = False
    clears: bool = False
    refused: bool = False
    start_at: float | None = 0.0
    pause: float = PAUSE_SECONDS


class Keeper:
    """Runs workers until it is told to stop.

    SIGTERM and SIGINT stop the workers, SIGHUP is passed on to them. Must run in a process with one
    thread; it installs signal handlers and reaps its children.

    Args:
        specs: the workers.
        log: for what happens to them: level, event, text and fields.
        descriptors: how many each worker may store, as far as the process may open so many.
        stop_seconds: how long workers have to stop; see STOP_SECONDS.
    """

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        log: Callable[..., None],
        *,
        descriptors: int = 4096,
        stop_seconds: float = STOP_SECONDS,
    ) -> None:
        self._log = log
        self._stop_seconds = stop_seconds
        self._stop = _Stop.NOT
        self._status = 0
        self._deadline = 0.0
        self._begin_by = 0.0
        self._ignores_hangup = False
        self._pidfd = os.pidfd_open(os.getpid())
        self._poll = select.poll()
        self._workers: list[_Worker] = []
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll.register(self._wake_reader, select.POLLIN)
        descriptors = min(descriptors, (allow_descriptors() - OWN_DESCRIPTORS) // len(specs))
        for spec in specs:
            keeper_end, worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            keeper_end.setblocking(False)
            self._poll.register(keeper_end, select.POLLIN)
            store = DescriptorStore(max(descriptors, 0))
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
            for worker in self._workers:
                if worker.pid:
                    text = f"{worker.spec.name}: process {worker.pid} cannot be killed, and is left"
                    self._say(logging.ERROR, "worker_stuck", text, worker=worker.spec.name)
            return False
        return any(worker.pid or worker.start_at is not None for worker in self._workers)

    def _wait(self) -> None:
        """Wait for the next thing to happen, and act on it."""
        times = [w.start_at for w in self._workers if w.start_at is not None]
        if self._stop is not _Stop.NOT:
            times.append(self._deadline)
            if any(w.pid and not w.told_to_stop for w in self._workers):
                times.append(self._begin_by)
        timeout = None
        if times:
            timeout = max(0.0, min(times) - time.monotonic()) * 1000 + 1
        ready = {fd for fd, _ in self._poll.poll(timeout)}
        for worker in self._workers:
            if worker.keeper_end.fileno() in ready:
                self._take_messages(worker)
            if worker.pidfd >= 0 and worker.pidfd in ready:
                self._reap(worker)
        if self._wake_reader in ready:
            self._take_signals()
        if self._stop is _Stop.ASKED:
            self._tell_to_stop()
            if time.monotonic() > self._deadline:
                self._kill()

    def _take_messages(self, worker: _Worker, most: int = MESSAGES) -> None:
        for _ in range(most):
            fields = worker.store.receive(worker.keeper_end)
            if worker.store.refused and not worker.refused:
                worker.refused = True
                text = (
                    f"{worker.spec.name}: its worker has more descriptors than can be kept for it"
                )
                after = "; another one will not find all of them"
                self._say(logging.ERROR, "store_full", text + after, worker=worker.spec.name)
            if fields is None:
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
        worker.ready = worker.told_to_stop = False
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
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if self._ignores_hangup:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
            # else nothing is done about a SIGHUP until the worker has a handler: it only begins.
            _raise_oom_score()
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
                self._pidfd,
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
        if self._stop is not _Stop.NOT:
            if self._stop is _Stop.ASKED and code < 0 and len(worker.store) and not worker.clears:
                # Somebody has to remove what it had made.
                worker.clears = True
                self._start_again(worker, code)
                return
            # It was told to end, if it did not do so by itself.
            self._done(worker, 0 if code in (0, -signal.SIGTERM) else code)
        elif code == 0:
            self._done(worker, 0)
        elif not worker.ready and not worker.restarts:
            if code < 0:
                text = f"{worker.spec.name}: its worker ended {_how(code)} before it served"
                self._say(logging.ERROR, "worker_ended", text, worker=worker.spec.name)
            self._done(worker, code)
            self._ask_to_stop()
        else:
            self._start_again(worker, code)

    def _done(self, worker: _Worker, code: int) -> None:
        worker.start_at = None
        self._status = self._status or (code if code >= 0 else 1)

    def _start_again(self, worker: _Worker, code: int) -> None:
        now = time.monotonic()
        left = checksum(worker.journal)
        if left != worker.left:
            worker.left = left
            worker.deaths.clear()
        worker.deaths.append(now)
        worker.unready = 0 if worker.ready else worker.unready + 1
        worker.restarts += 1
        worker.start_at = now
        text = f"{worker.spec.name}: its worker ended {_how(code)}; another one goes on"
        often = ""
        if len(worker.deaths) == DEATHS_MAX and now - worker.deaths[0] < DEATHS_SECONDS:
            often = f"{DEATHS_MAX} times in {DEATHS_SECONDS:g} s"
        elif worker.unready == DEATHS_MAX:
            often = f"{DEATHS_MAX} times before it served"
        if often:
            self._forget(worker)
            worker.start_at = now + worker.pause
            worker.pause = min(2 * worker.pause, PAUSE_MOST)
            text = (
                f"{worker.spec.name}: its worker ended {_how(code)}, {often}; its sessions end "
                "here, and another one begins anew"
            )
        self._say(
            logging.ERROR, "worker_ended", text, worker=worker.spec.name, restarts=worker.restarts
        )

    def _forget(self, worker: _Worker) -> None:
        """Close and drop all that the worker left."""
        worker.deaths.clear()
        worker.unready = 0
        worker.store.close()
        os.close(worker.journal)
        worker.journal = Journal.create()

    # --- signals and the end

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self._ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup
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
        now = time.monotonic()
        self._begin_by = now + BEGIN_SECONDS
        self._deadline = now + self._stop_seconds
        for worker in self._workers:
            # One that is to go on at once begins, for it has its predecessor's things to remove.
            if worker.start_at is not None and (worker.start_at > now or not len(worker.store)):
                worker.start_at = None
        self._tell_to_stop()

    def _tell_to_stop(self) -> None:
        """Send SIGTERM to every worker once: to one that goes on, when it serves."""
        late = time.monotonic() >= self._begin_by
        for worker in self._workers:
            may = worker.ready or not worker.restarts or late
            if worker.pid and may and not worker.told_to_stop:
                worker.told_to_stop = True
                signal.pidfd_send_signal(worker.pidfd, signal.SIGTERM)

    def _kill(self) -> None:
        self._stop = _Stop.KILLED
        self._deadline = time.monotonic() + KILL_SECONDS
        self._status = self._status or 1
        for worker in self._workers:
            worker.start_at = None
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
        os.close(self._pidfd)

    def _say(self, level: int, event: str, text: str, **fields: object) -> None:
        self._log(level, event, text, **fields)


def _how(code: int) -> str:
    """Say how a process ended; a negative code is a signal's number."""
    if code >= 0:
        return f"with status {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"by signal {-code}"


def _raise_oom_score() -> None:
    with contextlib.suppress(OSError, ValueError), open("/proc/self/oom_score_adj", "r+") as file:
        score = min(int(file.read()) + OOM_SCORE, 1000)
        file.seek(0)
        file.write(str(score))
