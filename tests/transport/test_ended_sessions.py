"""A process that dies while a session ends: its successor finds that it was about to."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.leaks import held
from tests.support.shelves import ShelfKeeper
from tests.support.waiting import until
from vring_serial import unix_fds
from vring_serial.device.console.controller import Controller
from vring_serial.keeping import Keeping
from vring_serial.proto import vfio_user, vhost_user
from vring_serial.proto.vfio_user_dma import DmaFlag, DmaMap
from vring_serial.proto.vfio_user_regions import RegionAccess, RegionIndex, RegionRead
from vring_serial.proto.vfio_user_version import Version
from vring_serial.proto.vfio_user_wire import Command
from vring_serial.service.descriptor_store import Notifier
from vring_serial.service.journal import Journal
from vring_serial.service.shelf import Shelf
from vring_serial.transport.vfio_user.server import VfioUserServer
from vring_serial.transport.vhost_user.backend import VhostUserBackend

SIZE = 1 << 20
INTERRUPT_LINE = 0x3C
#: What a peer sends: bytes, and whether memory goes with them.
SETUP: dict[str, list[tuple[bytes, bool]]] = {
    "vhost-user": [
        (vhost_user.request(vhost_user.Request.SET_OWNER, None), False),
        (
            vhost_user.request(
                vhost_user.Request.SET_MEM_TABLE,
                vhost_user.MemoryTable((vhost_user.MemoryRegion(0, SIZE, 1 << 40),)),
            ),
            True,
        ),
        (vhost_user.request(vhost_user.Request.GET_FEATURES, None), False),
    ],
    "vfio-user": [
        (vfio_user.request(Command.VERSION, 1, Version(0, 0)), False),
        (
            vfio_user.request(Command.DMA_MAP, 2, DmaMap(DmaFlag.READ | DmaFlag.WRITE, 0, 0, SIZE)),
            True,
        ),
        (
            vfio_user.request(
                Command.REGION_WRITE,
                3,
                RegionAccess(INTERRUPT_LINE, RegionIndex.CONFIG, 1, b"\x0b"),
            ),
            False,
        ),
    ],
}
ANSWERS = {"vhost-user": 1, "vfio-user": 3}
#: What no session of the protocol goes on after.
NONSENSE = {"vhost-user": b"\xff" * 64, "vfio-user": b"\xff" * 64}


class DyingShelf(Shelf):
    """A shelf of a process that is dead from some step on: nothing is kept or written then.

    Attributes:
        steps: how many it still does; None: all.
        done: how many it was asked for since that was set.
    """

    def __init__(self, journal: Journal, notifier: Notifier, left: dict[str, list[int]]) -> None:
        super().__init__(journal, notifier, left)
        self.steps: int | None = None
        self.done = 0

    def _lives(self) -> bool:
        if self.steps is None:
            return True
        self.done += 1
        return self.done <= self.steps

    def drop(self, role: str) -> None:
        if self._lives():
            super().drop(role)

    def write(self, section: str, state: bytes) -> None:
        if self._lives():
            super().write(section, state)


@pytest.fixture
def keeper() -> Iterator[ShelfKeeper]:
    before = held()
    keeper = ShelfKeeper()
    yield keeper
    keeper.close()
    assert held() == before


class Process:
    """The server of one process, and what it told of peers."""

    def __init__(self, protocol: str, path: Path, keeping: Keeping) -> None:
        self.told: list[str] = []
        self._controller = Controller(max_ports=1)
        kind = {"vhost-user": VhostUserBackend, "vfio-user": VfioUserServer}[protocol]
        self.server = kind(self._controller, str(path), keeping=keeping)
        self.server.on_peer = self.told.append

    async def __aenter__(self) -> Process:
        await self._controller.start()
        await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.aclose()
        await self._controller.aclose()


async def set_up(protocol: str, sock: socket.socket) -> bytes:
    """Send what sets up a session; return the answer to the last message."""
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    memory = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.ftruncate(memory, SIZE)
    messages = SETUP[protocol]
    answer = b""
    for at, (data, beside) in enumerate(messages):
        unix_fds.send(sock, data, [memory] if beside else [])
        if at >= len(messages) - ANSWERS[protocol]:
            answer = await loop.sock_recv(sock, 4096)
    os.close(memory)
    return answer


@pytest.mark.parametrize("sent_away", [False, True], ids=["left", "sent away"])
@pytest.mark.parametrize("protocol", SETUP)
async def test_whoever_goes_on_after_any_step_of_an_end_warns_of_nothing(
    keeper: ShelfKeeper,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    protocol: str,
    sent_away: bool,
) -> None:
    steps, more = 1, True
    while more:
        path = tmp_path / f"s{steps}"
        shelf = keeper.begin(DyingShelf)
        async with Process(protocol, path, shelf) as first:
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(path))
                await set_up(protocol, peer)
                shelf.steps = steps
                if sent_away:
                    peer.send(NONSENSE[protocol])
                    await until(lambda: first.told[-1:] == ["gone"])
            await until(lambda: first.told == ["connected", "gone"])
        more = shelf.done > steps
        caplog.clear()
        with caplog.at_level(logging.INFO):
            async with Process(protocol, path, keeper.begin()) as second:
                await asyncio.sleep(0)
                assert not second.server.has_peer
                assert second.told == []
        assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []
        keeper.begin()
        left = {name.partition("#")[0] for name in keeper.store.descriptors}
        assert left == {"listener"}, steps
        keeper.shelf.drop("listener")  # type: ignore[union-attr]
        steps += 1
    assert steps > 3


async def test_a_frontend_that_left_while_nobody_served_it_is_gone(
    keeper: ShelfKeeper, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for protocol in SETUP:
        shelf = keeper.begin(DyingShelf)
        path = tmp_path / protocol
        async with Process(protocol, path, shelf):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(path))
                await set_up(protocol, peer)
                shelf.steps = 0
        async with Process(protocol, path, keeper.begin()) as second:
            await until(lambda: second.told == ["resumed", "gone"])
        assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []
        keeper.shelf.drop("listener")  # type: ignore[union-attr]


async def test_the_next_client_of_a_successor_finds_a_function_that_was_reset(
    keeper: ShelfKeeper, tmp_path: Path
) -> None:
    path = tmp_path / "v"
    shelf = keeper.begin()
    async with Process("vfio-user", path, shelf) as first:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(path))
            await set_up("vfio-user", peer)
        await until(lambda: first.told == ["connected", "gone"])
        shelf.drop("listener")  # whose path goes with this process
    async with Process("vfio-user", path, keeper.begin()):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.setblocking(False)
            peer.connect(str(path))
            loop = asyncio.get_running_loop()
            peer.send(SETUP["vfio-user"][0][0])
            await loop.sock_recv(peer, 4096)
            asked = RegionRead(INTERRUPT_LINE, RegionIndex.CONFIG, 1)
            peer.send(vfio_user.request(Command.REGION_READ, 2, asked))
            assert (await loop.sock_recv(peer, 4096))[-1:] == b"\0"
