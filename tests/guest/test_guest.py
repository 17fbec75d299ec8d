"""The embedded guest against our own backend, in the same event loop."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.leaks import held
from tests.support.waiting import turns, until
from vring_serial import EmbeddedGuest, GuestPort
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.errors import ConfigError, LocalProtocolError, ResourceError
from vring_serial.guest.errors import (
    BackendClosedError,
    BackendTimeoutError,
    PortRemovedError,
)
from vring_serial.guest.services import keep_serving, serve_echo
from vring_serial.proto.console import ConsoleFeature
from vring_serial.proto.virtio import Feature
from vring_serial.transport.vhost_user.backend import VhostUserBackend

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
MIB = 1 << 20


@dataclass
class Setup:
    """A backend with ports one and two on unix sockets, and three in Python."""

    directory: Path
    controller: Controller
    backend: VhostUserBackend
    layout: Feature

    @property
    def path(self) -> str:
        return str(self.directory / "vhost.sock")

    def socket_port(self, nr: int, name: str) -> Port:
        options = SocketOptions(path=str(self.directory / name), server=True, wait=False)
        return Port(nr, name, SocketChardev(name, options))

    async def connect(self, name: str) -> Streams:
        """The host's end of a port."""
        return await asyncio.open_unix_connection(str(self.directory / name))


@pytest.fixture(params=[Feature(0), Feature.RING_PACKED], ids=["split", "packed"])
async def setup(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Setup]:
    controller = Controller(max_ports=8)
    layout: Feature = request.param
    backend = VhostUserBackend(controller, f"{tmp_path}/vhost.sock", packed=bool(layout))
    setup = Setup(tmp_path, controller, backend, layout)
    controller.add_port(setup.socket_port(1, "one"))
    controller.add_port(setup.socket_port(2, "two"))
    await controller.start()
    await setup.backend.start()
    yield setup
    await setup.backend.aclose()
    await controller.aclose()


@pytest.fixture
async def guest(setup: Setup) -> AsyncIterator[EmbeddedGuest]:
    async with EmbeddedGuest(setup.path) as guest:
        yield guest


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


async def test_ports_appear_with_their_names(setup: Setup, guest: EmbeddedGuest) -> None:
    one = await guest.wait_port(name="one")
    two = await guest.wait_port(2)
    assert (one.nr, two.nr) == (1, 2)
    assert not one.is_console
    assert guest.config.max_nr_ports == 8
    assert Feature.VERSION_1 | Feature.EVENT_IDX | ConsoleFeature.MULTIPORT in guest.features
    assert guest.features & Feature.RING_PACKED == setup.layout
    await guest.settle()
    assert {port.name for port in guest.ports.values()} == {"one", "two"}
    with pytest.raises(BackendTimeoutError, match=r"no port 'three'.*: 1 'one', 2 'two'"):
        await guest.wait_port(name="three", timeout=0.01)


async def test_both_ends_open_close_and_reopen(setup: Setup, guest: EmbeddedGuest) -> None:
    port = await guest.wait_port(name="one")
    for turn in range(3):
        host_reader, host_writer = await setup.connect("one")
        reader, writer = await port.open()
        await port.wait_host()
        writer.write(b"to the host %d\n" % turn)
        assert await host_reader.readline() == b"to the host %d\n" % turn
        host_writer.write(b"to the guest %d\n" % turn)
        assert await reader.readline() == b"to the guest %d\n" % turn
        await hang_up(host_writer)
        assert await reader.read() == b""
        await hang_up(writer)
        assert not port.guest_connected


async def test_the_host_comes_and_goes_while_the_port_is_open(
    setup: Setup, guest: EmbeddedGuest
) -> None:
    port = await guest.wait_port(name="one")
    reader, writer = await port.open()
    for turn in range(3):
        host_reader, host_writer = await setup.connect("one")
        host_writer.write(b"session %d" % turn)
        await hang_up(host_writer)
        assert await reader.read() == b"session %d" % turn
        reader, writer = await port.open()
    writer.write(b"nobody is there")
    draining = asyncio.ensure_future(writer.drain())
    # What another port of the same pump has carried there and back came after it.
    other = await (await guest.wait_port(name="two")).open()
    other_host = await setup.connect("two")
    other[1].write(b"ping\n")
    assert await other_host[0].readline() == b"ping\n"
    other_host[1].write(b"pong\n")
    assert await other[0].readline() == b"pong\n"
    for each in (other_host[1], other[1]):
        await hang_up(each)
    assert not draining.done()
    host_reader, host_writer = await setup.connect("one")
    await draining
    assert await host_reader.readexactly(15) == b"nobody is there"
    await hang_up(writer)
    await hang_up(host_writer)


