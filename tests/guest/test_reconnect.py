"""A guest whose backend goes away, and the next one that it reaches on the same socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.waiting import until
from vring_serial import EmbeddedGuest
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.guest.errors import BackendRefusedError
from vring_serial.transport.vhost_user.backend import VhostUserBackend

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@asynccontextmanager
async def backend(
    directory: Path, *, packed: bool, ports: int = 2, max_ports: int = 4
) -> AsyncIterator[Controller]:
    """A device that knows nothing of another one before it."""
    controller = Controller(max_ports=max_ports)
    for nr in range(1, ports + 1):
        options = SocketOptions(path=str(directory / f"c{nr}"), server=True, wait=False)
        controller.add_port(Port(nr, f"p{nr}", SocketChardev(f"c{nr}", options)))
    async with controller, VhostUserBackend(controller, str(directory / "v"), packed=packed):
        yield controller


async def connect(directory: Path, nr: int) -> Streams:
    return await asyncio.open_unix_connection(str(directory / f"c{nr}"))


async def exchange(one: Streams, other: Streams, text: bytes) -> None:
    """Bytes both ways."""
    for (_, writer), (reader, _) in ((one, other), (other, one)):
        writer.write(text)
        assert await reader.readexactly(len(text)) == text


@LAYOUTS
async def test_bytes_move_again_through_the_next_backend(tmp_path: Path, packed: bool) -> None:
    guest = EmbeddedGuest(str(tmp_path / "v"), reconnect=True, packed=packed)
    try:
        async with backend(tmp_path, packed=packed):
            await guest.start()
            port, other = [await guest.wait_port(nr=nr) for nr in (1, 2)]
            used, idle = await port.open(), await other.open()
            host = await connect(tmp_path, 1)
            await exchange(host, used, b"before")
        host[1].close()
        for text in (b"first", b"again"):
            async with backend(tmp_path, packed=packed):
                # The device has not heard from the driver, and the driver hears of the host's end.
                assert await used[0].read() == b""
                used = await port.open()
                host = await connect(tmp_path, 1)
                await exchange(host, used, text * 50_000)
                # Until now no byte has moved through this port.
                idle_host = await connect(tmp_path, 2)
                await exchange(idle_host, idle, text)
            for _, writer in (host, idle_host):
                writer.close()
            if text == b"first":
                async with backend(tmp_path, packed=packed):
                    assert await idle[0].read() == b""
                    idle = await other.open()
        assert guest.lost is None
    finally:
        await guest.aclose()


@LAYOUTS
async def test_a_port_that_only_the_next_backend_has(tmp_path: Path, packed: bool) -> None:
    guest = EmbeddedGuest(str(tmp_path / "v"), reconnect=True, packed=packed)
    try:
        async with backend(tmp_path, packed=packed, ports=1):
            await guest.start()
            await guest.wait_port(nr=1)
        async with backend(tmp_path, packed=packed, ports=2):
            port = await guest.wait_port(nr=2)
            host = await connect(tmp_path, 2)
            streams = await port.open()
            await exchange(host, streams, b"text")
            host[1].close()
            streams[1].close()
    finally:
        await guest.aclose()


async def test_the_guest_hears_that_the_host_has_left_meanwhile(tmp_path: Path) -> None:
    guest = EmbeddedGuest(str(tmp_path / "v"), reconnect=True)
    try:
        async with backend(tmp_path, packed=False):
            await guest.start()
            port = await guest.wait_port(nr=1)
            _, writer = await connect(tmp_path, 1)
            await until(lambda: port.host_connected)
            writer.close()
        async with backend(tmp_path, packed=False):
            await until(lambda: not port.host_connected)
    finally:
        await guest.aclose()


async def test_a_backend_that_offers_less_ends_the_guest(tmp_path: Path) -> None:
    guest = EmbeddedGuest(str(tmp_path / "v"), reconnect=True)
    try:
        async with backend(tmp_path, packed=True):
            await guest.start()
        async with backend(tmp_path, packed=False):
            assert isinstance(await guest.wait_lost(), BackendRefusedError)
    finally:
        await guest.aclose()
