"""udp: datagrams, with a peer that is another socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from tests.support.chardev_kinds import Guest
from tests.support.waiting import turns, until
from vring_serial.chardev.udp import DATAGRAM_BYTES, UdpChardev, UdpOptions
from vring_serial.errors import ConfigError, ResourceError

pytestmark = pytest.mark.usefixtures("no_leak")


def bound(family: int = socket.AF_INET) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
    return sock


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    with bound() as sock:
        yield sock


def to(peer: socket.socket, **more: object) -> UdpChardev:
    host, port = peer.getsockname()[:2]
    return UdpChardev("dut", UdpOptions(host=host, port=port, **more))  # type: ignore[arg-type]


async def test_bytes_go_both_ways_in_datagrams(peer: socket.socket) -> None:
    chardev = to(peer)
    guest = Guest(chardev)
    async with chardev:
        await guest.write(b"x" * DATAGRAM_BYTES + b"rest")
        assert peer.recv(65536) == b"x" * DATAGRAM_BYTES
        assert peer.recv(65536) == b"rest"
        peer.sendto(b"one", ("127.0.0.1", chardev.port))
        peer.sendto(b"", ("127.0.0.1", chardev.port))
        peer.sendto(b"two", ("127.0.0.1", chardev.port))
        assert guest.transport is not None
        transport = guest.transport
        await until(lambda: transport.received == b"onetwo")


async def test_what_others_send_is_not_received(peer: socket.socket) -> None:
    chardev = to(peer)
    guest = Guest(chardev)
    with bound() as other:
        async with chardev:
            other.sendto(b"from elsewhere", ("127.0.0.1", chardev.port))
            peer.sendto(b"from the peer", ("127.0.0.1", chardev.port))
            assert guest.transport is not None
            transport = guest.transport
            await until(lambda: transport.received)
            await turns()
            assert transport.received == b"from the peer"


async def test_it_is_bound_where_it_is_told_to_be(peer: socket.socket) -> None:
    with bound() as free:
        port = free.getsockname()[1]
    chardev = to(peer, localaddr="127.0.0.1", localport=port)
    guest = Guest(chardev)
    async with chardev:
        assert chardev.port == port
        await guest.write(b"hello")
        assert peer.recvfrom(99) == (b"hello", ("127.0.0.1", port))


async def test_ipv6() -> None:
    with bound(socket.AF_INET6) as peer:
        chardev = to(peer)
        guest = Guest(chardev)
        async with chardev:
            assert chardev.description == f"udp:[::1]:{peer.getsockname()[1]}"
            await guest.write(b"six")
            assert peer.recv(99) == b"six"


async def test_nobody_there_is_logged_and_the_next_datagram_goes(
    peer: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    port = peer.getsockname()[1]
    chardev = to(peer)
    guest = Guest(chardev)
    async with chardev:
        peer.close()
        await guest.write(b"to nobody")
        await until(lambda: "a datagram was lost: Connection refused" in caplog.text)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
            again.bind(("127.0.0.1", port))
            await guest.write(b"to somebody")
            assert again.recv(99) == b"to somebody"
        assert guest.end is not None


async def test_a_guest_that_has_no_room_is_not_sent_more(peer: socket.socket) -> None:
    chardev = to(peer)
    guest = Guest(chardev)
    async with chardev:
        assert guest.protocol is not None
        guest.protocol.pause_writing()
        peer.sendto(b"waits", ("127.0.0.1", chardev.port))
        await turns(50)
        assert guest.transport is not None
        transport = guest.transport
        assert not transport.received
        guest.protocol.resume_writing()
        await until(lambda: transport.received == b"waits")


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({}, "port"),
        ({"port": 0}, "port"),
        ({"port": 1, "localport": 65536}, "localport"),
        ({"port": 1, "host": "\0"}, "host"),
        ({"port": 1, "localaddr": "\0"}, "localaddr"),
        ({"port": 1, "ipv4": False, "ipv6": False}, "ipv6"),
    ],
)
def test_what_cannot_be(options: dict[str, object], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        UdpOptions(**options)  # type: ignore[arg-type]
    assert caught.value.where == where


async def test_addresses_that_are_none() -> None:
    for options in (
        UdpOptions(host="no.such.host.invalid", port=9),
        UdpOptions(host="127.0.0.1", port=9, localaddr="192.0.2.1"),
    ):
        with pytest.raises(ResourceError, match=r"^chardev dut: cannot send to udp:"):
            await UdpChardev("dut", options).start()


async def test_the_end_of_a_start_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that takes for ever to resolve."""
    never = asyncio.Event()

    async def getaddrinfo(*_: object, **__: object) -> None:
        await never.wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    chardev = UdpChardev("dut", UdpOptions(host="h", port=9))
    starting = asyncio.create_task(chardev.start())
    await turns()
    await chardev.aclose()
    with pytest.raises(ResourceError, match="it was stopped meanwhile"):
        await starting
