"""A worker: what it is given, what its keeper knows of it, and how a process becomes one."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from vring_serial.service.descriptor_store import DescriptorStore, Notifier
from vring_serial.service.journal import Journal
from vring_serial.service.succession import WorkerState

#: A worker that dies so often, and each time leaves the same state, is not started with that again.
DEATHS_MAX = 5
#: One that dies so often, whatever it leaves, waits before each next life.
LIVES_MAX = 100
#: Seconds within which so many lives are too many.
DEATHS_SECONDS = 10.0
#: Seconds before a worker that died without any state is started again; doubled each time.
PAUSE_SECONDS = 0.1
#: Added to a worker's oom_score_adj, which counts thousandths of the memory: of two that hold
#: about the same memory, the worker is killed and the keeper is not.
OOM_SCORE = 100


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What a worker finds when it begins.

    Attributes:
        journal: descriptor of its journal; not the worker's to close.
        descriptors: what its predecessors stored, by name, oldest first; the worker's to close.
        notifier: to the keeper.
        keeper: pidfd of the keeper, which becomes readable when that ends.
        restarts: how many workers were before it. 0: it is the first.
        died: the one before it died, and did not hand over.
    """

    journal: int
    descriptors: dict[str, list[int]]
    notifier: Notifier
    keeper: int
    restarts: int
    died: bool


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker.

    Attributes:
        name: for the log.
        run: serves until SIGTERM, in the worker's process; returns its exit status. It says READY=1
            when it serves. A status other than 0 before that ends the service.
        serves: the service lasts as long as one of those that serve.
    """

    name: str
    run: Callable[[Inheritance], int]
    serves: bool = True


@dataclass(slots=True)
class Worker:
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
        died: its last life ended by itself, and not for a successor.
        restarts: how many lives it had before.
        deaths: when (monotonic) the last lives ended that left the same state.
        lives: when the last lives ended, whatever they left.
        unready: how many lives ended one after another before READY=1.
        told_to_stop: it got SIGTERM, in this life.
        seen: when (monotonic) it said last that it is well.
        hands_over: it was told to stop for a successor with other code, or the keeper's.
        clears: it began when its predecessor died instead of stopping.
        refused: descriptors were not kept, and that was logged.
        cast_out: it is ended, and there is no next life.
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
    died: bool = False
    restarts: int = 0
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=DEATHS_MAX))
    lives: deque[float] = field(default_factory=lambda: deque(maxlen=LIVES_MAX))
    left: int = 0
    unready: int = 0
    told_to_stop: bool = False
    seen: float = 0.0
    hands_over: bool = False
    clears: bool = False
    refused: bool = False
    cast_out: bool = False
    start_at: float | None = 0.0
    pause: float = PAUSE_SECONDS

    @classmethod
    def make(cls, spec: WorkerSpec, descriptors: int, poll: select.poll) -> Worker:
        """Return a worker that is to begin, whose messages are waited for.

        Args:
            spec: what it does.
            descriptors: how many it may store.
            poll: gets what is to be waited for.

        Raises OSError, ResourceError.
        """
        journal = Journal.create()
        try:
            # Not of datagrams, which a worker could send to any address.
            keeper_end, worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            os.close(journal)
            raise
        keeper_end.setblocking(False)
        poll.register(keeper_end, select.POLLIN)
        return cls(spec, journal, DescriptorStore(descriptors), keeper_end, worker_end)

    def live(self, pid: int, poll: select.poll) -> None:
        """Note the process that begins to be the worker now, and have its end watched."""
        self.ready = self.told_to_stop = self.hands_over = False
        self.watch(pid, poll)
        self.start_at = None

    def watch(self, pid: int, poll: select.poll) -> None:
        """Note the process that is the worker, and have its end watched."""
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        poll.register(self.pidfd, select.POLLIN)

    def signal(self, number: int) -> None:
        """Send a signal to its process, which lives or was not reaped."""
        signal.pidfd_send_signal(self.pidfd, number)

    def tell_to_hand_over(self) -> None:
        """Tell it once, in this life, to stop for its successor; it says STOPPED=1 when it has."""
        if not self.hands_over:
            self.hands_over = True
            self.signal(signal.SIGUSR2)

    def ask_for_successor(self) -> None:
        """Have it hand over, as it wishes itself, if it serves and does not wish it too often."""
        now = time.monotonic()
        if self.pid and self.ready and not self.told_to_stop and not self.lives_too_short(now):
            if not self.hands_over:
                self.lives.append(now)
            self.tell_to_hand_over()

    def lives_too_short(self, now: float) -> bool:
        """Return whether LIVES_MAX of its lives ended within DEATHS_SECONDS before ``now``."""
        return len(self.lives) == LIVES_MAX and now - self.lives[0] < DEATHS_SECONDS

    def leave(self) -> int:
        """Forget its process, which has stopped for its successor; return the pidfd of that.

        Its next life is to begin.
        """
        pidfd, self.pidfd, self.pid = self.pidfd, -1, 0
        self.begin_again()
        return pidfd

    def begin_again(self) -> None:
        """Have the next life begin, of one that was told to hand over."""
        self.ready = self.hands_over = self.died = False
        self.restarts += 1
        self.start_at = time.monotonic()

    def release(self) -> None:
        """Close all that it has, at its end."""
        self.store.close()
        self.keeper_end.close()
        self.worker_end.close()
        os.close(self.journal)

    def state(self) -> WorkerState:
        """Return what the keeper's new code must know of it."""
        return WorkerState(
            name=self.spec.name,
            pid=self.pid,
            journal=self.journal,
            keeper_end=self.keeper_end.fileno(),
            worker_end=self.worker_end.fileno(),
            store=self.store.descriptors,
            ready=self.ready,
            refused=self.refused,
            restarts=self.restarts,
            left=self.left,
            unready=self.unready,
            cast_out=self.cast_out,
            deaths=[round(at * 1e9) for at in self.deaths],
            start_at=None if self.start_at is None else round(self.start_at * 1e9),
            pause=round(self.pause * 1e9),
        )

    @classmethod
    def from_state(
        cls, state: WorkerState, spec: WorkerSpec, descriptors: int, poll: select.poll
    ) -> Worker:
        """Return the worker that the keeper's code before knew, of which everything is taken over.

        Args:
            state: of it.
            spec: what it does now.
            descriptors: how many it may store.
            poll: gets what is to be waited for.
        """
        worker = cls(
            spec,
            state.journal,
            DescriptorStore(descriptors, state.store),
            socket.socket(fileno=state.keeper_end),
            socket.socket(fileno=state.worker_end),
            ready=state.ready,
            restarts=state.restarts,
            left=state.left,
            unready=state.unready,
            refused=state.refused,
            cast_out=state.cast_out,
            start_at=None if state.start_at is None else state.start_at / 1e9,
            pause=state.pause / 1e9,
            seen=time.monotonic(),
        )
        worker.deaths.extend(at / 1e9 for at in state.deaths)
        worker.keeper_end.setblocking(False)
        if not worker.cast_out:
            poll.register(worker.keeper_end, select.POLLIN)
        if state.pid:
            worker.watch(state.pid, poll)
        return worker