def blocks(total: int) -> Iterator[bytes]:
    """Unlike blocks of an odd size."""
    for number, start in enumerate(range(0, total, 50_021)):
        block = number.to_bytes(4, "little") * 12_506
        yield block[: min(50_021, total - start)].ljust(min(50_021, total - start), b".")


async def pour(writer: asyncio.StreamWriter, total: int) -> str:
    digest = hashlib.sha256()
    for block in blocks(total):
        digest.update(block)
        writer.write(block)
        await writer.drain()
    return digest.hexdigest()


async def collect(reader: asyncio.StreamReader, total: int) -> str:
    digest = hashlib.sha256()
    while total:
        data = await reader.read(min(total, 1 << 18))
        assert data, f"{total} bytes are missing"
        digest.update(data)
        total -= len(data)
    return digest.hexdigest()


async def test_64_mib_there_and_back(setup: Setup, guest: EmbeddedGuest) -> None:
    port = await guest.wait_port(name="one")
    serving = asyncio.ensure_future(keep_serving(port, serve_echo))
    host_reader, host_writer = await setup.connect("one")
    sent, got = await asyncio.gather(pour(host_writer, 64 * MIB), collect(host_reader, 64 * MIB))
    assert sent == got
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await hang_up(host_writer)


async def test_two_ports_at_once_and_a_third_that_nobody_reads(
    setup: Setup, guest: EmbeddedGuest
) -> None:
    await setup.controller.plug_port(setup.socket_port(3, "blocked"))
    streams = []
    for name in ("one", "two", "blocked"):
        host = await setup.connect(name)
        port = await guest.wait_port(name=name)
        streams.append((host, await port.open()))
    (one_host, one), (two_host, two), (_, blocked) = streams
    stuck = asyncio.ensure_future(pour(blocked[1], 64 * MIB))
    results = await asyncio.gather(
        pour(one[1], 8 * MIB),
        collect(one_host[0], 8 * MIB),
        pour(two_host[1], 8 * MIB),
        collect(two[0], 8 * MIB),
    )
    assert len(set(results)) == 1
    assert not stuck.done()
    stuck.cancel()
    for host, (_, writer) in streams:
        writer.transport.abort()
        host[1].close()


async def test_ports_come_and_go_while_the_guest_runs(setup: Setup, guest: EmbeddedGuest) -> None:
    for _ in range(3):
        await setup.controller.plug_port(setup.socket_port(3, "three"))
        port = await guest.wait_port(name="three")
        host_reader, host_writer = await setup.connect("three")
        reader, writer = await port.open()
        host_writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        writer.write(b"world")
        assert await host_reader.readexactly(5) == b"world"
        await setup.controller.remove_port(3)
        with pytest.raises(PortRemovedError):
            await reader.read(1)
        await port.wait_removed()
        assert 3 not in guest.ports
        await hang_up(host_writer)


async def test_python_code_as_the_host_end(setup: Setup, guest: EmbeddedGuest) -> None:
    class Upper(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data.upper())  # type: ignore[attr-defined]

    await setup.controller.plug_port(Port(4, "upper", ProtocolChardev("upper", Upper)))
    port = await guest.wait_port(name="upper")
    reader, writer = await port.open()
    await port.wait_host()
    writer.write(b"quiet")
    assert await reader.readexactly(5) == b"QUIET"
    await hang_up(writer)


async def test_one_guest_after_another(setup: Setup) -> None:
    host_reader, host_writer = await setup.connect("one")
    for turn in range(3):
        async with EmbeddedGuest(setup.path) as guest:
            port = await guest.wait_port(name="one")
            reader, writer = await port.open()
            writer.write(b"guest %d\n" % turn)
            assert await host_reader.readline() == b"guest %d\n" % turn
            host_writer.write(b"host %d\n" % turn)
            assert await reader.readline() == b"host %d\n" % turn
            await hang_up(writer)
        assert isinstance(port.removed, PortRemovedError)
    await hang_up(host_writer)


