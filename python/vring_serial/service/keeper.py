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
import time
from collections.abc import Callable, Iterator, Sequence

from vring_serial.errors import ResourceError
from vring_serial.service.aside import MOST as OVERDUE_MOST
from vring_serial.service.descriptor_store import Notifier
from vring_serial.service.journal import Journal, checksum
from vring_serial.service.leaving import KILL_SECONDS, Leaving
from vring_serial.service.roster import Roster
from vring_serial.service.succession import KeeperState, Reporter, start_again
from vring_serial.service.systemd import ServiceManager
from vring_serial.service.upgrade import Closing, Stage, Upgrade, Upgrading
from vring_serial.service.watchdog import Watchdog
from vring_serial.service.worker import (
    DEATHS_MAX,
    DEATHS_SECONDS,
    PAUSE_SECONDS,
    Inheritance,
    Worker,
    WorkerSpec,
    be,
    fork,
    how_ended,
)
from vring_serial.unix_fds import allow_descriptors

#: Seconds that a worker which goes on has to begin, before it is told to stop: only then it removes
#: what its predecessors made.
BEGIN_SECONDS = 2.0
#: Seconds that workers have to stop, until they are killed.
STOP_SECONDS = 5.0
#: Most seconds before a worker that died without any state is started again.
PAUSE_MOST = 10.0
#: Descriptors that the keeper needs for itself.
OWN_DESCRIPTORS = 64
#: Messages of one worker before those of another: a few, for one may bring 253 descriptors.
MESSAGES = 8
#: What the keeper acts on.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
#: More than the kernel keeps for a socket that nobody reads (net.core.wmem_default).
UNREAD_MOST = 4096


class _Stop(enum.Enum):
    """How far the end of the service is."""

    NOT = enum.auto()
    ASKED = enum.auto()
    KILLED = enum.auto()


