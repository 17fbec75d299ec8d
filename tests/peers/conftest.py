"""Real peers as fixtures; the helpers behind them are the files beside this one."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.peers.vdagent import NEWER_ROOT, VdAgentSession
from vring_serial.chardev.base import Chardev
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.transport.vhost_user.backend import VhostUserBackend


@pytest.fixture(params=["installed", pytest.param("newer", marks=pytest.mark.peer("vdagent-root"))])
async def vdagent(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Any]:
    """An X server that runs, and a real agent ready to be started on a unix socket.

    It is this machine's, 0.22.1 in Debian 12, and then Debian testing's, 0.23.
    """
    root = NEWER_ROOT if request.param == "newer" else None
    async with VdAgentSession(tmp_path, root) as session:
        yield session


class Bench:
    """A device with socket ports, served to guests.

    Args:
        directory: where all sockets are.
        boot: starts a guest on the device at ``path`` and puts it, or whatever has its ``stop()``,
            into ``guests``.
        options: of the Controller.
    """

    def __init__(
        self, directory: Path, boot: Callable[..., Awaitable[Any]], **options: Any
    ) -> None:
        self.directory = directory
        self.path = directory / "vring.sock"
        self.controller = Controller(**options)
        self.server: Any = None
        self.guests: list[Any] = []
        self._boot = boot

    def socket_path(self, name: str) -> Path:
        return self.directory / f"{name}.sock"

    def socket_chardev(self, name: str) -> SocketChardev:
        return SocketChardev(
            name, SocketOptions(path=str(self.socket_path(name)), server=True, wait=False)
        )

    def make_port(self, nr: int, name: str, chardev: Chardev | None = None, **kind: bool) -> Port:
        return Port(nr, name, chardev or self.socket_chardev(name), **kind)

    def add_port(self, nr: int, name: str, chardev: Chardev | None = None, **kind: bool) -> Port:
        port = self.make_port(nr, name, chardev, **kind)
        self.controller.add_port(port)
        return port

    async def serve(self, transport: type = VhostUserBackend, **options: Any) -> None:
        await self.controller.start()
        self.server = transport(self.controller, str(self.path), **options)
        await self.server.start()

    async def boot(self, *args: Any, **options: Any) -> Any:
        return await self._boot(self, *args, **options)

    async def connect(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self.socket_path(name))

    async def aclose(self) -> None:
        for guest in self.guests:
            await guest.aclose()
        if self.server is not None:
            await self.server.aclose()
        await self.controller.aclose()


@pytest.fixture(scope="session")
def bench_type() -> type[Bench]:
    return Bench


async def receive_digest(reader: asyncio.StreamReader, size: int) -> str:
    """SHA-256 of exactly ``size`` bytes from a stream."""
    digest = hashlib.sha256()
    left = size
    while left:
        data = await reader.read(min(left, 1 << 20))
        assert data, f"end of stream with {left} of {size} bytes missing"
        digest.update(data)
        left -= len(data)
    return digest.hexdigest()


@pytest.fixture(scope="session")
def digest_of() -> Callable[[asyncio.StreamReader, int], Awaitable[str]]:
    return receive_digest
