"""What workers left is forged, part by part: a process of its own for a test.

Workers leave sessions in the middle of their lives. Then each value in each section that they wrote
is exchanged for others, or taken away, with a right checksum, and whoever goes on with that serves
the frontend, or ends its session with the reason in the log; nothing raises, and the next one is
served. Prints how many forgeries were tried.

Usage: forged_states.py vhost-user|vfio-user [FIRST OF]: only each OF-th forgery, from that one on
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.support.dying_guest import make_controller
from tests.support.shelves import ShelfKeeper
from tests.support.waiting import until
from tests.transport.vfio_user.dying_client import VECTORS, Life
from tests.transport.vhost_user import dying_session
from vring_serial.device.console.state import CONSOLE
from vring_serial.proto import vfio_user, vhost_user
from vring_serial.proto.vfio_user_features import MigrationState
from vring_serial.proto.vfio_user_version import Capabilities, Version
from vring_serial.proto.vfio_user_wire import Command
from vring_serial.proto.vhost_user import Request
from vring_serial.saving import MAGIC
from vring_serial.service.journal import Journal
from vring_serial.transport.vfio_user.server import VfioUserServer
from vring_serial.transport.vhost_user.backend import VhostUserBackend

#: A journal's bytes, and descriptors by role.
Left = tuple[bytes, dict[str, int]]

#: What stands in place of a value.
OTHERS: list[Any] = [0, 1, -1, 3, 255, 1 << 15, 0xFFFF, 1 << 16, 1 << 32, 1 << 63, (1 << 64) - 1]
OTHERS += [1 << 64, 1 << 80, 0.5, None, True, False, "", "1", "xyz", [], {}, [1], {"1": 1}]
#: First words, whose answer shows that one is served.
HELLO = {
    "vhost-user": vhost_user.request(Request.GET_FEATURES),
    "vfio-user": vfio_user.request(Command.VERSION, 1, Version(0, 0, Capabilities())),
}


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there are values in what JSON gave."""
    if path:
        yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from paths(item, (*path, key))


def forgeries(saved: bytes) -> Iterator[tuple[str, bytes]]:
    """What a saved state may be made of, and what was changed."""
    yield "half of it", saved[: len(saved) // 2]
    yield "nonsense", b"nonsense"
    text = saved[20:]
    for path in list(paths(json.loads(text)["state"])):
        for other in [*OTHERS, ...]:
            body = json.loads(text)
            holder = body["state"]
            for key in path[:-1]:
                holder = holder[key]
            if other is ...:
                del holder[path[-1]]
            else:
                holder[path[-1]] = other
            new = json.dumps(body).encode()
            yield (
                f"{path} {other}",
                saved[:12] + struct.pack("<II", len(new), zlib.crc32(new)) + new,
            )


def left_by_frontends(directory: Path) -> Iterator[Left]:
    """A frontend that runs a ring and migrates, and one that has stopped to save the device."""
    cases = dying_session.CASES
    for name in ("SET_FEATURES with F_LOG_ALL", "SET_DEVICE_STATE_FD save", "GET_INFLIGHT_FD"):
        with closing(dying_session.World(directory)) as world:
            before, said = cases[name]
            for each in (*before, *said):
                world.say([each])
            yield world.copy()


def left_by_clients(directory: Path) -> Iterator[Left]:
    """A client whose driver runs, and one that brings a state."""
    for migrates in (False, True):
        with closing(Life(directory, packed=migrates, die=0)) as life:
            life.begin()
            if migrates:
                life.go_to(MigrationState.RESUMING)
                life.bring(b"a part of a state")
            yield life.world.copy()


class Trial:
    """One service after another, in this process, that goes on from what was left.

    Args:
        protocol: of the frontend.
        left: the journal, and what was kept.
        directory: for sockets and files.
    """

    def __init__(self, protocol: str, left: Left, directory: Path) -> None:
        self._protocol = protocol
        self._journal, self._fds = left
        self._directory = directory
        self.raised: list[str] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: self.raised.append(str(context))
        )

    def sections(self) -> dict[str, bytes]:
        """What was written down of the session in saved states, by section."""
        keeper = self._keeper()
        shelf = keeper.begin()
        names = Journal(keeper.journal, read_only=True).sections
        found = {name: shelf.read(name) or b"" for name in names}
        keeper.close()
        del found[CONSOLE.kind]
        return {name: saved for name, saved in found.items() if saved.startswith(MAGIC)}

    async def run(self, section: str, forged: bytes) -> None:
        """Have it gone on with, and another frontend served."""
        keeper = self._keeper()
        before = keeper.begin()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        for role, fd in self._fds.items():
            if role not in ("peer", "listener"):
                before.keep(role, fd)
        before.keep("peer", theirs.fileno())
        theirs.close()
        before.write(section, forged)
        path = self._directory / "s"
        happened: list[str] = []
        shelf = keeper.begin()
        controller = make_controller(self._directory / "f", shelf)
        server: VhostUserBackend | VfioUserServer
        if self._protocol == "vhost-user":
            server = VhostUserBackend(controller, str(path), packed=True, keeping=shelf)
        else:
            server = VfioUserServer(
                controller, str(path), packed=True, vectors=VECTORS, keeping=shelf
            )
        server.on_peer = happened.append
        async with controller, server:
            loop = asyncio.get_running_loop()
            assert happened == ["resumed"]
            for _ in range(3):
                await asyncio.sleep(0)
            ours.close()  # if it is served, it leaves
            await until(lambda: "gone" in happened, lambda: f"{happened}")
            with socket.socket(socket.AF_UNIX) as sock:
                sock.setblocking(False)
                await loop.sock_connect(sock, str(path))
                await loop.sock_sendall(sock, HELLO[self._protocol])
                assert await asyncio.wait_for(loop.sock_recv(sock, 16), 10)
            await until(lambda: happened.count("gone") == 2, lambda: f"{happened}")
        keeper.close()
        assert not self.raised, self.raised

    def _keeper(self) -> ShelfKeeper:
        keeper = ShelfKeeper()
        os.pwrite(keeper.journal, self._journal, 0)
        return keeper


class Raised(logging.Handler):
    """Collects what was logged with an exception."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.texts.append(logging.Formatter().format(record))


async def forge(protocol: str, left: Left, directory: Path, first: int, of: int) -> int:
    """Try all forgeries of what one worker left; return how many."""
    trial = Trial(protocol, left, directory)
    raised = Raised()
    logging.getLogger().addHandler(raised)
    logging.getLogger().setLevel(logging.WARNING)
    number = tried = 0
    for section, saved in trial.sections().items():
        for what, forged in forgeries(saved):
            number += 1
            if number % of != first % of:
                continue
            tried += 1
            try:
                await trial.run(section, forged)
                assert not raised.texts, raised.texts[0]
            except Exception as error:
                raise AssertionError(f"{section}: {what}: {error!r}") from error
    return tried


def main(protocol: str, first: str = "0", of: str = "1") -> None:
    tried = 0
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        found = left_by_frontends if protocol == "vhost-user" else left_by_clients
        for left in list(found(directory)):
            tried += asyncio.run(forge(protocol, left, directory, int(first), int(of)))
    print(tried)


if __name__ == "__main__":
    main(*sys.argv[1:])
