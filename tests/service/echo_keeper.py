"""A keeper of two workers that echo: run by tests as a process of its own.

Each worker answers every byte on its socket with the number of bytes that it has answered in all
its lives, its process id and ten times its version, and dies, or does harm, as it is told.

A file ``version`` beside the sockets has the version of this code, and the names of workers that
die at once in it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import sys
from pathlib import Path

from vring_serial.errors import ResourceError
from vring_serial.service.candidate import Candidate
from vring_serial.service.descriptor_store import FDS_MAX
from vring_serial.service.journal import Journal
from vring_serial.service.keeper import Keeper
from vring_serial.service.shelf import Shelf, open_shelf
from vring_serial.service.succession import KeeperState, arrive
from vring_serial.service.upgrade import Upgrading
from vring_serial.service.worker import Inheritance, WorkerSpec


def serve(path: str, inheritance: Inheritance) -> int:
    shelf = open_shelf(inheritance.journal, inheritance.notifier, inheritance.descriptors)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGUSR2, lambda *_: hand_over(shelf))
    fd = shelf.take("listener")
    if fd is None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        shelf.keep("listener", listener.fileno())
    else:
        listener = socket.socket(fileno=fd)
    fd = shelf.take("peer")
    peer = None if fd is None else socket.socket(fileno=fd)
    shelf.drop_untaken()
    if os.path.basename(path) in DYING:
        os.kill(os.getpid(), signal.SIGKILL)
    inheritance.notifier.notify("READY=1")
    if os.environ.get("VRING_TEST_DIE_AT_ONCE") == path:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        if peer is None:
            peer, _ = listener.accept()
            shelf.keep("peer", peer.fileno())
        said = peer.recv(1)
        if not said:
            shelf.drop("peer")
            peer.close()
            peer = None
            continue
        if said == b"s":
            os.kill(os.getpid(), signal.SIGSEGV)
        if said == b"x":
            os._exit(3)
        if said == b"l":
            while True:
                pass
        if said == b"f":  # with the next byte comes what nobody can close
            _, hostile, _, _ = socket.recv_fds(peer, 1, 1)
            inheritance.notifier.store("hostile#1", hostile[0])
        if said == b"F":
            many = [peer.fileno()] * FDS_MAX
            while True:
                with contextlib.suppress(ResourceError):
                    inheritance.notifier.notify("FDSTORE=1", "FDNAME=a#1", fds=many)
        state = shelf.read("count")
        count = 1 + (struct.unpack("<Q", state)[0] if state else 0)
        shelf.write("count", struct.pack("<Q", count))
        peer.sendall(struct.pack("<QQQ", count, os.getpid(), round(10 * float(VERSION))))


def hand_over(shelf: Shelf) -> None:
    shelf.stopped()
    os._exit(0)


def check(journal: int) -> None:
    Journal(journal, read_only=True).close()


if __name__ == "__main__":
    paths = sys.argv[1:]
    VERSION, *DYING = Path(paths[0]).with_name("version").read_text().split()
    specs = [WorkerSpec(path, lambda left, path=path: serve(path, left)) for path in paths]
    arrival = arrive()
    if arrival is not None and arrival.is_candidate:
        sys.exit(Candidate(arrival, specs, check, version=VERSION, formats=VERSION[:1]).run())
    keeper = Keeper(
        specs,
        lambda level, event, text, **fields: print(event, text, file=sys.stderr, flush=True),
        upgrading=Upgrading(VERSION, VERSION[:1], lambda: KeeperState(VERSION)),
        before=None if arrival is None else arrival.state,
    )
    sys.exit(keeper.run())
