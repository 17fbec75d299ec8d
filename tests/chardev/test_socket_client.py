"""Socket clients: connecting, connecting again, and stopping meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import socket
from pathlib import Path

import pytest

from tests.support.chardev_kinds import Guest
from tests.support.descriptors import read_exactly
from tests.support.sockets import refused
from tests.support.waiting import DEADLINE, LoopClock, turns, until
from vring_serial.chardev import endpoint
from vring_serial.chardev.endpoint import Address
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.errors import ResourceError

pytestmark = pytest.mark.usefixtures("no_leak")


async def test_a_client_that_does_not_connect_again_must_connect_now(tmp_path: Path) -> None:
    path = tmp_path / "s"
    await refused(SocketChardev("dut", SocketOptions(path=str(path))), str(path), "No such file")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        client = SocketChardev("dut", SocketOptions(host="127.0.0.1", port=port))
        await refused(client, f"connect to tcp:127.0.0.1:{port}", "Connection refused")


async def test_a_client_that_does_not_connect_again_stays_away(
    tmp_path: Path, clock: LoopClock
) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        chardev = SocketChardev("dut", SocketOptions(path=str(tmp_path / "s")))
        guest = Guest(chardev)
        await chardev.start()
        assert guest.events == ["opened"]
        server.accept()[0].close()
        await guest.closed()
        server.setblocking(False)
        await clock.forward(3600)
        with pytest.raises(BlockingIOError):
            server.accept()
        await chardev.aclose()


async def test_a_client_follows_its_server_through_restarts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = count_attempts(monkeypatch)
    path = tmp_path / "s"
    chardev = SocketChardev("dut", SocketOptions(path=str(path), reconnect_ms=10))
    guest = Guest(chardev)
    await chardev.start()
    await until(lambda: len(attempts) > 3)
    assert len(caplog.records) == 1, "one line, not one for every attempt"
    assert re.search(r"dut.*No such file.*every 0.01 s", caplog.text)
    for turn in range(1, 4):
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen()
            server.setblocking(False)
            async with asyncio.timeout(DEADLINE):
                sock, _ = await asyncio.get_running_loop().sock_accept(server)
            await until(lambda turn=turn: guest.events.count("opened") == turn)
            await guest.write(b"hello")
            assert await read_exactly(sock.fileno(), 5) == b"hello"
        path.unlink()
        sock.close()
        await guest.closed()
    await chardev.aclose()


def count_attempts(monkeypatch: pytest.MonkeyPatch) -> list[Address]:
    """Return a list that gets each address that a client connects to, again and again."""
    attempts: list[Address] = []

    async def connect(address: Address) -> socket.socket:
        attempts.append(address)
        return await endpoint.connect(address)

    monkeypatch.setattr("vring_serial.chardev.socket.connect", connect)
    return attempts


async def test_connecting_waits_for_a_place_in_a_full_backlog(
    tmp_path: Path, clock: LoopClock
) -> None:
    path = str(tmp_path / "s")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(path)
        server.listen(0)
        server.setblocking(False)
        while True:
            other = stack.enter_context(socket.socket(socket.AF_UNIX))
            other.setblocking(False)
            if other.connect_ex(path) == errno.EAGAIN:
                break
        chardev = SocketChardev("dut", SocketOptions(path=path))
        guest = Guest(chardev)
        starting = asyncio.create_task(chardev.start())
        for _ in range(3):  # attempts
            await clock.forward(endpoint.RETRY_SECONDS)
        assert not starting.done()
        assert guest.events == []
        stack.enter_context(server.accept()[0])
        async with asyncio.timeout(DEADLINE):
            await starting
        assert guest.events == ["opened"]
        await chardev.aclose()


async def test_stop_while_connecting(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as other:
        server.bind(path)
        server.listen(0)
        other.connect(path)
        for options in (SocketOptions(path=path), SocketOptions(path=path, reconnect=1)):
            chardev = SocketChardev("dut", options)
            starting = asyncio.create_task(chardev.start())
            await turns()
            await chardev.aclose()
            if options.reconnect:
                await starting
            else:
                with pytest.raises(ResourceError, match="stopped meanwhile"):
                    await starting


async def test_a_client_does_not_take_itself_for_its_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In TCP, connecting to a free port of one's own machine from that very port succeeds."""
    loop = asyncio.get_running_loop()
    connect = loop.sock_connect

    async def connect_from_there(sock: socket.socket, where: tuple[str, int]) -> None:
        sock.bind(where)  # what the system does by chance
        await connect(sock, where)

    monkeypatch.setattr(loop, "sock_connect", connect_from_there)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    client = SocketChardev("dut", SocketOptions(host="127.0.0.1", port=port))
    await refused(client, "Connection refused")