def fork() -> int:
    """Do as ``os.fork``; in the child signals wait until it unblocks them.

    It has the keeper's handlers at first, which tell the keeper's pipe: the keeper would take a
    signal to its worker for one to itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = -1
    try:
        pid = os.fork()
        return pid
    finally:
        if pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def be(spec: WorkerSpec, inherit: Callable[[], Inheritance], *, ignore_hangup: bool) -> NoReturn:
    """Be the worker, in a process that was forked for it, and end the process.

    Args:
        spec: what it does.
        inherit: closes what the process has and the worker has not, and returns what it has.
        ignore_hangup: whether SIGHUP is ignored until the worker decides about it.
    """
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        # The keeper hears an interrupt as well, and tells us.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if ignore_hangup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # else nothing is done about a SIGHUP until the worker has a handler: it only begins.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _raise_oom_score()
        _take_name(f"vring {spec.name}")
        inheritance = inherit()
        gc.enable()
        status = spec.run(inheritance)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        logging.shutdown()
        os._exit(status)


def how_ended(code: int) -> str:
    """Say how a process ended; a negative code is a signal's number."""
    if code >= 0:
        return f"with status {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"by signal {-code}"


def _take_name(name: str) -> None:
    """Be called so where processes are listed, as far as it fits."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "wb") as file:
        file.write(name.encode(errors="replace")[:15])


def _raise_oom_score() -> None:
    with contextlib.suppress(OSError, ValueError), open("/proc/self/oom_score_adj", "r+") as file:
        score = min(int(file.read()) + OOM_SCORE, 1000)
        file.seek(0)
        file.write(str(score))
