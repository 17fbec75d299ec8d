"""VMs that come and go while the service runs, as the keeper sees them: names and texts.

The monitor checks what its clients describe, and hands the text of it to the keeper, which does not
look into it: it starts a worker with it. Messages are those of the descriptor store protocol. From
the monitor: ``VM=`` a name, ``TEXT=`` each piece of the text, ``DO=add`` or ``DO=remove``. To it:
``VM=``, and ``DONE=`` what was done, with the monitor's end of the link to a worker that was added
and the sockets that it has made for its VM's own monitors, or ``FAILED=`` why not. From a worker
that cannot begin: ``FAILED=``.
"""

from __future__ import annotations

import array
import contextlib
import re
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vring_serial.service.link import Links
from vring_serial.service.worker import Worker, WorkerSpec

#: Characters of a text: ASCII, on one line.
TEXT_MAX = 256 << 10
#: Characters of one piece of it, and of a reason.
PIECE_MAX = 3000
REASON_MAX = 500
#: Names of VMs that come and go: they are words of these messages.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
#: VMs that a service may have.
VMS_MAX = 1024
#: What the names of the sockets begin with that a worker keeps for its VM's monitors, and how many
#: of them are handed on.
MONITOR_ROLE = "monitor-"
MONITORS_MAX = 16
#: Seconds that a VM's worker has to stop.
LEAVE_SECONDS = 5.0


@dataclass(slots=True)
class Changed:
    """How the VMs differ from those of the configuration.

    Attributes:
        added: the texts of those that were added, by name.
        removed: names of those that were configured, and removed.
    """

    added: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)


class Roster:
    """Takes orders from the monitor, for the keeper.

    Args:
        changed: how the VMs differ from the configuration; kept up to date.
        spec: makes the worker of a VM that is added, of its name and text.
        links: gets the links of such VMs.
    """

    def __init__(
        self, changed: Changed, spec: Callable[[str, str], WorkerSpec], links: Links
    ) -> None:
        self.changed = changed
        self._spec = spec
        self._links = links
        self._name = ""
        self._text: list[str] = []
        self._coming: dict[str, str] = {}  # names of VMs that do not serve yet: why not
        self._going: dict[str, float] = {}  # of those that are removed: when they are killed

    @property
    def busy(self) -> bool:
        """Return whether a VM is being added or removed."""
        return bool(self._coming or self._going)

    @property
    def deadline(self) -> float | None:
        """Return when (monotonic) to :meth:`act` again; None: never."""
        return min(self._going.values(), default=None)

    def take(
        self, fields: Mapping[str, str], workers: list[Worker], *, may: bool
    ) -> WorkerSpec | None:
        """Take a message of the monitor's; return the worker that is to be made for it.

        Args:
            fields: of the message.
            workers: the keeper's.
            may: whether the service can be changed just now.
        """
        if "VM" in fields:
            self._name, self._text = fields["VM"], []
        if "TEXT" in fields and sum(map(len, self._text)) < TEXT_MAX:
            self._text.append(fields["TEXT"])
        order = fields.get("DO")
        if order is None:
            return None
        name, text = self._name, "".join(self._text)
        named = next((worker for worker in workers if worker.spec.name == name), None)
        serving = [worker for worker in workers if worker.spec.serves]
        why = ""
        if _NAME.fullmatch(name) is None:
            why = "that is no name of a VM"
        elif not may:
            why = "the service stops, or is upgraded, just now"
        elif order == "add" and (named is not None or len(serving) >= VMS_MAX):
            why = f"there are {VMS_MAX} VMs" if named is None else f"there is a VM {name} already"
        elif order == "add":
            try:
                self._links.add(name)
            except OSError as error:
                why = f"no link to its worker: {error.strerror}"
            else:
                self.changed.added[name] = text
                self._coming[name] = "its worker ended before it served"
                return self._spec(name, text)
        elif named is None or named not in serving:
            why = f"{name} has no worker of its own"
        elif serving == [named]:
            why = f"{name} is the only VM: stop the service instead"
        elif name not in self._going:
            self._going[name] = time.monotonic() + LEAVE_SECONDS
            return None
        if why:
            tell_monitor(workers, name, failed=why)
        return None

    def hear(self, worker: Worker, fields: Mapping[str, str], workers: list[Worker]) -> None:
        """Note what a worker says of how it begins."""
        name = worker.spec.name
        if name not in self._coming:
            return
        if "FAILED" in fields:
            self._coming[name] = fields["FAILED"][:REASON_MAX]
        if worker.ready:
            del self._coming[name]
            kept = worker.store.descriptors
            sockets = [fd for role in kept if role.startswith(MONITOR_ROLE) for fd in kept[role]]
            fds = [self._links.monitor_end(name), *sockets[:MONITORS_MAX]]
            tell_monitor(workers, name, done="add", fds=fds)

    def expects(self, worker: Worker) -> bool:
        """Return whether a worker is that of a VM which does not serve yet."""
        return worker.spec.name in self._coming

    def act(self, workers: list[Worker]) -> list[Worker]:
        """Tell workers to stop whose VMs are removed, when they can remove what they made.

        Returns those that can be dropped: they do not live, and made nothing.
        """
        now = time.monotonic()
        ended = []
        for worker in workers:
            kill_at = self._going.get(worker.spec.name)
            if kill_at is None:
                continue
            if not worker.pid:
                if worker.start_at is None or not len(worker.store):
                    ended.append(worker)
                else:
                    worker.start_at = min(worker.start_at, now)
            elif now > kill_at:
                worker.signal(signal.SIGKILL)
                self._going[worker.spec.name] = now + LEAVE_SECONDS
            elif not worker.told_to_stop and (worker.ready or not worker.restarts):
                worker.told_to_stop = True
                worker.signal(signal.SIGTERM)
        return ended

    def ended(self, worker: Worker, code: int) -> bool | None:
        """Say what becomes of a worker that has ended.

        Returns:
            True: it is dropped. False: another one begins, to remove what it made. None: it is as
            any other.
        """
        name = worker.spec.name
        if name in self._going:
            by_itself = code >= 0 or code == -signal.SIGTERM
            if not by_itself and len(worker.store) and not (worker.clears or worker.cast_out):
                worker.clears = True
                return False
            return True
        if name in self._coming and not worker.ready and not worker.restarts:
            return True
        return None

    def dropped(self, name: str, workers: list[Worker], why: str = "") -> None:
        """Forget a worker that the keeper has dropped, and tell the monitor, if it failed why."""
        self._links.remove(name)
        was_added = self.changed.added.pop(name, None) is not None
        said = self._coming.pop(name, "")
        if self._going.pop(name, None) is not None:
            if not was_added:
                self.changed.removed.append(name)
            tell_monitor(workers, name, done="remove")
        else:
            tell_monitor(workers, name, failed=why or said)


def tell_monitor(
    workers: list[Worker],
    name: str,
    *,
    done: str = "",
    failed: str = "",
    fds: Sequence[int] = (),
) -> None:
    """Answer the monitor; one that does not read is ended, and the next one knows."""
    line = f"DONE={done}" if done else f"FAILED={failed}"
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    for worker in workers:
        if worker.spec.serves or not worker.pid:
            continue
        data = f"VM={name}\n{line}".encode("ascii", "replace")
        try:
            worker.keeper_end.sendmsg([data], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            with contextlib.suppress(ProcessLookupError):
                worker.signal(signal.SIGKILL)
