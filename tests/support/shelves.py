"""Workers' shelves and their keeper, all of them in this process."""

from __future__ import annotations

import os
import socket
from typing import TypeVar

from tests.support.waiting import wait_until
from vring_serial.service.descriptor_store import DescriptorStore, Notifier
from vring_serial.service.journal import Journal
from vring_serial.service.shelf import Shelf

ShelfT = TypeVar("ShelfT", bound=Shelf)


class ShelfKeeper:
    """The keeper of workers that come one after another.

    Attributes:
        end, worker: its end of the channel, and a worker's.
        store: what they stored.
        journal: what they wrote.
        shelf: of the worker that began last.
    """

    def __init__(self) -> None:
        self.end, self.worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.store = DescriptorStore(100)
        self.journal = Journal.create()
        self.shelf: Shelf | None = None

    def begin(self, kind: type[ShelfT] = Shelf) -> ShelfT:  # type: ignore[assignment]
        """Begin a worker, after all that its predecessor sent was taken; return its shelf."""
        while self.store.receive(self.end) is not None:
            pass
        left = {name: [os.dup(fd) for fd in fds] for name, fds in self.store.descriptors.items()}
        if self.shelf is not None:
            self.shelf.close()
        self.shelf = shelf = kind(Journal(self.journal), Notifier(self.worker), left)
        return shelf

    def forget(self) -> None:
        """Close the worker's shelf, and all that is stored; other processes do that."""
        if self.shelf is not None:
            self.shelf.close()
            self.shelf = None  # a queue may have an area of its journal, which goes with both
        self.store.close()
        self.wait_closed()

    def wait_closed(self) -> None:
        """Wait until what is not stored any more has been closed."""
        wait_until(lambda: not self.store.aside.overdue)

    def close(self) -> None:
        """Close all of it."""
        self.forget()
        self.end.close()
        self.worker.close()
        os.close(self.journal)
