"""Every kind behind a port of a served device, with a guest that drives it: nothing is played."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.chardev.conftest import (
    COMING_BACK,
    RECEIVING,
    SENDING,
    WITH_LAST_WORDS,
    FileWithInputKind,
    Peer,
)
from vring_serial.device.controller import Controller
from vring_serial.device.port import Port
from vring_serial.guest.guest import EmbeddedGuest
from vring_serial.guest.port import GuestPort
from vring_serial.transport.vhost_user import VhostUserBackend

DATA = bytes(range(256)) * 1024  # more than one ring of a socket's or terminal's buffer takes


@pytest.fixture
async def guest_port(peer: Peer, tmp_path: Path) -> AsyncIterator[GuestPort]:
    controller = Controller(max_ports=2)
    controller.add_port(Port(1, "test", peer.chardev))
    backend = VhostUserBackend(controller, str(tmp_path / "vhost-user"))
    await controller.start()
    await backend.start()
    async with (
        asyncio.timeout(20),
        EmbeddedGuest(str(tmp_path / "vhost-user"), queue_size=64) as guest,
    ):
        yield await guest.wait_port(nr=1, timeout=5)
    await backend.stop()
    await controller.stop()


async def receive(peer: Peer, size: int) -> bytes:
    """What arrives at the peer; those that are memory or files may have it a little later."""
    data = b""
    async with asyncio.timeout(10):
        while len(data) < size:
            more = await peer.receive(min(65536, size - len(data)))
            if not more:
                await asyncio.sleep(0.01)
            data += more
    return data


@pytest.mark.parametrize("peer", RECEIVING, indirect=True)
async def test_the_guests_output_arrives(peer: Peer, guest_port: GuestPort) -> None:
    await peer.connect()
    _, writer = await guest_port.open()
    await guest_port.wait_host()
    writer.write(DATA)
    assert await receive(peer, len(DATA)) == DATA
    writer.close()


@pytest.mark.parametrize(
    "peer", [kind for kind in SENDING if kind != "file-with-input"], indirect=True
)
async def test_the_peers_bytes_arrive(peer: Peer, guest_port: GuestPort) -> None:
    await peer.connect()
    reader, writer = await guest_port.open()
    await guest_port.wait_host()
    sending = asyncio.create_task(peer.send(DATA))
    async with asyncio.timeout(10):
        assert await reader.readexactly(len(DATA)) == DATA
    await sending
    writer.close()


@pytest.mark.parametrize("peer", ["null"], indirect=True)
async def test_null_takes_everything(peer: Peer, guest_port: GuestPort) -> None:
    _, writer = await guest_port.open()
    await guest_port.wait_host()
    for _ in range(16):
        writer.write(DATA)
        await writer.drain()
    writer.close()


@pytest.mark.parametrize("peer", ["file-with-input"], indirect=True)
async def test_the_whole_input_file_arrives_and_the_output_goes_on(
    peer: FileWithInputKind, guest_port: GuestPort
) -> None:
    peer.input.write_bytes(DATA)
    reader, writer = await guest_port.open()
    async with asyncio.timeout(10):
        assert await reader.readexactly(len(DATA)) == DATA
        assert await reader.read() == b""
    reader, writer = await guest_port.open()
    await guest_port.wait_host()
    writer.write(b"done")
    assert await receive(peer, 4) == b"done"
    writer.close()


@pytest.mark.parametrize("peer", COMING_BACK, indirect=True)
async def test_the_guest_sees_the_peer_leave_and_the_next_come(
    peer: Peer, guest_port: GuestPort
) -> None:
    await peer.connect()
    for text in (b"first", b"second"):
        reader, writer = await guest_port.open()
        await guest_port.wait_host()
        await peer.send(text)
        async with asyncio.timeout(10):
            assert await reader.readexactly(len(text)) == text
            writer.write(text)
            assert await receive(peer, len(text)) == text
            await peer.disconnect()
            assert await reader.read() == b""
        if text == b"first":
            await peer.connect()
    writer.close()


@pytest.mark.parametrize("peer", WITH_LAST_WORDS, indirect=True)
async def test_last_words_reach_the_guest(peer: Peer, guest_port: GuestPort) -> None:
    """The peer sends and leaves while the guest has the port closed."""
    await peer.connect()
    await guest_port.wait_host()
    await peer.send(b"last words")
    await peer.disconnect()
    await asyncio.sleep(0.05)
    reader, writer = await guest_port.open()
    async with asyncio.timeout(10):
        assert await reader.readexactly(10) == b"last words"
    writer.close()
