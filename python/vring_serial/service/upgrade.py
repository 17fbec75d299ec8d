"""An upgrade as the keeper sees it: new code is tried, gets the workers, and then the keeper."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from vring_serial.errors import ResourceError
from vring_serial.service.descriptor_store import DescriptorStore, Notifier
from vring_serial.service.succession import KeeperState, start_again
from vring_serial.service.worker import Worker, fork
from vring_serial.unix_fds import close_all

#: Seconds that the new code has to load.
LOAD_SECONDS = 30.0
#: Seconds that a worker has to stop, and the next one to serve.
HAND_OVER_SECONDS = 5.0
#: Seconds that an upgrade waits until what workers stored is closed, and how often it looks.
CLOSE_SECONDS = 5.0
LOOK_SECONDS = 0.05
#: Seconds that processes have to be gone which were killed.
GONE_SECONDS = 2.0
#: Tells a worker to stop for its successor.
HAND_OVER = signal.SIGUSR2

_PR_SET_CHILD_SUBREAPER = 36
#: Bytes of what new code wrote to its standard error, of which the last line is told.
_SAID_MOST = 1 << 16


class Stage(enum.Enum):
    """How far it is."""

    LOADING = enum.auto()
    HANDING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


@dataclass(slots=True)
class Upgrading:
    """What a keeper knows about the code that it runs.

    Attributes:
        version: of it.
        formats: kinds and versions of the states that it writes: other code with the same ones can
            go on from them.
        state: returns what the keeper's code leaves to the next one, but for workers.
        load_seconds: see LOAD_SECONDS.
    """

    version: str
    formats: str
    state: Callable[[], KeeperState]
    load_seconds: float = LOAD_SECONDS


class Closing:
    """What is being closed for workers; an upgrade waits for it, but not for ever.

    A helper that closes it shares what is open in the keeper, and would keep that open behind the
    back of the new code.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers
        self._until: float | None = None

    @property
    def deadline(self) -> float | None:
        """Return when (monotonic) to look again; None: nothing is waited for."""
        return None if self._until is None else time.monotonic() + LOOK_SECONDS

    def waits(self) -> bool:
        """Return whether to look again later, because something is not closed yet."""
        now = time.monotonic()
        if not self._is_open():
            self._until = None
        elif self._until is None:
            self._until = now + CLOSE_SECONDS
        return self._until is not None and now < self._until

    def check(self) -> None:
        """Wait no more. Raises ResourceError: something is not closed."""
        self.forget()
        if self._is_open():
            raise ResourceError("something that a worker stored cannot be closed")

    def forget(self) -> None:
        """Wait no more."""
        self._until = None

    def _is_open(self) -> bool:
        return any(worker.store.aside.overdue for worker in self._workers)