class Keeper:
    """Runs workers until it is told to stop.

    SIGTERM and SIGINT stop the workers, SIGHUP is passed on to them, SIGUSR2 begins an upgrade.
    Must run in a process with one thread; it installs signal handlers and reaps its children.

    Args:
        specs: the workers.
        log: for what happens to them: level, event, text and fields.
        descriptors: how many each worker may store, as far as the process may open so many.
        stop_seconds: how long workers have to stop; see STOP_SECONDS.
        upgrading: what an upgrade needs to know; None: there is none.
        manager: the service manager, which hears how the service is.
        before: what the code left that was the keeper before an upgrade; None: this is the first.
        roster: takes orders to add and remove VMs; None: nobody gives any.
    """

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        log: Callable[..., None],
        *,
        descriptors: int = 4096,
        stop_seconds: float = STOP_SECONDS,
        upgrading: Upgrading | None = None,
        manager: ServiceManager | None = None,
        before: KeeperState | None = None,
        roster: Roster | None = None,
    ) -> None:
        self._roster = roster
        self._say = log
        self._upgrading = upgrading
        self._manager = manager or ServiceManager(None)
        self._watchdog = Watchdog(self._manager, self._tell_hung)
        self._told_ready = False
        self._upgrade: Upgrade | None = None
        self._before = before
        version = "" if upgrading is None else upgrading.version
        self._reporter = Reporter(version, -1 if before is None else before.report)
        self._stop_seconds = stop_seconds
        self._stop = _Stop.NOT
        self._status = 0
        self._deadline = 0.0
        self._begin_by = 0.0
        self._ignores_hangup = False
        self._pidfd = os.pidfd_open(os.getpid())
        self._poll = select.poll()
        self._leaving = Leaving(self._poll)
        self._workers: list[Worker] = []
        self._closing = Closing(self._workers)
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll.register(self._wake_reader, select.POLLIN)
        share = (allow_descriptors() - OWN_DESCRIPTORS) // len(specs)
        self._descriptors = max(min(descriptors, share), 0)
        if before is not None:
            self._status = before.status
            self._go_on(specs, before)
        for spec in specs if before is None else ():
            self._workers.append(Worker.make(spec, self._descriptors, self._poll))

    def _go_on(self, specs: Sequence[WorkerSpec], before: KeeperState) -> None:
        """Take over the workers of the code that was the keeper before."""
        for state, spec in zip(before.workers, specs, strict=True):
            self._workers.append(Worker.from_state(state, spec, self._descriptors, self._poll))

    def run(self) -> int:
        """Serve until the service ends; return its exit status."""
        gc.collect()
        gc.freeze()  # else a collection in a worker copies every page that has an object
        try:
            with self._signals():
                if self._before is not None:
                    self._told_ready = True
                    self._tell_upgraded(self._before)
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
        return any(w.pid or w.start_at is not None for w in self._workers)

    def _wait(self) -> None:
        """Wait for the next thing to happen, and act on it."""
        times = [w.start_at for w in self._workers if w.start_at is not None]
        if self._stop is not _Stop.NOT:
            times.append(self._deadline)
            if any(w.pid and not w.told_to_stop for w in self._workers):
                times.append(self._begin_by)
        for part in (self._upgrade, self._watchdog, self._closing, self._roster):
            if part is not None and part.deadline is not None:
                times.append(part.deadline)
        times += self._leaving.deadlines
        timeout = None
        if times:
            timeout = max(0.0, min(times) - time.monotonic()) * 1000 + 1
        ready = {fd for fd, _ in self._poll.poll(timeout)}
        for worker in list(self._workers):
            if worker.keeper_end.fileno() in ready:
                self._take_messages(worker)
            if worker.pidfd >= 0 and worker.pidfd in ready:
                self._reap(worker)
        self._watchdog.look(self._workers)
        self._leaving.see_off(ready)
        for worker in () if self._roster is None else self._roster.act(self._workers):
            self._drop(worker)
        if self._upgrade is not None:
            self._upgrade.act(ready)
            self._look_at_upgrade(self._upgrade)
        elif self._closing.deadline is not None:
            self._try_upgrade()
        if self._wake_reader in ready:
            self._take_signals()
        if self._stop is _Stop.ASKED:
            self._tell_to_stop()
            if time.monotonic() > self._deadline:
                self._kill()

    def _take_messages(self, worker: Worker, most: int = MESSAGES) -> None:
        for _ in range(most):
            fields = worker.store.receive(worker.keeper_end)
            if worker.store.refused and not worker.refused:
                worker.refused = True
                text = f"{worker.spec.name}: its worker has " + (
                    "a file that is not kept, since it may take for ever to close"
                    if worker.store.unfit
                    else "more descriptors than can be kept for it"
                )
                after = "; another one will not find all of them"
                self._say(logging.ERROR, "store_full", text + after, worker=worker.spec.name)
            if worker.store.aside.overdue > OVERDUE_MOST:
                self._cast_out(worker)
                return
            if fields is None:
                return
            if fields.get("READY") == "1":
                worker.ready = True
                worker.seen = time.monotonic()
                self._tell_ready()
            if fields.get("WATCHDOG") == "1":
                worker.seen = time.monotonic()
            if self._roster is not None:
                self._call_the_roster(self._roster, worker, fields)
            if fields.get("RESTART") == "1":
                worker.ask_for_successor()
            if fields.get("STOPPED") == "1" and worker.hands_over and worker.pid:
                self._leaving.add(worker)

    def _tell_ready(self) -> None:
        """Tell the service manager, once, when all workers that serve do so."""
        serving = [worker for worker in self._workers if worker.spec.serves]
        if not self._told_ready and all(worker.ready for worker in serving):
            self._told_ready = True
            self._manager.ready("serving " + ", ".join(worker.spec.name for worker in serving))

    def _tell_hung(self, worker: Worker) -> None:
        text = f"{worker.spec.name}: its worker does not do anything any more, and is ended"
        self._say(logging.ERROR, "worker_hangs", text, worker=worker.spec.name)

    def _cast_out(self, worker: Worker) -> None:
        """End a worker for good, and hear nothing of it any more."""
        if worker.cast_out:
            return
        worker.cast_out, worker.start_at = True, None
        self._poll.unregister(worker.keeper_end)
        if worker.pid:
            signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
        text = f"{worker.spec.name}: its worker stores what cannot be closed; it is ended for good"
        self._say(logging.ERROR, "worker_cast_out", text, worker=worker.spec.name)

    # --- workers

    def _call_the_roster(self, roster: Roster, worker: Worker, fields: dict[str, str]) -> None:
        if worker.spec.serves:
            roster.hear(worker, fields, self._workers)
            return
        may = self._stop is _Stop.NOT and self._upgrade is None
        if (spec := roster.take(fields, self._workers, may=may)) is not None:
            try:
                self._workers.append(Worker.make(spec, self._descriptors, self._poll))
            except (OSError, ResourceError) as error:
                roster.dropped(spec.name, self._workers, str(error))

    def _drop(self, worker: Worker, why: str = "") -> None:
        assert self._roster is not None
        if not worker.cast_out:
            self._poll.unregister(worker.keeper_end)
        worker.release()
        self._workers.remove(worker)
        self._roster.dropped(worker.spec.name, self._workers, why)

    def _start_due(self) -> None:
        for worker in list(self._workers):
            if worker.start_at is not None and worker.start_at <= time.monotonic():
                if self._upgrade is not None and self._upgrade.starts(worker):
                    self._upgrade.start(worker)
                else:
                    self._start(worker)

    def _start(self, worker: Worker) -> None:
        assert not worker.pid
        if len(os.listdir("/proc/self/task")) != 1:
            raise ResourceError("the keeper has more than one thread; a fork would be unsafe")
        try:
            pid = fork()
        except OSError as error:
            if self._roster is not None and self._roster.expects(worker):
                self._drop(worker, f"no process for its worker: {error.strerror}")
                return
            if not worker.restarts:
                raise ResourceError(f"{worker.spec.name}: {error.strerror}") from None
            self._postpone(worker, f"no process for its worker: {error.strerror}")
            return
        if not pid:
            be(worker.spec, lambda: self._inherit(worker), ignore_hangup=self._ignores_hangup)
        worker.live(pid, self._poll)

    def _postpone(self, worker: Worker, why: str) -> None:
        """Start a worker later, and then later still."""
        worker.start_at = time.monotonic() + worker.pause
        worker.pause = min(2 * worker.pause, PAUSE_MOST)
        text = f"{worker.spec.name}: {why}"
        self._say(logging.ERROR, "worker_postponed", text, worker=worker.spec.name)

    def _inherit(self, worker: Worker) -> Inheritance:
        """Close in the worker's process what is not the worker's; return what is."""
        os.close(self._wake_reader)
        os.close(self._wake_writer)
        os.close(self._reporter.fd)
        self._manager.close()
        if self._upgrade is not None:
            self._upgrade.leave()
        self._leaving.close()
        for other in self._workers:
            other.keeper_end.close()
            if other is not worker:
                other.worker_end.close()
                os.close(other.journal)
                other.store.forsake()
                if other.pidfd >= 0:
                    os.close(other.pidfd)
        return Inheritance(
            worker.journal,
            worker.store.descriptors,
            Notifier(worker.worker_end),
            self._pidfd,
            worker.restarts,
            worker.died,
        )

    def _reap(self, worker: Worker) -> None:
        _, status = os.waitpid(worker.pid, 0)
        self._poll.unregister(worker.pidfd)
        os.close(worker.pidfd)
        worker.pid, worker.pidfd = 0, -1
        code = os.waitstatus_to_exitcode(status)
        if self._upgrade is not None:
            self._upgrade.ended(worker)
        self._take_messages(worker, 0 if worker.cast_out else UNREAD_MOST)  # sent just before
        fate = None if self._roster is None else self._roster.ended(worker, code)
        if fate is not None and self._stop is _Stop.NOT:
            self._drop(worker) if fate else self._start_again(worker, code)
            return
        if worker.cast_out:
            self._forget(worker)
            self._done(worker, 1)
            return
        if self._stop is not _Stop.NOT:
            if self._stop is _Stop.ASKED and code < 0 and len(worker.store) and not worker.clears:
                # Somebody has to remove what it had made.
                worker.clears = True
                self._start_again(worker, code)
                return
            # It was told to end, if it did not do so by itself.
            self._done(worker, 0 if code in (0, -signal.SIGTERM) else code)
        elif code == 0 and worker.hands_over:
            worker.begin_again()
        elif code == 0:
            self._done(worker, 0)
        elif not worker.ready and not worker.restarts:
            if code < 0:
                text = f"{worker.spec.name}: its worker ended {how_ended(code)} before it served"
                self._say(logging.ERROR, "worker_ended", text, worker=worker.spec.name)
            self._done(worker, code)
            self._ask_to_stop()
        else:
            self._start_again(worker, code)

    def _done(self, worker: Worker, code: int) -> None:
        worker.start_at = None
        self._status = self._status or (code if code >= 0 else 1)
        serving = (w for w in self._workers if w.spec.serves)
        if self._stop is _Stop.NOT and not any(w.pid or w.start_at is not None for w in serving):
            self._ask_to_stop()

    def _start_again(self, worker: Worker, code: int) -> None:
        now = time.monotonic()
        left = checksum(worker.journal)
        if left != worker.left:
            worker.left = left
            worker.deaths.clear()
        worker.deaths.append(now)
        worker.unready = 0 if worker.ready else worker.unready + 1
        worker.restarts += 1
        worker.died = True
        worker.start_at = now
        worker.lives.append(now)
        if worker.lives_too_short(now):
            worker.start_at = now + PAUSE_SECONDS  # the processors are others' too
        text = f"{worker.spec.name}: its worker ended {how_ended(code)}; another one goes on"
        often = ""
        if len(worker.deaths) == DEATHS_MAX and now - worker.deaths[0] < DEATHS_SECONDS:
            often = f"{DEATHS_MAX} times in {DEATHS_SECONDS:g} s"
        elif worker.unready == DEATHS_MAX:
            often = f"{DEATHS_MAX} times before it served"
        if often:
            worker.start_at = now + worker.pause
            worker.pause = min(2 * worker.pause, PAUSE_MOST)
            text = (
                f"{worker.spec.name}: its worker ended {how_ended(code)}, {often}; its sessions "
                "end here, and another one begins anew"
            )
        self._say(
            logging.ERROR, "worker_ended", text, worker=worker.spec.name, restarts=worker.restarts
        )
        self._manager.status(text)
        if often:  # whoever notices finds it said already
            self._forget(worker)

    def _forget(self, worker: Worker) -> None:
        """Close and drop all that the worker left."""
        worker.deaths.clear()
        worker.unready = 0
        worker.store.close()
        os.close(worker.journal)
        worker.journal = Journal.create()
        if self._upgrade is not None:
            self._upgrade.fail(f"{worker.spec.name}: its sessions have ended meanwhile")

    # --- upgrades

    def _begin_upgrade(self) -> None:
        busy = self._upgrade is not None or self._closing.deadline is not None
        if self._upgrading is None or busy or self._stop is not _Stop.NOT:
            return
        self._reporter.begin()
        self._manager.reloading()
        self._try_upgrade()

    def _try_upgrade(self) -> None:
        if self._closing.waits():
            return
        if self._roster is not None and self._roster.busy:
            self._refuse_upgrade("a VM is being added or removed")
            return
        assert self._upgrading is not None
        try:
            self._closing.check()
            self._say(logging.INFO, "upgrade", "upgrade: the new version is loaded, and tried")
            self._upgrade = Upgrade(
                self._state(),
                self._workers,
                self._poll,
                self._pidfd,
                load_seconds=self._upgrading.load_seconds,
                ignores_hangup=self._ignores_hangup,
            )
        except (OSError, ResourceError) as error:
            self._refuse_upgrade(str(error))

    def _look_at_upgrade(self, upgrade: Upgrade) -> None:
        if upgrade.stage is Stage.FAILED:
            self._upgrade = None
            upgrade.end_strangers(self._known())
            assert self._upgrading is not None
            stay = upgrade.formats != self._upgrading.formats
            for worker in upgrade.handed:
                if worker.pid and not stay:
                    worker.tell_to_hand_over()
            names = ", ".join(worker.spec.name for worker in upgrade.handed)
            after = f"; its workers stay, as older ones do not know their state: {names}"
            self._refuse_upgrade(upgrade.why + (after if stay and names else ""))
        elif upgrade.stage is Stage.DONE and not self._leaving:
            if any(worker.start_at is not None for worker in self._workers):
                return  # one has died, and is started by the new code
            if self._closing.waits():
                return
            upgrade.close()
            upgrade.end_strangers(self._known())
            self._upgrade = None
            try:
                self._become(round(upgrade.longest_pause * 1e6))
            except (OSError, ResourceError) as error:
                self._refuse_upgrade(f"the keeper stays what it is: {error}")

    def _known(self) -> set[int]:
        known = {w.pid for w in self._workers} | self._leaving.pids
        return known.union(*(worker.store.aside.pids for worker in self._workers))

    def _state(self) -> KeeperState:
        assert self._upgrading is not None
        state = self._upgrading.state()
        state.workers = [worker.state() for worker in self._workers]
        state.status, state.report = self._status, self._reporter.fd
        return state

    def _become(self, longest_pause: int) -> None:
        """Replace this code. Raises OSError, ResourceError: it could not be."""
        self._closing.check()
        state = self._state()
        state.longest_pause = longest_pause
        # Until the new code has its handlers, signals wait.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        handler = signal.getsignal(signal.SIGHUP)
        if self._ignores_hangup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            start_again(state, *state.descriptors())
        finally:
            signal.signal(signal.SIGHUP, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _refuse_upgrade(self, why: str) -> None:
        self._closing.forget()
        text = f"upgrade: {why}; the version before goes on"
        self._say(logging.ERROR, "upgrade_refused", text)
        self._reporter.finish(text, succeeded=False)
        self._manager.ready(text)

    def _tell_upgraded(self, before: KeeperState) -> None:
        assert self._upgrading is not None
        pause = before.longest_pause / 1000
        text = (
            f"upgraded from {before.version} to {self._upgrading.version}, with "
            f"{len(self._workers)} of its workers; the longest pause was {pause:.1f} ms"
        )
        self._say(logging.INFO, "upgraded", text, pause_ms=pause)
        self._reporter.finish(text, succeeded=True)
        self._manager.ready(text)

    # --- signals and the end

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        self._ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup
        before = [signal.signal(number, lambda *_: None) for number in SIGNALS]
        wakeup = signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # an upgrade blocks them
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in zip(SIGNALS, before, strict=True):
                signal.signal(number, handler)

    def _take_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._wake_reader, 64):
                if number == signal.SIGHUP:
                    self._manager.reloading()
                    self._send(signal.SIGHUP)
                    self._manager.ready("files were opened anew")
                elif number == signal.SIGUSR2:
                    self._begin_upgrade()
                elif self._stop is _Stop.NOT:
                    self._ask_to_stop()
                elif self._stop is _Stop.ASKED:
                    self._kill()

    def _ask_to_stop(self) -> None:
        self._stop = _Stop.ASKED
        self._manager.stopping()
        if self._upgrade is not None:
            self._upgrade.fail("the service stops")
            self._look_at_upgrade(self._upgrade)
        elif self._closing.deadline is not None:
            self._refuse_upgrade("the service stops")
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
                worker.signal(signal.SIGTERM)

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
                worker.signal(number)

    def _release(self) -> None:
        self._leaving.close()
        for worker in self._workers:
            worker.release()
        os.close(self._wake_reader)
        os.close(self._wake_writer)
        os.close(self._pidfd)
        os.close(self._reporter.fd)
