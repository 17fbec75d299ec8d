"""A worker's things, kept by the service manager itself (systemd's FileDescriptorStoreMax=).

systemd keeps one open file once: what is stored again, under whatever name, it ignores, and a name
that is removed takes the file with it. A worker has one file in several roles, and one that gets a
new name before the old one is removed. So names beside the first are written into the journal.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping, Sequence

from vring._files import same_file
from vring_serial.errors import StateError
from vring_serial.service.descriptor_store import Notifier
from vring_serial.service.journal import Journal
from vring_serial.service.shelf import Shelf
from vring_serial.unix_fds import close_all

#: Name of the journal in the store.
JOURNAL = "journal"
#: Section of the journal with the names.
_NAMES = "names"


def is_stored(name: str) -> bool:
    """Return whether a descriptor of this name was stored by a worker, and is no socket unit's."""
    return name == JOURNAL or "#" in name


class ManagerStore(Notifier):
    """A Notifier for a manager that keeps each open file once.

    Args:
        sock: to the manager; taken over.
        journal: has the names.
        stored: what the manager gave, by name; taken over.
    """

    def __init__(
        self, sock: socket.socket, journal: Journal, stored: Mapping[str, Sequence[int]]
    ) -> None:
        super().__init__(sock)
        self._journal = journal
        # By the name in the store: a duplicate to compare with, and the names that it stands for.
        self._files: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}
        names = _read_names(journal)
        for name, fds in stored.items():
            self._files[name] = fds[-1]
            self._names[name] = names.get(name, [name])
            close_all(fds[:-1])

    @property
    def left(self) -> dict[str, list[int]]:
        """Return duplicates of what predecessors stored, by name: the caller's."""
        return {
            name: [os.dup(self._files[stored])]
            for stored, names in self._names.items()
            for name in names
        }

    def store(self, name: str, fd: int) -> None:
        """See Notifier."""
        for stored, file in self._files.items():
            if same_file(file, fd):
                self._names[stored].append(name)
                self._write_names()
                return
        super().store(name, fd)
        self._files[name] = os.dup(fd)
        self._names[name] = [name]

    def remove(self, name: str) -> None:
        """See Notifier."""
        stored = next((s for s, names in self._names.items() if name in names), None)
        if stored is None:
            super().remove(name)
            return
        names = self._names[stored]
        names.remove(name)
        if not names:
            super().remove(stored)
            del self._names[stored]
            os.close(self._files.pop(stored))
        self._write_names()

    def close(self) -> None:
        """See Notifier."""
        close_all(self._files.values())
        self._files.clear()
        super().close()

    def _write_names(self) -> None:
        told = {stored: names for stored, names in self._names.items() if names != [stored]}
        self._journal.write(_NAMES, json.dumps(told).encode())


def _read_names(journal: Journal) -> dict[str, list[str]]:
    """Return the names that files in the store have. Raises StateError."""
    try:
        found = json.loads(journal.read(_NAMES) or b"{}")
        return {
            str(stored): [name for name in names if isinstance(name, str)]
            for stored, names in found.items()
        }
    except (ValueError, AttributeError, TypeError):
        raise StateError("journal: the names of descriptors are damaged") from None


def open_manager_shelf(
    sock: socket.socket, stored: Mapping[str, Sequence[int]]
) -> tuple[Shelf, ManagerStore]:
    """Return the shelf of a worker that the service manager keeps, and the way to the manager.

    Args:
        sock: to the manager; taken over.
        stored: what the manager gave, by name; taken over. Without a journal, it is dropped.

    Raises StateError: the journal is damaged, or in use.
    """
    rest = {name: fds for name, fds in stored.items() if name != JOURNAL}
    with contextlib.ExitStack() as stack:
        stack.callback(close_all, [fd for fds in rest.values() for fd in fds])
        stack.callback(sock.close)
        if kept := list(stored.get(JOURNAL, ())):
            fd = kept.pop()
            close_all(kept)
        else:
            fd = Journal.create()
        stack.callback(os.close, fd)
        journal = Journal(fd)
        journal.lock()
        stack.pop_all()
    store = ManagerStore(sock, journal, rest)
    if JOURNAL not in stored:
        Notifier.store(store, JOURNAL, fd)
    return Shelf(journal, store, store.left), store
