"""A worker's :class:`vring_serial.keeping.Keeping`: the keeper's store and the journal."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from vring_serial.errors import ResourceError
from vring_serial.lifetime import Closing
from vring_serial.service.descriptor_store import Notifier
from vring_serial.service.journal import Journal
from vring_serial.unix_fds import close_all

log = logging.getLogger(__name__)

#: The section of a journal that speaks of what the keeper was not told.
_UNKEPT = "unkept"


class Shelf(Closing):
    """Descriptors by role, states by section.

    In the store a descriptor is named by its role and a number, which grows with every one: of two
    that a worker left in one role, because it died between storing one and removing the other, the
    later counts.

    Once the keeper has ended there is no successor: nothing is kept any more, and the process that
    serves goes on. So it does if the keeper does not hear, because it was stopped; that is written
    down, for a keeper that is continued has not all that the journal speaks of.

    Args:
        journal: locked by this process; taken over.
        notifier: to the keeper.
        left: what predecessors stored, by name; taken over.
    """

    def __init__(self, journal: Journal, notifier: Notifier, left: dict[str, list[int]]) -> None:
        self._journal = journal
        self._notifier = notifier
        self._names: dict[str, str] = {}
        self._left: dict[str, int] = {}
        self._number = 0
        for name, fds in sorted(left.items(), key=lambda item: _number(item[0])):
            self._inherit(name, fds)

    def close(self) -> None:
        """Close what nobody took, and the journal; all of it stays kept."""
        close_all(self._left.values())
        self._left.clear()
        self._journal.close()

    def keep(self, role: str, fd: int) -> None:
        """See Keeping."""
        if (left := self._left.pop(role, None)) is not None:
            os.close(left)
        before = self._names.get(role)
        self._number += 1
        name = f"{role}#{self._number}"
        with self._unless_gone():
            self._notifier.store(name, fd)
        self._names[role] = name
        if before is not None:
            self.forget(before)

    def drop(self, role: str) -> None:
        """See Keeping."""
        if (name := self._names.pop(role, None)) is not None:
            self.forget(name)
        if (fd := self._left.pop(role, None)) is not None:
            os.close(fd)

    def take(self, role: str) -> int | None:
        """See Keeping."""
        return self._left.pop(role, None)

    def roles(self) -> list[str]:
        """See Keeping."""
        return sorted(self._left)

    def write(self, section: str, state: bytes) -> None:
        """See Keeping."""
        self._journal.write(section, state)

    def read(self, section: str) -> bytes | None:
        """See Keeping."""
        return self._journal.read(section) or None

    def area(self, name: str, size: int) -> memoryview:
        """See Keeping."""
        return self._journal.area(name, size)

    def clear(self, prefix: str = "") -> None:
        """See Keeping; only what begins with ``prefix``."""
        for role in [role for role in self._names if role.startswith(prefix)]:
            self.drop(role)
        for section in self._journal.sections:
            if section.startswith(prefix):
                self._journal.drop(section)

    def scoped(self, name: str) -> ScopedShelf:
        """See Keeping."""
        return ScopedShelf(self, name)

    def serving(self) -> None:
        """Tell the keeper that this process serves."""
        with self._unless_gone():
            self._notifier.notify("READY=1")

    def ask_restart(self) -> None:
        """Ask the keeper for a process that goes on from this one."""
        with self._unless_gone():
            self._notifier.notify("RESTART=1")

    def stopped(self) -> None:
        """Tell the keeper that this process writes and moves nothing any more."""
        self._journal.unlock()
        with self._unless_gone():
            self._notifier.notify("STOPPED=1")

    def drop_untaken(self) -> list[str]:
        """Drop what nobody took, once everything has begun; return the roles."""
        roles = sorted(self._left)
        for role in roles:
            self.drop(role)
        return roles

    def _inherit(self, name: str, fds: list[int]) -> None:
        role, mark, number = name.rpartition("#")
        if not mark or not _number(name) or len(fds) != 1:
            # Nobody of ours stored that.
            close_all(fds)
            self.forget(name)
            return
        self._number = max(self._number, int(number))
        if role in self._names:  # of the two, the one before
            close_all([self._left.pop(role)])
            self.forget(self._names[role])
        self._names[role] = name
        self._left[role] = fds[0]

    def forget(self, name: str) -> None:
        """Have the keeper close what is stored under a name."""
        with self._unless_gone():
            self._notifier.remove(name)

    @contextlib.contextmanager
    def _unless_gone(self) -> Iterator[None]:
        try:
            yield
        except ResourceError as error:
            if not self._notifier.gone:
                raise
            if self._journal.read(_UNKEPT) is None:
                self._journal.write(_UNKEPT, b"1")
                text = "%s: this process serves on, and none will go on with what it has"
                log.error(text, error, extra={"event": "keeper_deaf", "fields": {}})


class ScopedShelf:
    """A view of a shelf whose roles and sections begin with a name."""

    def __init__(self, shelf: Shelf, prefix: str) -> None:
        self._shelf = shelf
        self._prefix = prefix

    def keep(self, role: str, fd: int) -> None:
        """See Keeping."""
        self._shelf.keep(f"{self._prefix}/{role}", fd)

    def drop(self, role: str) -> None:
        """See Keeping."""
        self._shelf.drop(f"{self._prefix}/{role}")

    def take(self, role: str) -> int | None:
        """See Keeping."""
        return self._shelf.take(f"{self._prefix}/{role}")

    def roles(self) -> list[str]:
        """See Keeping."""
        start = f"{self._prefix}/"
        return [role.removeprefix(start) for role in self._shelf.roles() if role.startswith(start)]

    def write(self, section: str, state: bytes) -> None:
        """See Keeping."""
        self._shelf.write(f"{self._prefix}/{section}", state)

    def read(self, section: str) -> bytes | None:
        """See Keeping."""
        return self._shelf.read(f"{self._prefix}/{section}")

    def area(self, name: str, size: int) -> memoryview:
        """See Keeping."""
        return self._shelf.area(f"{self._prefix}/{name}", size)

    def clear(self) -> None:
        """See Keeping."""
        self._shelf.clear(f"{self._prefix}/")

    def scoped(self, name: str) -> ScopedShelf:
        """See Keeping."""
        return ScopedShelf(self._shelf, f"{self._prefix}/{name}")


def _number(name: str) -> int:
    number = name.rpartition("#")[2]
    return int(number) if number.isdecimal() and len(number) < 20 else 0


def open_shelf(journal_fd: int, notifier: Notifier, left: dict[str, list[int]]) -> Shelf:
    """Return the shelf of a worker, empty if the one before could not have all of its things kept.

    Raises StateError: the journal is damaged, or in use.
    """
    with contextlib.ExitStack() as closing:
        for fds in left.values():
            closing.callback(close_all, fds)
        with contextlib.ExitStack() as stack:
            journal = stack.enter_context(Journal(journal_fd))
            journal.lock()
            is_whole = journal.read(_UNKEPT) is None
            stack.pop_all()
        if is_whole:
            closing.pop_all()
            return Shelf(journal, notifier, left)
    log.error("the keeper did not hear the worker before; its sessions end here")
    journal.clear()
    shelf = Shelf(journal, notifier, {})
    for name in left:
        shelf.forget(name)
    return shelf
