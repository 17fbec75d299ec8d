"""A served console device with socket ports, for guests that are real machines."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

from vring_serial.chardev.base import Chardev
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.transport.vhost_user.backend import VhostUserBackend

MIB = 1 << 20

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Closable(Protocol):
    """What a bench ends."""

    async def aclose(self) -> None: ...


class Server(Closable, Protocol):
    """What serves the device: a backend of vhost-user, a server of vfio-user."""

    async def start(self) -> None: ...


#: What makes one: called with the device, its socket's path, and options.
Transport = Callable[..., Server]


class DeviceBench:
    """A device with socket ports, served to guests; ``async with`` ends all of it.

    Args:
        directory: where all sockets are.
        options: of the Controller.

    Attributes:
        path: where the device is served.
        guests: ended before the device is; whoever starts one on it adds it.
    """

    def __init__(self, directory: Path, **options: Any) -> None:
        self.directory = directory
        self.path = directory / "vring.sock"
        self.controller = Controller(**options)
        self.guests: list[Closable] = []
        self._server: Server | None = None

    def socket_path(self, name: str) -> Path:
        """Where the socket chardev of this name listens."""
        return self.directory / f"{name}.sock"

    def make_port(
        self, nr: int, name: str, chardev: Chardev | None = None, *, console: bool = False
    ) -> Port:
        """A port with a socket of its name as its host end, or with ``chardev``."""
        if chardev is None:
            options = SocketOptions(path=str(self.socket_path(name)), server=True, wait=False)
            chardev = SocketChardev(name, options)
        return Port(nr, name, chardev, console=console)

    def add_port(
        self, nr: int, name: str, chardev: Chardev | None = None, *, console: bool = False
    ) -> Port:
        """Add such a port, before the device is served."""
        port = self.make_port(nr, name, chardev, console=console)
        self.controller.add_port(port)
        return port

    async def serve(self, transport: Transport = VhostUserBackend, **options: Any) -> None:
        """Start the device, and what serves it with these options."""
        await self.controller.start()
        self._server = transport(self.controller, str(self.path), **options)
        await self._server.start()

    async def connect(self, name: str) -> Stream:
        """A stream to the host end of the port of this name."""
        return await asyncio.open_unix_connection(self.socket_path(name))

    async def aclose(self) -> None:
        """End the guests, and then the device."""
        for guest in self.guests:
            await guest.aclose()
        if self._server is not None:
            await self._server.aclose()
        await self.controller.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def receive_digest(reader: asyncio.StreamReader, size: int) -> str:
    """SHA-256 of exactly ``size`` bytes from a stream."""
    digest = hashlib.sha256()
    left = size
    while left:
        data = await reader.read(min(left, MIB))
        assert data, f"end of stream with {left} of {size} bytes missing"
        digest.update(data)
        left -= len(data)
    return digest.hexdigest()


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close a stream and wait until it is."""
    writer.close()
    await writer.wait_closed()
