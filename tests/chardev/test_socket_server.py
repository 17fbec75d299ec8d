"""Socket servers: how their clients come, wait and go."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chardev_kinds import Guest
from tests.support.sockets import unix_client, unix_server
from tests.support.waiting import DEADLINE, turns, until, until_logged
from vring_serial.errors import ResourceError

pytestmark = pytest.mark.usefixtures("no_leak")


async def test_the_next_client_waits_in_the_backlog(tmp_path: Path) -> None:
    chardev = unix_server(tmp_path / "s")
    guest = Guest(chardev)
    await chardev.start()
    first = await unix_client(tmp_path / "s")
    await guest.opened()
    second = await unix_client(tmp_path / "s")
    second.send(b"my turn?")
    await turns()
    assert guest.events == ["opened"]
    with pytest.raises(BlockingIOError):
        os.read(guest.read_fd, 8)
    first.close()
    await until(lambda: guest.events == ["opened", "closed", "opened"])
    assert await guest.read(8) == b"my turn?"
    second.close()
    await guest.closed()
    await chardev.aclose()


async def test_a_half_closed_connection_is_a_disconnection(tmp_path: Path) -> None:
    chardev = unix_server(tmp_path / "s")
    guest = Guest(chardev)
    await chardev.start()
    with await unix_client(tmp_path / "s") as sock:
        await guest.opened()
        sock.shutdown(socket.SHUT_WR)
        await guest.closed()
        assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
    await chardev.aclose()


async def test_a_killed_peer_is_noticed(tmp_path: Path) -> None:
    chardev = unix_server(tmp_path / "s")
    guest = Guest(chardev)
    await chardev.start()
    script = "import signal,socket,sys; s=socket.socket(1); s.connect(sys.argv[1]); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "s")]) as process:
        await guest.opened()
        process.kill()
    await guest.closed()
    await chardev.aclose()


async def test_many_clients_in_a_row(tmp_path: Path) -> None:
    """Clients that come at once are served one after another, and none of their bytes is lost."""
    chardev = unix_server(tmp_path / "s")
    guest = Guest(chardev)
    await chardev.start()
    for number in range(5):
        sock = await unix_client(tmp_path / "s")
        sock.send(bytes([number]) * 10)
        sock.close()
    for number in range(5):
        await guest.opened()
        assert await guest.read(10) == bytes([number]) * 10
        assert os.read(guest.read_fd, 1) == b""
        chardev.peer_gone()
    await chardev.aclose()
    assert guest.events == ["opened", "closed"] * 5


async def test_peers_that_come_and_go_in_a_loop_fill_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vring_serial.chardev.socket")
    chardev = unix_server(tmp_path / "s")
    guest = Guest(chardev)
    await chardev.start()
    async with asyncio.timeout(DEADLINE):
        for turn in range(1, 51):
            sock = await unix_client(tmp_path / "s")
            await guest.opened()
            sock.close()
            await until(lambda turn=turn: guest.events == ["opened", "closed"] * turn)
    await chardev.aclose()
    about_peers = [line for line in caplog.messages if ": peer " in line]
    assert len(about_peers) == 20


STEPS = st.lists(
    st.one_of(
        st.just(("connect", 0)),
        st.tuples(st.sampled_from(["send", "close", "half-close"]), st.integers(0, 4)),
        st.just(("read", 0)),
    ),
    max_size=25,
)


@given(steps=STEPS)
@settings(max_examples=60)
def test_every_byte_of_every_client_in_their_order(steps: list[tuple[str, int]]) -> None:
    """Up to five clients come, send and go while the guest reads at moments of its own."""

    async def play() -> None:
        name = f"vring-test-{os.getpid()}"
        chardev = unix_server(name, abstract=True)
        guest = Guest(chardev)
        clients: list[socket.socket] = []
        sent: list[bytes] = []
        received = b""
        await chardev.start()
        for what, which in steps:
            if what == "connect" and len(clients) < 5:
                clients.append(await unix_client(f"\0{name}"))
                sent.append(b"")
            elif what == "read":
                received += read_what_is_there(guest)
            elif which < len(clients):
                sent[which] += act(clients[which], what, len(sent[which]))
            await turns(1)
        for client in clients:
            client.close()
        async with asyncio.timeout(DEADLINE):
            while received != b"".join(sent) or guest.end is not None:
                received += read_what_is_there(guest)
                await turns(1)
        await chardev.aclose()
        # Who left before its turn without a word is not served.
        served = len(guest.events) // 2
        assert sum(map(bool, sent)) <= served <= len(clients)
        assert guest.events == ["opened", "closed"] * served

    asyncio.run(play())


def act(client: socket.socket, what: str, offset: int) -> bytes:
    """Returns what the client sent; one that has gone, or that was sent away, sends nothing."""
    data = bytes([offset % 251]) * 7
    try:
        if what == "send":
            client.send(data)
            return data
        if what == "half-close":
            client.shutdown(socket.SHUT_WR)
        else:
            client.close()
    except OSError:
        pass
    return b""


def read_what_is_there(guest: Guest) -> bytes:
    """What the data plane does for an open port."""
    data = b""
    while guest.end is not None:
        try:
            more = os.read(guest.read_fd, 5)
        except BlockingIOError:
            break
        data += more
        if not more:
            guest.chardev.peer_gone()
    return data


# Waiting for the first client


async def test_start_waits_for_the_first_client(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vring_serial.chardev.socket")
    chardev = unix_server(tmp_path / "s", wait=True)
    guest = Guest(chardev)
    starting = asyncio.create_task(chardev.start())
    await until_logged(caplog, "waiting for a client")
    await turns()
    assert not starting.done()
    with await unix_client(tmp_path / "s"):
        async with asyncio.timeout(DEADLINE):
            await starting
        assert guest.events == ["opened"]
    await guest.closed()
    await chardev.aclose()


async def test_stop_while_start_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vring_serial.chardev.socket")
    chardev = unix_server(tmp_path / "s", wait=True)
    starting = asyncio.create_task(chardev.start())
    await until_logged(caplog, "waiting for a client")
    await chardev.aclose()
    with pytest.raises(ResourceError, match="stopped meanwhile"):
        await starting
    assert not list(tmp_path.iterdir())


async def test_cancelling_start_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vring_serial.chardev.socket")
    chardev = unix_server(tmp_path / "s", wait=True)
    starting = asyncio.create_task(chardev.start())
    await until_logged(caplog, "waiting for a client")
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not list(tmp_path.iterdir())
    await chardev.aclose()
