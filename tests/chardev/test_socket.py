"""Sockets: what may be in the way of one, and how its peers come and go."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chardev.conftest import (
    Guest,
    read_exactly,
    reset_connection,
    tcp_server,
    unix_client,
    unix_server,
)
from tests.support.leaks import held
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.errors import ConfigError, ResourceError

pytestmark = pytest.mark.usefixtures("no_leak")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


async def refused(chardev: SocketChardev, *words: str) -> str:
    """Start fails with all these words, and leaves nothing open or behind."""
    before = held()
    with pytest.raises(ResourceError) as caught:
        async with asyncio.timeout(5):
            await chardev.start()
    assert held() == before
    assert chardev.end is None
    message = str(caught.value)
    for word in ("dut", *words):
        assert word in message
    return message


# Options


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "path"),
        ({"host": "localhost"}, "path"),
        ({"path": "a\0b"}, "path"),
        ({"path": "\ud800"}, "path"),
        ({"path": "s", "port": 1}, "path"),
        ({"path": "s", "host": "h"}, "path"),
        ({"path": "s", "nodelay": True}, "nodelay"),
        ({"path": "s", "ipv4": True}, "ipv4"),
        ({"path": "s", "to": 3, "server": True}, "to"),
        ({"port": -1, "server": True}, "port"),
        ({"port": 65536, "server": True}, "port"),
        ({"port": 0}, "port"),
        ({"port": 5, "to": 9}, "to"),
        ({"port": 5, "to": 4, "server": True}, "to"),
        ({"port": 5, "to": 65536, "server": True}, "to"),
        ({"port": 5, "ipv4": False, "ipv6": False}, "ipv6"),
        ({"port": 5, "abstract": True}, "abstract"),
        ({"port": 5, "host": "a\0b"}, "host"),
        ({"path": "s", "server": True, "reconnect": 1}, "reconnect"),
        ({"path": "s", "server": True, "reconnect_ms": 1}, "reconnect-ms"),
        ({"path": "s", "reconnect": 1, "reconnect_ms": 1}, "reconnect-ms"),
        ({"path": "s", "reconnect": -1}, "reconnect"),
        ({"path": "s", "reconnect": 2**31}, "reconnect"),
        ({"path": "s", "wait": True}, "wait"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SocketOptions(**options)
    assert caught.value.where == key


def test_waiting_is_the_default_of_a_server_as_with_qemu() -> None:
    assert SocketOptions(path="s", server=True).waits
    assert not SocketOptions(path="s", server=True, wait=False).waits
    assert not SocketOptions(path="s").waits


def test_reconnect_in_seconds_or_milliseconds() -> None:
    assert SocketOptions(path="s", reconnect=2).reconnect_delay == 2
    assert SocketOptions(path="s", reconnect_ms=250).reconnect_delay == 0.25
    assert SocketOptions(path="s").reconnect_delay == 0


# What is in the way of a unix server


async def test_a_socket_that_a_dead_process_left_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    chardev = unix_server(path)
    guest = Guest(chardev)
    await chardev.start()
    with await unix_client(path):
        await guest.opened()
    await chardev.aclose()
    assert not path.exists()


async def test_a_live_server_is_left_in_peace(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        other.setblocking(False)
        await refused(unix_server(path), str(path), "another process listens on it")
        assert path.is_socket()
        with pytest.raises(BlockingIOError):
            other.accept()  # it has not even noticed


async def test_a_server_that_is_bound_and_does_not_listen_yet_is_alive(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        await refused(unix_server(path), "another process listens on it")


async def test_a_datagram_server_is_alive_too(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        await refused(unix_server(path), "another process listens on it")


async def test_a_regular_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    await refused(unix_server(path), str(path), "is not a socket")
    assert path.read_text() == "precious"


async def test_a_symbolic_link_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.symlink_to("elsewhere")
    await refused(unix_server(path), str(path), "is not a socket")
    assert path.is_symlink()


async def test_a_missing_directory(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "s"
    await refused(unix_server(path), f"there is no directory {path.parent}")


async def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    await refused(unix_server(tmp_path / "file" / "s"), "Not a directory")


@pytest.mark.parametrize("server", [True, False])
@pytest.mark.parametrize("abstract", [True, False])
async def test_a_path_that_is_too_long(server: bool, abstract: bool) -> None:
    path = "/tmp/" + "x" * 103
    options = SocketOptions(path=path, server=server, abstract=abstract)
    await refused(SocketChardev("dut", options), path, "108 bytes", "107 at most")


async def test_the_longest_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chardev = unix_server("x" * 107)
    guest = Guest(chardev)
    await chardev.start()
    with await unix_client("x" * 107):
        await guest.opened()
    await chardev.aclose()


async def test_an_abstract_name_in_use() -> None:
    name = f"vring-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(f"\0{name}")
        await refused(unix_server(name, abstract=True), f"unix:@{name}", "in use")


async def test_an_abstract_name_that_is_not_tight() -> None:
    name = f"vring-test-{os.getpid()}"
    chardev = unix_server(name, abstract=True, tight=False)
    guest = Guest(chardev)
    await chardev.start()
    with await unix_client("\0" + name.ljust(107, "\0")):
        await guest.opened()
    await chardev.aclose()


# What stop leaves


async def test_the_path_is_removed(tmp_path: Path) -> None:
    chardev = unix_server(tmp_path / "s")
    await chardev.start()
    assert (tmp_path / "s").is_socket()
    await chardev.aclose()
    assert not list(tmp_path.iterdir())


async def test_a_path_that_somebody_removed_or_replaced_is_theirs(tmp_path: Path) -> None:
    path = tmp_path / "s"
    chardev = unix_server(path)
    await chardev.start()
    path.unlink()
    path.write_text("mine")
    await chardev.aclose()
    assert path.read_text() == "mine"
    path.unlink()
    await chardev.start()
    path.unlink()
    await chardev.aclose()


# TCP


async def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        await refused(tcp_server(port=port), f"tcp:127.0.0.1:{port}", "Address already in use")


async def test_the_next_free_port_up_to_the_last() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        chardev = tcp_server(port=port, to=min(port + 20, 65535))
        await chardev.start()
        assert port < chardev.port <= port + 20
        assert f":{chardev.port} " in chardev.description
        await chardev.aclose()


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example"])
@pytest.mark.parametrize("server", [True, False])
async def test_a_name_that_does_not_resolve(host: str, server: bool) -> None:
    options = SocketOptions(host=host, port=1, server=server)
    await refused(SocketChardev("dut", options), host, "does not resolve")


async def test_an_address_of_another_family_does_not_resolve() -> None:
    await refused(tcp_server(host="::1", ipv4=True), "::1", "does not resolve")


async def test_an_address_that_is_not_ours() -> None:
    await refused(tcp_server(host="192.0.2.1"), "192.0.2.1", "Cannot assign requested address")


async def test_every_address_of_a_name_is_served_at_one_port() -> None:
    chardev = tcp_server(host="")
    guest = Guest(chardev)
    await chardev.start()
    served = 0
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as sock:
            if sock.connect_ex((host, chardev.port)) == 0:
                await guest.opened()
                served += 1
        await guest.closed()
    assert served == (2 if has_ipv6() else 1)
    await chardev.aclose()


async def test_one_family_alone() -> None:
    chardev = tcp_server(host="", ipv4=True)
    await chardev.start()
    with socket.socket(socket.AF_INET6) as sock:
        assert sock.connect_ex(("::1", chardev.port)) != 0
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", chardev.port))
    await chardev.aclose()


@pytest.mark.parametrize("nodelay", [True, False])
async def test_nodelay(nodelay: bool) -> None:
    chardev = tcp_server(nodelay=nodelay)
    guest = Guest(chardev)
    await chardev.start()
    with socket.create_connection(("127.0.0.1", chardev.port)):
        await guest.opened()
        with socket.socket(fileno=os.dup(guest.read_fd)) as sock:
            assert bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) is nodelay
    await chardev.aclose()


async def test_a_reset_closes_the_end() -> None:
    chardev = tcp_server()
    guest = Guest(chardev)
    await chardev.start()
    sock = socket.create_connection(("127.0.0.1", chardev.port))
    await guest.opened()
    reset_connection(sock)
    await guest.closed()
    await chardev.aclose()


# Peers


async def test_the_next_client_waits_in_the_backlog(tmp_path: Path) -> None:
    chardev = unix_server(tmp_path / "s")
    guest = Guest(chardev)
    await chardev.start()
    first = await unix_client(tmp_path / "s")
    await guest.opened()
    second = await unix_client(tmp_path / "s")
    second.send(b"my turn?")
    await asyncio.sleep(0.05)
    assert guest.events == ["opened"]
    with pytest.raises(BlockingIOError):
        os.read(guest.read_fd, 8)
    first.close()
    await guest.until(lambda: guest.events == ["opened", "closed", "opened"])
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
    script = "import socket,sys,time; s=socket.socket(1); s.connect(sys.argv[1]); time.sleep(60)"
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
    async with asyncio.timeout(10):
        for turn in range(1, 51):
            sock = await unix_client(tmp_path / "s")
            await guest.opened()
            sock.close()
            await guest.until(lambda turn=turn: guest.events == ["opened", "closed"] * turn)
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
@settings(max_examples=60, deadline=None)
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
            await asyncio.sleep(0)
        for client in clients:
            client.close()
        async with asyncio.timeout(5):
            while received != b"".join(sent) or guest.end is not None:
                received += read_what_is_there(guest)
                await asyncio.sleep(0)
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


async def test_start_waits_for_the_first_client(tmp_path: Path) -> None:
    chardev = unix_server(tmp_path / "s", wait=True)
    guest = Guest(chardev)
    starting = asyncio.create_task(chardev.start())
    await asyncio.sleep(0.05)
    assert not starting.done()
    with await unix_client(tmp_path / "s"):
        async with asyncio.timeout(5):
            await starting
        assert guest.events == ["opened"]
    await guest.closed()
    await chardev.aclose()


async def test_stop_while_start_waits(tmp_path: Path) -> None:
    chardev = unix_server(tmp_path / "s", wait=True)
    starting = asyncio.create_task(chardev.start())
    await asyncio.sleep(0.02)
    await chardev.aclose()
    with pytest.raises(ResourceError, match="stopped meanwhile"):
        await starting
    assert not list(tmp_path.iterdir())


async def test_cancelling_start_leaves_nothing(tmp_path: Path) -> None:
    chardev = unix_server(tmp_path / "s", wait=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await chardev.start()
    assert not list(tmp_path.iterdir())
    await chardev.aclose()


# Clients


async def test_a_client_that_does_not_connect_again_must_connect_now(tmp_path: Path) -> None:
    path = tmp_path / "s"
    await refused(SocketChardev("dut", SocketOptions(path=str(path))), str(path), "No such file")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        client = SocketChardev("dut", SocketOptions(host="127.0.0.1", port=port))
        await refused(client, f"connect to tcp:127.0.0.1:{port}", "Connection refused")


async def test_a_client_that_does_not_connect_again_stays_away(tmp_path: Path) -> None:
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
        await asyncio.sleep(0.05)
        with pytest.raises(BlockingIOError):
            server.accept()
        await chardev.aclose()


async def test_a_client_follows_its_server_through_restarts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s"
    chardev = SocketChardev("dut", SocketOptions(path=str(path), reconnect_ms=10))
    guest = Guest(chardev)
    await chardev.start()
    await asyncio.sleep(0.05)
    assert len(caplog.records) == 1, "one line, not one for every attempt"
    assert re.search(r"dut.*No such file.*every 0.01 s", caplog.text)
    for turn in range(1, 4):
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen()
            server.setblocking(False)
            async with asyncio.timeout(5):
                sock, _ = await asyncio.get_running_loop().sock_accept(server)
            await guest.until(lambda turn=turn: guest.events.count("opened") == turn)
            await guest.write(b"hello")
            assert await read_exactly(sock.fileno(), 5) == b"hello"
        path.unlink()
        sock.close()
        await guest.closed()
    await chardev.aclose()


async def test_connecting_waits_for_a_place_in_a_full_backlog(tmp_path: Path) -> None:
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
        await asyncio.sleep(0.1)
        assert not starting.done()
        assert guest.events == []
        stack.enter_context(server.accept()[0])
        async with asyncio.timeout(5):
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
            await asyncio.sleep(0.02)
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