async def test_a_guest_that_dies_leaves_the_backend_to_the_next(setup: Setup) -> None:
    first = EmbeddedGuest(setup.path)
    await first.start()
    port = await first.wait_port(name="one")
    _, writer = await port.open()
    leaving = asyncio.ensure_future(first.aclose())
    await turns(1)
    leaving.cancel()  # so that it leaves as a killed process does
    await asyncio.gather(leaving, return_exceptions=True)
    writer.transport.abort()
    async with EmbeddedGuest(setup.path) as guest:
        await guest.wait_port(name="one")
    await first.aclose()


async def test_the_backend_stops(setup: Setup, guest: EmbeddedGuest) -> None:
    port = await guest.wait_port(name="one")
    reader, _ = await port.open()
    reading = asyncio.ensure_future(reader.read(1))
    await turns(1)
    await setup.backend.aclose()
    with pytest.raises(BackendClosedError, match="closed the connection"):
        await reading
    assert isinstance(await guest.wait_lost(), BackendClosedError)
    with pytest.raises(ResourceError, match="cannot connect"):
        await EmbeddedGuest(setup.path).start()


@pytest.mark.parametrize(
    "options",
    [
        {"receive_size": 65536, "queue_size": 16},
        {"receive_size": 1},
        {"queue_size": 2},
        {"queue_size": 32768, "receive_size": 256, "memory": 256 * MIB},
        {"memory": 8 * MIB, "queue_size": 32},
    ],
)
async def test_other_sizes(setup: Setup, options: dict[str, int]) -> None:
    async with EmbeddedGuest(setup.path, **options) as guest:
        port = await guest.wait_port(name="two")
        serving = asyncio.ensure_future(keep_serving(port, serve_echo))
        host_reader, host_writer = await setup.connect("two")
        sent, got = await asyncio.gather(pour(host_writer, 100_000), collect(host_reader, 100_000))
        assert sent == got
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await hang_up(host_writer)


async def test_packed_rings_can_be_refused(setup: Setup) -> None:
    async with EmbeddedGuest(setup.path, packed=False) as guest:
        assert Feature.RING_PACKED not in guest.features
        assert (await guest.wait_port(name="one")).nr == 1


async def test_without_optional_features(setup: Setup) -> None:
    setup.controller.device_features = int(Feature.VERSION_1 | ConsoleFeature.MULTIPORT)
    async with EmbeddedGuest(setup.path) as guest:
        assert guest.features == Feature.VERSION_1 | ConsoleFeature.MULTIPORT | setup.layout
        port = await guest.wait_port(name="one")
        host_reader, host_writer = await setup.connect("one")
        _, writer = await port.open()
        sent, got = await asyncio.gather(pour(writer, MIB), collect(host_reader, MIB))
        assert sent == got
        await hang_up(writer)
        await hang_up(host_writer)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"queue_size": 100}, "queue size 100"),
        ({"queue_size": 65536}, "queue size 65536"),
        ({"receive_size": 0}, "receive buffers of 0"),
        ({"receive_size": (1 << 20) + 1}, "receive buffers of 1048577"),
        ({"memory": (1 << 20) - 1}, "1048575 bytes of RAM"),
        ({"max_ports": 0}, "0 ports"),
        ({"max_ports": 128}, "128 ports are not between 1 and 127"),
    ],
)
def test_impossible_numbers(options: dict[str, int], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        EmbeddedGuest("path", **options)


async def test_nothing_stays_open(setup: Setup) -> None:
    happened: list[object] = []
    setup.backend.on_peer = happened.append
    async with EmbeddedGuest(setup.path) as guest:
        await guest.wait_port(2)
    await until(lambda: len(happened) == 2, "the first guest has come and gone")
    before = held()
    for _ in range(3):
        async with EmbeddedGuest(setup.path) as guest:
            port: GuestPort = await guest.wait_port(2)
            _, writer = await port.open()
            writer.write(b"unread")
    await until(lambda: len(happened) == 8, lambda: f"three more have come and gone: {happened}")
    assert held() == before


def test_a_second_listener_replaces_none(tmp_path: Path) -> None:
    guest = EmbeddedGuest(str(tmp_path / "vu"))
    events: list[object] = []
    guest.on_event = events.append
    with pytest.raises(LocalProtocolError, match="on_event has a listener already"):
        guest.on_event = print
    guest.on_event = None
    guest.on_event = print
