"""Every kind behind a port of a served device, with a guest that drives it: nothing is played."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import select
import socket
import struct
import termios
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from tests.support.chardev_kinds import (
    COMING_BACK,
    KINDS,
    RECEIVING,
    SENDING,
    SOCKETS,
    WITH_LAST_WORDS,
    FileWithInputKind,
    Peer,
    SocketPeer,
    TcpClientKind,
    TcpServerKind,
)
from tests.support.waiting import DEADLINE, LoopClock, until, until_file_says, until_logged
from vring_serial.chardev.base import DescriptorEnd
from vring_serial.chardev.file import FileChardev, FileOptions
from vring_serial.chardev.hangup import is_leaving, unread
from vring_serial.chardev.log import LogOptions, OutputLog
from vring_serial.chardev.pty import PtyChardev
from vring_serial.chardev.ringbuf import RingbufChardev
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.guest.guest import EmbeddedGuest
from vring_serial.guest.port import GuestPort
from vring_serial.transport.vhost_user.backend import VhostUserBackend

Serve = Callable[..., AbstractAsyncContextManager[EmbeddedGuest]]

DATA = bytes(range(256)) * 1024  # more than one ring of a socket's or terminal's buffer takes


@pytest.fixture
def served(tmp_path: Path) -> Serve:
    """Makes a served device of ports, and a guest that drives it."""

    @asynccontextmanager
    async def serve(*ports: Port) -> AsyncIterator[EmbeddedGuest]:
        controller = Controller(max_ports=3)
        for port in ports:
            controller.add_port(port)
        path = str(tmp_path / "vhost-user")
        backend = VhostUserBackend(controller, path)
        await controller.start()
        await backend.start()
        async with asyncio.timeout(20), EmbeddedGuest(path, queue_size=64) as guest:
            yield guest
        await backend.aclose()
        await controller.aclose()

    return serve


@pytest.fixture
async def guest_port(peer: Peer, served: Serve) -> AsyncIterator[GuestPort]:
    async with served(Port(1, "test", peer.chardev)) as guest:
        yield await guest.wait_port(nr=1, timeout=5)


async def receive(peer: Peer, size: int) -> bytes:
    """What arrives at the peer; those that are memory or files may have it a little later."""
    data = b""

    async def has_all() -> bool:
        nonlocal data
        data += await peer.receive(min(65536, size - len(data)))
        return len(data) == size

    async with asyncio.timeout(DEADLINE):
        await until(has_all)
    return data


@pytest.mark.parametrize("peer", RECEIVING, indirect=True)
async def test_the_guests_output_arrives(peer: Peer, guest_port: GuestPort) -> None:
    await peer.connect()
    _, writer = await guest_port.open()
    await guest_port.wait_host()
    writer.write(DATA)
    assert await receive(peer, len(DATA)) == DATA
    writer.close()


@pytest.mark.parametrize("peer", KINDS, indirect=True)
async def test_the_guests_output_is_logged(peer: Peer, served: Serve, tmp_path: Path) -> None:
    peer.log_to(OutputLog("c", LogOptions(logfile=str(tmp_path / "output"))))
    async with served(Port(1, "test", peer.chardev)) as guest:
        guest_port = await guest.wait_port(nr=1, timeout=5)
        await peer.connect()
        _, writer = await guest_port.open()
        await guest_port.wait_host()
        writer.write(DATA)
        if peer.receives:
            assert await receive(peer, len(DATA)) == DATA
        await until_file_says(tmp_path / "output", DATA)
        writer.close()
    assert (tmp_path / "output").read_bytes() == DATA


@pytest.mark.parametrize("console", [True, False])
async def test_what_nobody_reads_is_logged_when_it_is_taken(
    served: Serve, tmp_path: Path, console: bool
) -> None:
    """A console's output with nobody there; a port's when there is somebody, and then once."""
    path = str(tmp_path / "c")
    chardev = SocketChardev("c", SocketOptions(path=path, server=True, wait=False))
    chardev.log = OutputLog("c", LogOptions(logfile=str(tmp_path / "output")))
    async with served(Port(1, "", chardev, console=console)) as guest:
        guest_port = await guest.wait_port(nr=1, timeout=5)
        _, writer = await guest_port.open()
        writer.write(b"before;")
        if console:
            await until_file_says(tmp_path / "output", "before;")
        reader, host = await asyncio.open_unix_connection(path)
        await guest_port.wait_host()
        # What the device discarded while nobody was there does not come now.
        await until(lambda: chardev.end is not None)
        writer.write(b"after;")
        expected = b"after;" if console else b"before;after;"
        async with asyncio.timeout(DEADLINE):
            assert await reader.readexactly(len(expected)) == expected
        host.close()
        await until_file_says(tmp_path / "output", "before;after;")
        writer.close()
    assert (tmp_path / "output").read_bytes() == b"before;after;"


@pytest.mark.parametrize(
    "peer", [kind for kind in SENDING if kind != "file-with-input"], indirect=True
)
async def test_the_peers_bytes_arrive(peer: Peer, guest_port: GuestPort) -> None:
    await peer.connect()
    reader, writer = await guest_port.open()
    await guest_port.wait_host()
    sending = asyncio.create_task(peer.send(DATA))
    async with asyncio.timeout(DEADLINE):
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
    async with asyncio.timeout(DEADLINE):
        assert await reader.readexactly(len(DATA)) == DATA
        assert await reader.read() == b""
    reader, writer = await guest_port.open()
    await guest_port.wait_host()
    writer.write(b"done")
    assert await receive(peer, 4) == b"done"
    writer.close()


async def test_a_full_disk_holds_up_one_port_alone(
    served: Serve,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures: list[OSError | None] = []

    class FullFile(FileChardev):
        retry_seconds = 0.01

        def peer_gone(self, reason: OSError | None = None) -> None:
            failures.append(reason)
            super().peer_gone(reason)

    full = FullFile("full", FileOptions(path="/dev/full"))
    memory = RingbufChardev("memory")
    async with served(Port(1, "full", full), Port(2, "memory", memory)) as guest:
        _, stuck = await (await guest.wait_port(nr=1, timeout=5)).open()
        stuck.write(DATA)
        _, fine = await (await guest.wait_port(nr=2, timeout=5)).open()
        async with asyncio.timeout(DEADLINE):
            await until_logged(caplog, "No space left on device")
            await until(lambda: len(failures) > 3)
            fine.write(b"and this goes on")
            await until(lambda: memory.read() == b"and this goes on")
        stuck.close()
        fine.close()
    lines = [r for r in caplog.records if r.name.startswith("vring_serial.chardev")]
    assert len(lines) == 1


async def test_a_console_has_the_size_of_its_terminal(
    served: Serve,
) -> None:
    pty = PtyChardev("console")
    async with served(Port(0, "", pty, console=True)) as guest:
        console = await guest.wait_port(nr=0, timeout=5)
        slave = os.open(pty.path, os.O_RDWR | os.O_NOCTTY)
        async with asyncio.timeout(DEADLINE):
            for cols, rows in ((80, 24), (132, 43)):
                size = struct.pack("HHHH", rows, cols, 0, 0)
                fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
                await until(lambda size=(cols, rows): console.size == size)
        os.close(slave)


@pytest.mark.parametrize("peer", COMING_BACK, indirect=True)
async def test_the_guest_sees_the_peer_leave_and_the_next_come(
    peer: Peer, guest_port: GuestPort
) -> None:
    await peer.connect()
    for text in (b"first", b"second"):
        reader, writer = await guest_port.open()
        await guest_port.wait_host()
        await peer.send(text)
        async with asyncio.timeout(DEADLINE):
            assert await reader.readexactly(len(text)) == text
            writer.write(text)
            assert await receive(peer, len(text)) == text
            await peer.disconnect()
            assert await reader.read() == b""
        if text == b"first":
            await peer.connect()
    writer.close()


@pytest.mark.parametrize(
    "peer", [kind for kind in WITH_LAST_WORDS if kind not in SOCKETS], indirect=True
)
async def test_last_words_reach_the_guest(
    peer: Peer, guest_port: GuestPort, clock: LoopClock
) -> None:
    """The peer sends and leaves while the guest has the port closed."""
    await peer.connect()
    await guest_port.wait_host()
    await peer.send(b"last words")
    await peer.disconnect()
    end = peer.chardev.end
    assert isinstance(end, DescriptorEnd)
    await until(lambda: is_leaving(end.read_fd))
    await clock.forward(1.0)  # ptys are looked at by a timer
    reader, writer = await guest_port.open()
    async with asyncio.timeout(DEADLINE):
        assert await reader.readexactly(10) == b"last words"
    writer.close()


@pytest.mark.parametrize("peer", SOCKETS, indirect=True)
async def test_a_guest_reads_nothing_of_who_left_before_it_opened(
    peer: Peer, guest_port: GuestPort
) -> None:
    for _ in range(20):
        await peer.connect()
        await guest_port.wait_host()
        await peer.send(b"request of the dead")
        await peer.disconnect()
    await peer.connect()
    await peer.send(b"request")
    async with asyncio.timeout(DEADLINE):
        await until(lambda: waits(peer) == 7)
        reader, writer = await guest_port.open()
        assert await reader.readexactly(7) == b"request"
    writer.close()


def waits(peer: Peer) -> int:
    """The bytes that the peer has sent, unread."""
    end = peer.chardev.end
    return unread(end.read_fd) if isinstance(end, DescriptorEnd) else 0


def stuck(peer: Peer, sock: socket.socket, sending: asyncio.Task[None]) -> Callable[[], bool]:
    """Return what tells that nothing moves any more: neither the peer nor the pump finds room.

    While the pump finds some, the socket may be full at one look, and empty at the end.
    """
    before, looks = 0, 0

    def nothing_moves() -> bool:
        nonlocal before, looks
        now = waits(peer)
        full = now and (sending.done() or not select.select([], [sock], [], 0)[1])
        looks = looks + 1 if full and now == before else 0
        before = now
        return looks >= 200

    return nothing_moves


@pytest.mark.parametrize("peer", SOCKETS, indirect=True)
async def test_last_words_on_an_open_port_are_read_for_the_stated_seconds(
    peer: SocketPeer,
    guest_port: GuestPort,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A guest that has the port open, reads nothing, and writes to who is not there any more."""
    caplog.set_level(logging.INFO, "vring_serial.chardev.socket")
    monkeypatch.setattr("vring_serial.chardev.hangup.LAST_WORDS_SECONDS", 0.3)
    monkeypatch.setattr("vring_serial.chardev.hangup.RECHECK_SECONDS", 0.05)
    await peer.connect()
    reader, writer = await guest_port.open(limit=1000)
    await guest_port.wait_host()
    sending = asyncio.create_task(peer.send(bytes(4 << 20)))
    sock = peer.sock
    assert sock is not None
    # The ring is full, and the socket, unless it takes all of it.
    await until(stuck(peer, sock, sending))
    sending.cancel()
    await peer.disconnect()
    in_tcp = isinstance(peer, TcpServerKind | TcpClientKind)
    writer.write(b"whoever" if in_tcp else b"for the next")  # TCP takes it, and then says reset
    async with asyncio.timeout(DEADLINE):
        await until_logged(caplog, "not read")
        assert not (await reader.read()).strip(b"\0")  # to the end that the guest was told of
        if in_tcp:
            writer.write(b"for the next")
        await peer.connect()
        assert await receive(peer, 12) == b"for the next"
        reader, writer = await guest_port.open()
        await peer.send(b"alive")
        assert await reader.readexactly(5) == b"alive"
    writer.close()