class Upgrade:
    """Runs the new code as a child of the keeper, and has it start each worker's successor.

    So a version that fails leaves the keeper as it is, and each worker that it could not start is
    started by the keeper, as after a death. Only when all workers run the new code, the keeper
    replaces its own.

    Args:
        state: of the keeper.
        workers: the keeper's.
        poll: gets what is to be waited for.
        keeper: pidfd of the keeper.
        load_seconds: see LOAD_SECONDS.
        ignores_hangup: what the child does about SIGHUP.

    Attributes:
        stage: how far it is.
        why: it failed.
        version: of the new code, once that has said it.
        formats: the formats of states that it writes.
        longest_pause: from the end of a worker to when the next one served, in seconds.
        handed: workers whose processes run the new code.

    Raises OSError, ResourceError: it cannot begin.
    """

    def __init__(
        self,
        state: KeeperState,
        workers: Sequence[Worker],
        poll: select.poll,
        keeper: int,
        *,
        load_seconds: float = LOAD_SECONDS,
        ignores_hangup: bool = False,
    ) -> None:
        self.stage = Stage.LOADING
        self.why = ""
        self.version = self.formats = ""
        self.longest_pause = 0.0
        self.handed: list[Worker] = []
        self._numbers = {worker.spec.name: i for i, worker in enumerate(workers)}
        self._left = deque(workers)
        self._current: Worker | None = None
        self._starting = False  # the new code was asked to start the current one
        self._stopped_at = 0.0
        self._poll = poll
        self._load_seconds = load_seconds
        self._deadline = time.monotonic() + load_seconds
        self._said = os.memfd_create("vring-upgrade", os.MFD_CLOEXEC)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._notifier = Notifier(self._channel)
        self._channel.settimeout(HAND_OVER_SECONDS)
        self._answers = DescriptorStore(0)
        _adopt_orphans(True)
        with theirs:
            self._pid = fork()
            if not self._pid:
                self._be_candidate(state, theirs.fileno(), keeper, ignores_hangup)
        poll.register(self._channel, select.POLLIN)

    @property
    def deadline(self) -> float | None:
        """Return when (monotonic) what is waited for is too late; None: nothing is waited for."""
        return self._deadline if self.stage in (Stage.LOADING, Stage.HANDING) else None

    def starts(self, worker: Worker) -> bool:
        """Return whether the next process of a worker is the new code's to start."""
        new = worker is self._current or worker in self.handed
        return new and self.stage in (Stage.HANDING, Stage.DONE)

    def start(self, worker: Worker) -> None:
        """Have a worker started that has ended; what it stored goes along."""
        if worker is self._current:
            self._starting = True
            self._stopped_at = time.monotonic()
            self._deadline = self._stopped_at + HAND_OVER_SECONDS
        number = self._numbers[worker.spec.name]
        try:
            for name, fds in worker.store.descriptors.items():
                self._notifier.notify("FDSTORE=1", f"FDNAME={name}", fds=fds)
            self._notifier.notify(
                f"START={number}", f"RESTARTS={worker.restarts}", f"DIED={worker.died:d}"
            )
            started = self._answer()
        except ResourceError:
            started = {}
        if (pid := int(started.get("STARTED", "0"))) > 0:
            worker.live(pid, self._poll)
        else:
            self.fail("it could not start a worker")
            worker.start_at = time.monotonic()

    def ended(self, worker: Worker) -> None:
        """Note that a process of a worker has ended that was not told to."""
        if self._starting and worker is self._current:
            self.fail(f"{worker.spec.name}: its worker ended before it served")

    def act(self, ready: Collection[int]) -> None:
        """Do what is next."""
        if self._channel.fileno() in ready and self.stage is Stage.LOADING:
            self._loaded()
        if self.stage is Stage.HANDING:
            self._hand_over()
        if self.stage in (Stage.LOADING, Stage.HANDING) and time.monotonic() > self._deadline:
            late = HAND_OVER_SECONDS if self._current else self._load_seconds
            what = "did not serve" if self._current else "did not load"
            worker = self._current
            self.fail(f"it {what} within {late:g} s")
            if worker is not None and self._starting and worker.pid:
                worker.signal(signal.SIGKILL)  # it is the new code's, and the keeper starts another

    def fail(self, why: str) -> None:
        """Give up: end the new code. Workers that it started live on."""
        if self.stage is not Stage.FAILED:
            self.stage = Stage.FAILED
            self.why = why
            self.close()

    def close(self) -> None:
        """End the new code's process. Safe to call twice."""
        if not self._pid:
            return
        self._poll.unregister(self._channel)
        self._channel.close()
        with contextlib.suppress(ProcessLookupError):
            if self.stage is not Stage.DONE:
                os.kill(self._pid, signal.SIGKILL)
        _reap(self._pid)
        self._pid = 0
        os.close(self._said)

    def leave(self) -> None:
        """Close what is the keeper's alone, in a worker that it has forked."""
        self._channel.close()
        os.close(self._said)

    def end_strangers(self, known: Collection[int]) -> None:
        """Kill children of the keeper that it does not know: started as the new code failed."""
        _adopt_orphans(False)
        me = os.getpid()
        children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
        for pid in map(int, children):
            if pid not in known:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                _reap(pid)

    # --- internals

    def _be_candidate(
        self, state: KeeperState, channel: int, keeper: int, ignores_hangup: bool
    ) -> None:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGHUP, signal.SIG_IGN if ignores_hangup else signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            stderr = os.dup(2)
            os.dup2(self._said, 2)
            extra = [channel, stderr, keeper, *state.shared()]
            start_again(state, *extra, numbers=(channel, stderr, keeper))
        except BaseException as error:
            os.write(2, str(error).encode())
        finally:
            os._exit(127)

    def _loaded(self) -> None:
        fields = self._answer()
        if "READY" not in fields:
            said = os.pread(self._said, _SAID_MOST, 0).decode(errors="replace").split("\n")
            last = next((line for line in reversed(said) if line.strip()), "it said nothing")
            self.fail(f"the new version does not start: {last.strip()[:500]}")
            return
        self.version = fields.get("VERSION", "")
        self.formats = fields.get("FORMATS", "")
        self.stage = Stage.HANDING
        self._deadline = time.monotonic() + HAND_OVER_SECONDS

    def _answer(self) -> dict[str, str]:
        """Return what the new code says; nothing if it has ended, or does not say it in time."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        if not poll.poll(HAND_OVER_SECONDS * 1000):
            return {}
        return self._answers.receive(self._channel) or {}

    def _hand_over(self) -> None:
        worker = self._current
        if worker is not None and self._starting and worker.ready and worker.pid:
            self.longest_pause = max(self.longest_pause, time.monotonic() - self._stopped_at)
            self.handed.append(worker)
            self._current = None
        if self._current is None:
            if not self._left:
                self.stage = Stage.DONE
                return
            worker = self._left.popleft()
            if not worker.pid and worker.start_at is None:
                return  # it is done
            self._current = worker
            self._starting = False
            self._deadline = time.monotonic() + HAND_OVER_SECONDS
        # One that begins just now is told when it serves; one that has ended is started by us.
        assert worker is not None
        if worker.ready and worker.pid and not self._starting:
            worker.tell_to_hand_over()


def _adopt_orphans(on: bool) -> None:
    """Have the kernel make this process the parent of its children's children."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


def _reap(pid: int) -> None:
    """Wait until a child is gone, but not for ever."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if poll.poll(GONE_SECONDS * 1000):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
    finally:
        close_all([pidfd])
