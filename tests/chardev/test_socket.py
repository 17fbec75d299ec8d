"""Sockets: their options, what may be in the way of one, and what stop leaves."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.support.chardev_kinds import Guest
from tests.support.sockets import refused, reset_connection, tcp_server, unix_client, unix_server
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.errors import ConfigError

pytestmark = pytest.mark.usefixtures("no_leak")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


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
