"""A served device and a real Linux kernel (User-Mode Linux) that drives it, in one test."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from vring_serial.chardev.base import Chardev
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.device.controller import Controller
from vring_serial.device.port import Port
from vring_serial.guest.uml import UmlGuest
from vring_serial.transport.vhost_user import VhostUserBackend


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.peer("linux.uml", "busybox", "virtio_console.ko"))


class Bench:
    """A device with socket ports, served over vhost-user, and the guests booted on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

        self.controller = Controller()
        self.backend: VhostUserBackend | None = None
        self.guests: list[UmlGuest] = []

    def socket_path(self, name: str) -> Path:
        return self.directory / f"{name}.sock"

    def socket_chardev(self, name: str) -> SocketChardev:
        return SocketChardev(
            name, SocketOptions(path=str(self.socket_path(name)), server=True, wait=False)
        )

    def add_port(self, nr: int, name: str, chardev: Chardev | None = None, **kind: bool) -> Port:
        port = Port(nr, name, chardev or self.socket_chardev(name), **kind)
        self.controller.add_port(port)
        return port

    async def serve(self, **options: bool) -> None:
        path = str(self.directory / "vring.sock")
        await self.controller.start()
        self.backend = VhostUserBackend(self.controller, path, **options)
        await self.backend.start()

    async def boot(self, memory_mib: int = 128) -> UmlGuest:
        guest = UmlGuest([self.directory / "vring.sock"], memory_mib=memory_mib)
        self.guests.append(guest)
        await guest.start()
        return guest

    async def connect(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self.socket_path(name))

    async def close(self) -> None:
        for guest in self.guests:
            await guest.stop()
        if self.backend is not None:
            await self.backend.stop()
        await self.controller.stop()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    try:
        yield bench
    finally:
        await bench.close()


class Payload:
    """Random bytes in a file that the guest sees as /mnt/NAME, and their checksum."""

    def __init__(self, guest: UmlGuest, size: int, name: str = "payload") -> None:
        self.size = size
        self.data = os.urandom(size)
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        self.guest_path = f"/mnt/{name}"
        (guest.share / name).write_bytes(self.data)


@pytest.fixture
def payload() -> Callable[[UmlGuest, int], Payload]:
    return Payload


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


@pytest.fixture
def digest_of() -> Callable[[asyncio.StreamReader, int], object]:
    return receive_digest


async def wait_for(condition: Callable[[], bool], what: str, timeout: float = 20) -> None:
    """Poll until ``condition`` holds; the assertion names what did not come."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            while not condition():
                await asyncio.sleep(0.01)
    assert condition(), what


@pytest.fixture
def eventually() -> Callable[..., object]:
    return wait_for
