"""A keeper of two workers that echo: run by tests as a process of its own.

Each worker answers every byte on its socket with the number of bytes that it has answered in all
its lives, and dies, or does harm, as it is told.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import sys

from vring_serial.errors import ResourceError
from vring_serial.service.descriptor_store import FDS_MAX
from vring_serial.service.keeper import Keeper
from vring_serial.service.shelf import open_shelf
from vring_serial.service.worker import Inheritance, WorkerSpec


def serve(path: str, inheritance: Inheritance) -> int:
    shelf = open_shelf(inheritance.journal, inheritance.notifier, inheritance.descriptors)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
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
        peer.sendall(struct.pack("<QQ", count, os.getpid()))


if __name__ == "__main__":
    paths = sys.argv[1:]
    keeper = Keeper(
        [WorkerSpec(path, lambda left, path=path: serve(path, left)) for path in paths],
        lambda level, event, text, **fields: print(event, text, file=sys.stderr, flush=True),
    )
    sys.exit(keeper.run())
