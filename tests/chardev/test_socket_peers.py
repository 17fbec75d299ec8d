"""Sockets whose peers have left: they hold no port, whatever the guest does."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.chardev_kinds import Guest
from tests.support.sockets import tcp_server, unix_client, unix_server
from tests.support.waiting import DEADLINE, LoopClock, turns, until
from vring_serial.chardev.hangup import LAST_WORDS_SECONDS, RECHECK_SECONDS, is_leaving, unread
from vring_serial.chardev.socket import MOST_WAITING, SocketChardev, SocketOptions

pytestmark = pytest.mark.usefixtures("no_leak")

Dial = Callable[[], Awaitable[socket.socket]]


@pytest.fixture(params=["unix", "tcp"])
async def dialled(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[tuple[SocketChardev, Dial]]:
    """A started server, and what connects to it."""
    chardev = unix_server(tmp_path / "s") if request.param == "unix" else tcp_server()
    loop = asyncio.get_running_loop()

    async def dial() -> socket.socket:
        await turns(1)  # connecting to a unix socket never waits: others would have no turn
        if request.param == "unix":
            return await unix_client(tmp_path / "s")
        sock = socket.socket()
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", chardev.port))
        return sock

    yield chardev, dial
    await chardev.aclose()


async def test_400_clients_that_call_and_leave_while_the_guest_has_the_port_closed(
    dialled: tuple[SocketChardev, Dial], caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is kept out, and the guest reads nothing but what the living one says."""
    caplog.set_level(logging.INFO, "vring_serial.chardev.socket")
    chardev, dial = dialled
    guest = Guest(chardev)
    chardev.guest_opened(False)
    await chardev.start()
    async with asyncio.timeout(60):
        for _ in range(400):
            with await dial() as sock:
                sock.send(b"request of the dead")
    assert "; 19 bytes that it had sent were not read" in caplog.text
    with await dial() as sock:
        sock.send(b"alive")
        await until(lambda: guest.end is not None and waits(guest) == 5)
        chardev.guest_opened(True)
        assert await guest.read(5) == b"alive"


def waits(guest: Guest) -> int:
    """The bytes that its peer has sent, unread."""
    return unread(guest.read_fd)


async def test_clients_that_call_and_leave_while_another_is_served(
    dialled: tuple[SocketChardev, Dial],
) -> None:
    chardev, dial = dialled
    guest = Guest(chardev)
    chardev.guest_opened(False)
    await chardev.start()
    with await dial():
        await guest.opened()
        async with asyncio.timeout(60):
            for _ in range(400):
                with await dial() as sock:
                    sock.send(b"hello?")
        last = await dial()
        last.send(b"alive")
        assert guest.events == ["opened"]
    with last:
        await until(lambda: guest.end is not None and waits(guest) == 5)


async def test_what_a_client_left_keeps_the_next_for_the_stated_seconds_only(
    dialled: tuple[SocketChardev, Dial], clock: LoopClock
) -> None:
    """Of a guest that has the port open and does not read; the seconds of all run at once."""
    chardev, dial = dialled
    guest = Guest(chardev)
    await chardev.start()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for _ in range(10):
        with await dial() as sock:
            sock.send(b"hello?")
    with await dial() as sock:
        sock.send(b"alive")
        while guest.end is None or waits(guest) != 5:
            assert loop.time() - begun < 4 * LAST_WORDS_SECONDS, "one after another"
            await clock.forward(RECHECK_SECONDS)
        assert loop.time() - begun >= LAST_WORDS_SECONDS


async def test_a_guest_that_closes_the_port_lets_go_of_who_left(
    dialled: tuple[SocketChardev, Dial],
) -> None:
    chardev, dial = dialled
    guest = Guest(chardev)
    await chardev.start()
    for _ in range(3):
        with await dial() as sock:
            sock.send(b"hello?")
    with await dial() as sock:
        sock.send(b"alive")
        await until(lambda: guest.end is not None and waits(guest) == 6)
        chardev.guest_opened(False)
        await until(lambda: guest.end is not None and waits(guest) == 5)


async def test_who_shut_down_its_sending_side_is_there_yet(
    dialled: tuple[SocketChardev, Dial], clock: LoopClock
) -> None:
    """Its request waits for the guest, with the port closed as well."""
    chardev, dial = dialled
    guest = Guest(chardev)
    chardev.guest_opened(False)
    await chardev.start()
    with await dial() as sock:
        sock.send(b"request")
        sock.shutdown(socket.SHUT_WR)
        await guest.opened()
        await until(lambda: is_leaving(guest.read_fd))
        await clock.forward(LAST_WORDS_SECONDS)
        assert guest.events == ["opened"]
        chardev.guest_opened(True)
        await clock.forward(LAST_WORDS_SECONDS)
        assert await guest.read(7) == b"request"
        await guest.write(b"answer")
        loop = asyncio.get_running_loop()
        assert await loop.sock_recv(sock, 6) == b"answer"


async def test_who_shut_down_its_receiving_side_may_go_on_sending(tmp_path: Path) -> None:
    chardev = unix_server(tmp_path / "s")
    guest = Guest(chardev)
    await chardev.start()
    with await unix_client(tmp_path / "s") as sock:
        await guest.opened()
        sock.shutdown(socket.SHUT_RD)
        chardev.peer_gone(BrokenPipeError(errno.EPIPE, "Broken pipe"))
        sock.send(b"and on")
        assert await guest.read(6) == b"and on"
        assert guest.events == ["opened"]
    await guest.closed()
    await chardev.aclose()


async def test_more_clients_than_may_wait_are_all_served(tmp_path: Path) -> None:
    chardev = unix_server(tmp_path / "s")
    guest = Guest(chardev)
    await chardev.start()
    count = MOST_WAITING + 4  # and some in the backlog
    clients = []
    for _ in range(count):
        clients.append(await unix_client(tmp_path / "s"))
        await turns(1)
    for number, sock in enumerate(clients):
        sock.send(bytes([number]) * 3)
        assert await guest.read(3) == bytes([number]) * 3
        sock.close()
        turn = number + 1
        await until(lambda turn=turn: guest.events.count("opened") == min(turn + 1, count))
    await guest.closed()
    await chardev.aclose()


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
async def test_a_listener_that_greets_and_starts_again_is_dialled_again(
    tmp_path: Path, family: socket.AddressFamily
) -> None:
    """Also while the guest has the port closed, so that nobody reads the greeting."""
    with socket.socket(family) as server:
        server.bind(str(tmp_path / "s") if family == socket.AF_UNIX else ("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)
        where = server.getsockname()
        address = {"path": where} if family == socket.AF_UNIX else {"host": "127.0.0.1"}
        if family == socket.AF_INET:
            address["port"] = where[1]
        chardev = SocketChardev("dut", SocketOptions(**address, reconnect_ms=10))
        guest = Guest(chardev)
        chardev.guest_opened(False)
        await chardev.start()
        for turn in range(1, 4):
            async with asyncio.timeout(DEADLINE):
                sock, _ = await asyncio.get_running_loop().sock_accept(server)
            with sock:
                sock.send(b"220 welcome\r\n")
                await until(lambda turn=turn: guest.events.count("opened") == turn)
        await chardev.aclose()
