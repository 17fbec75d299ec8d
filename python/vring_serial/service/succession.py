"""What a keeper leaves to the code that follows it in the same process, or tries to.

An upgrade replaces the keeper's code by exec: its children stay its children, and descriptors that
are not close-on-exec stay open under their numbers. Everything else is in a sealed memfd, whose
number an environment variable has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from vring_serial.chardev.stdio import StreamsState
from vring_serial.errors import ResourceError, StateError
from vring_serial.saving import StateFormat

ENVIRONMENT = "VRING_KEEPER_STATE"
#: Name of the memfd in which a keeper says what became of upgrades, as /proc shows it.
_REPORT = "vring-keeper"
_REPORT_SIZE = 4096
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_STATE_MOST = 64 << 20


@dataclass(slots=True)
class WorkerState:
    """One worker, as :class:`vring_serial.service.worker.Worker`, with descriptors by number.

    Attributes:
        name: of its spec.
        pid: 0: it does not live.
        journal, keeper_end, worker_end: descriptors.
        store: what it stored, by name, oldest first.
        ready, refused, cast_out: see Worker.
        restarts, left, unready: see Worker.
        deaths: when the last lives ended, in ns of the monotonic clock.
        start_at: when its next life begins, in the same; None while it lives, or is done.
        pause: before the next life without state, in ns.
    """

    name: str = ""
    pid: int = 0
    journal: int = -1
    keeper_end: int = -1
    worker_end: int = -1
    store: dict[str, list[int]] = field(default_factory=dict)
    ready: bool = False
    refused: bool = False
    cast_out: bool = False
    restarts: int = 0
    left: int = 0
    unready: int = 0
    deaths: list[int] = field(default_factory=list)
    start_at: int | None = None
    pause: int = 0


@dataclass(slots=True)
class KeeperState:
    """A keeper.

    Attributes:
        version: of the code that wrote it.
        workers: in the order of its specs.
        status: exit status so far.
        report: descriptor of what `vring upgrade` reads.
        pid_file: descriptor that holds the pid file's lock; -1 without one.
        streams: how the standard streams were; None if nobody changes them.
        sockets: descriptors that the service manager passed.
        links: both ends of each link, by the worker's name.
        inputs: files that the configuration was read from, by path.
        added: texts of VMs that were added since, by name.
        removed: names of those that were removed.
        longest_pause: of a worker during the upgrade, in microseconds.
    """

    version: str = ""
    workers: list[WorkerState] = field(default_factory=list)
    status: int = 0
    report: int = -1
    pid_file: int = -1
    streams: StreamsState | None = None
    sockets: list[int] = field(default_factory=list)
    links: dict[str, tuple[int, int]] = field(default_factory=dict)
    inputs: dict[str, bytes] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    longest_pause: int = 0

    def descriptors(self) -> Iterator[int]:
        """Return all numbers of descriptors in it."""
        yield self.report
        if self.pid_file >= 0:
            yield self.pid_file
        for worker in self.workers:
            yield from (worker.journal, worker.keeper_end, worker.worker_end)
            for fds in worker.store.values():
                yield from fds
        yield from self.sockets
        for ends in self.links.values():
            yield from ends

    def shared(self) -> Iterator[int]:
        """Return the numbers of descriptors that a candidate has, too."""
        for worker in self.workers:
            yield from (worker.journal, worker.worker_end)
        yield from self.sockets
        for ends in self.links.values():
            yield from ends


KEEPER = StateFormat(
    "keeper", 2, KeeperState, {1: lambda fields: fields | {"added": {}, "removed": []}}
)


@dataclass(slots=True)
class Arrival:
    """How this process came to be: as what follows a keeper, or is tried.

    Attributes:
        state: of the keeper. A candidate has only its journals and workers' ends.
        channel: of a candidate, to the keeper; -1: the process is the keeper's.
        stderr: of a candidate: the keeper's standard error, for its workers.
        keeper: of a candidate: pidfd of the keeper.
    """

    state: KeeperState
    channel: int = -1
    stderr: int = -1
    keeper: int = -1

    @property
    def is_candidate(self) -> bool:
        """Return whether a keeper with other code tries this one."""
        return self.channel >= 0


def arrive() -> Arrival | None:
    """Return what a keeper left for this process; None: it is one like any other.

    The environment forgets it, and no descriptor of it is inherited by anybody else.

    Raises StateError: it is of a version that is not known, or does not fit.
    """
    text = os.environ.pop(ENVIRONMENT, None)
    if text is None:
        return None
    try:
        numbers = [int(word) for word in text.split(":")]
        state_fd, channel, stderr, keeper = numbers
        data = os.pread(state_fd, _STATE_MOST, 0)
        os.close(state_fd)
    except (ValueError, OSError):
        raise StateError(f"{ENVIRONMENT} is not for users") from None
    arrival = Arrival(KEEPER.unpack(data), channel, stderr, keeper)
    mine = list(arrival.state.descriptors())
    if arrival.is_candidate:
        mine = [channel, stderr, keeper, *arrival.state.shared()]
    if len(set(mine)) != len(mine):
        raise StateError("the keeper left one descriptor for two things")
    try:
        _pass_on(mine, False)
    except OSError:
        raise StateError("the keeper left a descriptor that is not open") from None
    return arrival


def write_down(state: KeeperState) -> int:
    """Return a sealed memfd with the state. Raises ResourceError."""
    try:
        fd = os.memfd_create("vring-keeper-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, fd)
            data = memoryview(KEEPER.pack(state))
            while data:
                data = data[os.write(fd, data) :]
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            stack.pop_all()
    except OSError as error:
        raise ResourceError(f"no memory for the keeper's state: {error.strerror}") from None
    return fd


def command() -> tuple[str, list[str]]:
    """Return the program that this process was started as, and its arguments, to start it again.

    A script is started by its path, so that its first line is read anew: after an upgrade it may
    name another interpreter.
    """
    count = len(sys.argv) - 1
    head = sys.orig_argv[: len(sys.orig_argv) - count]
    arguments = sys.orig_argv[len(head) :]
    if len(head) == 2 and _is_script(head[1]):
        return head[1], [head[1], *arguments]
    return sys.executable, [*head, *arguments]


def _is_script(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"#!" and os.access(path, os.X_OK)
    except OSError:
        return False


def start_again(state: KeeperState, *extra: int, numbers: tuple[int, int, int] = (-1,) * 3) -> None:
    """Replace the code of this process by what :func:`command` starts now.

    Args:
        state: of the keeper; its descriptors stay open, as far as they are in ``extra``.
        extra: descriptors that stay open.
        numbers: see :class:`Arrival`: channel, stderr, keeper.

    Raises OSError, and everything is as it was; ResourceError.
    """
    fd = write_down(state)
    passed = [fd, *extra]
    try:
        path, arguments = command()
        words = ":".join(map(str, (fd, *numbers)))
        _pass_on(passed, True)
        os.execve(path, arguments, os.environ | {ENVIRONMENT: words})
    finally:
        _pass_on(passed, False)
        os.close(fd)


def _pass_on(fds: Iterable[int], on: bool) -> None:
    for fd in fds:
        os.set_inheritable(fd, on)


# --- what a keeper says about upgrades


@dataclass(frozen=True, slots=True)
class Report:
    """What a keeper says about itself, to who may look into its process.

    Attributes:
        version: of its code.
        upgrades: that were tried, and are over.
        upgrading: one is under way.
        succeeded: the last one.
        text: what became of that.
    """

    version: str
    upgrades: int = 0
    upgrading: bool = False
    succeeded: bool = True
    text: str = ""


class Reporter:
    """The keeper's side.

    Args:
        version: of its code.
        fd: descriptor of what the code before said; taken over. -1: there was none.
    """

    def __init__(self, version: str, fd: int = -1) -> None:
        self.fd = os.memfd_create(_REPORT, os.MFD_CLOEXEC) if fd < 0 else fd
        found = None if fd < 0 else read_report(fd)
        self._report = dataclasses.replace(found or Report(version), version=version)
        self._write()

    def begin(self) -> None:
        """Say that an upgrade is under way."""
        self._report = dataclasses.replace(self._report, upgrading=True)
        self._write()

    def finish(self, text: str, *, succeeded: bool) -> None:
        """Say what became of an upgrade."""
        self._report = dataclasses.replace(
            self._report,
            upgrades=self._report.upgrades + 1,
            upgrading=False,
            succeeded=succeeded,
            text=text[: _REPORT_SIZE // 16],
        )
        self._write()

    def _write(self) -> None:
        text = json.dumps(dataclasses.asdict(self._report))
        os.pwrite(self.fd, text.encode().ljust(_REPORT_SIZE), 0)


def read_report(fd: int) -> Report | None:
    """Return what is said; None while it is being written."""
    try:
        return Report(**json.loads(os.pread(fd, _REPORT_SIZE, 0)))
    except (ValueError, TypeError):
        return None


def find_report(pid: int) -> int:
    """Return a descriptor of what a keeper says. Raises ResourceError: the process is no keeper."""
    directory = f"/proc/{pid}/fd"
    try:
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(f"{directory}/{name}").startswith(f"/memfd:{_REPORT} "):
                    return os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ResourceError(f"there is no process {pid}") from None
    except OSError as error:
        raise ResourceError(f"process {pid}: {error.strerror}") from None
    raise ResourceError(f"process {pid} is no keeper of `vring serve`")
