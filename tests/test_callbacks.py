"""What users hand us may raise: that is logged, and costs nobody anything else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.console import guest_on
from tests.support.waiting import until
from vring import GuestMemory
from vring.testing import GuestQueue
from vring_serial.agent.guest import GuestAgent
from vring_serial.agent.host import HostAgent
from vring_serial.agent.router.router import AgentRouter
from vring_serial.chardev.base import ProtocolEnd
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.device.queue_device import QueueDevice
from vring_serial.device.testing import ANY_FEATURE, MmioDriver, PciDriver, RegisterDriver
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.errors import LocalProtocolError
from vring_serial.guest.guest import EmbeddedGuest
from vring_serial.proto import vfio_user
from vring_serial.proto.control.device import PortState
from vring_serial.proto.vfio_user_version import Version
from vring_serial.proto.virtio import Status
from vring_serial.transport.inprocess.fronts import InProcessMmio, InProcessPci, PolledHost
from vring_serial.transport.vfio_user.server import VfioUserServer
from vring_serial.transport.vhost_user.backend import VhostUserBackend

DEADLINE = 20.0


class OopsError(Exception):
    pass


def raising(told: list[object]) -> Callable[..., None]:
    def callback(*args: object) -> None:
        told.append(args)
        raise OopsError("a mistake of the user's")

    return callback


class Upper(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert isinstance(self.transport, asyncio.WriteTransport)
        self.transport.write(data.upper())


async def served_once(path: Path) -> None:
    """A guest comes, uses port 1 and leaves."""
    async with asyncio.timeout(DEADLINE), EmbeddedGuest(str(path), memory=16 << 20) as guest:
        port = await guest.wait_port(nr=1)
        await port.wait_host()
        reader, writer = await port.open()
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"HELLO"
        writer.close()


async def test_every_callback_of_a_vhost_user_backend(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[object] = []
    controller = Controller()
    controller.add_port(Port(1, "x", ProtocolChardev("c", Upper)))
    controller.on_event = raising(told)
    await controller.start()
    backend = VhostUserBackend(controller, str(tmp_path / "v"))
    backend.on_peer = raising(told)
    await backend.start()
    for _ in range(3):
        await served_once(tmp_path / "v")
    await until(lambda: told.count(("gone",)) >= 3)
    assert told.count(("connected",)) == 3
    await backend.aclose()
    await controller.aclose()
    assert "on_peer failed" in caplog.text
    assert "on_event failed" in caplog.text
    assert len(caplog.records) < 200


@pytest.mark.parametrize("kind", [HostAgent, GuestAgent, AgentRouter])
async def test_an_agents_listener_is_one_as_well(kind: Callable[..., Any]) -> None:
    first: list[object] = []
    second: list[object] = []
    async with kind(on_event=first.append) as agent:
        assert agent.on_event == first.append
        with pytest.raises(LocalProtocolError, match="on_event has a listener already"):
            agent.on_event = second.append
        agent.on_event = None
        agent.on_event = second.append
        assert agent.on_event == second.append


async def test_a_second_listener_does_not_replace_the_first(tmp_path: Path) -> None:
    first: list[str] = []
    second: list[str] = []
    server = VfioUserServer(Controller(), str(tmp_path / "v"))
    server.on_peer = first.append
    server.on_peer = first.append  # the same one
    with pytest.raises(LocalProtocolError, match="on_peer has a listener already"):
        server.on_peer = second.append
    assert server.on_peer == first.append
    server.on_peer = None
    server.on_peer = second.append
    await server.aclose()


async def test_the_callback_of_a_vfio_user_server(tmp_path: Path) -> None:
    told: list[object] = []
    server = VfioUserServer(Controller(), str(tmp_path / "v"))
    server.on_peer = raising(told)
    await server.start()
    for count in range(1, 4):
        async with asyncio.timeout(DEADLINE):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "v")
            writer.write(vfio_user.request(vfio_user.Command.VERSION, 1, Version()))
            assert await reader.readexactly(16)
            writer.close()
            await until(lambda count=count: told.count(("gone",)) >= count)
    await server.aclose()


class Fragile(QueueDevice):
    """A user's device whose methods raise when it is told to."""

    def __init__(self, config: bytes = b"") -> None:
        super().__init__("fragile", 4, num_queues=1, config=config)
        self.fails: set[str] = set()

    def serve(self, index: int, running: RunningQueue) -> bool:
        if "serve" in self.fails:
            raise OopsError("serve")
        return False

    def reset(self) -> None:
        super().reset()
        if "reset" in self.fails:
            raise OopsError("reset")


@pytest.mark.parametrize("method", ["reset"])
async def test_a_device_that_raises_shuts_no_door(tmp_path: Path, method: str) -> None:
    failures: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: failures.append(what))
    device = Fragile()
    device.fails = {method}
    server = VfioUserServer(device, str(tmp_path / "v"))
    await server.start()
    for _ in range(3):
        async with asyncio.timeout(DEADLINE):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "v")
            writer.write(vfio_user.request(vfio_user.Command.VERSION, 1, Version()))
            assert await reader.readexactly(16)
            writer.close()
    await until(lambda: len(failures) >= 3)
    device.fails = set()
    await server.aclose()


def test_a_device_that_cannot_serve_its_queue_needs_a_reset(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its driver would wait for ever, and nobody would know why."""
    host = PolledHost()
    queue = GuestQueue(bytearray(GuestQueue.bytes_needed(16, 4096)), 16, 4096, writable=True)
    device = Fragile()
    mmio = InProcessMmio(host, device, queue.memory, interrupt=raising([]))
    driver = MmioDriver(mmio.read, mmio.write)
    driver.accept(ANY_FEATURE)
    driver.start_queue(0, 16, queue.rings)
    driver.status = driver.status | Status.DRIVER_OK
    host.poll()
    assert not driver.status & Status.DEVICE_NEEDS_RESET
    device.fails = {"serve"}
    driver.notify(0)
    assert driver.status & Status.DEVICE_NEEDS_RESET
    assert "serving it failed: OopsError: serve" in caplog.text
    device.fails = set()
    driver.status = 0
    driver.accept(ANY_FEATURE)
    assert not driver.status & Status.DEVICE_NEEDS_RESET
    mmio.close()
    host.close()


def test_interrupt_callbacks_raise_out_of_no_register_access(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[object] = []
    host = PolledHost()
    devices = [Fragile(b"old"), Fragile(b"old")]
    pci = InProcessPci(host, devices[0], GuestMemory(), msi=raising(told), intx=raising(told))
    mmio = InProcessMmio(host, devices[1], GuestMemory(), interrupt=raising(told))
    drivers: list[RegisterDriver] = [
        PciDriver(
            pci.config.read,
            pci.config.write,
            lambda bar: (pci.bars[bar].read, pci.bars[bar].write),
        ),
        MmioDriver(mmio.read, mmio.write),
    ]
    for device, driver in zip(devices, drivers, strict=True):
        driver.accept(ANY_FEATURE)
        driver.status = driver.status | Status.DRIVER_OK
        device.set_config(b"new")
        assert driver.take_events() == 2
    assert told == [(True,), (False,)] * 2
    assert "intx failed" in caplog.text
    assert "on_interrupt failed" in caplog.text
    pci.close()
    mmio.close()
    host.close()


class FragilePort(Port):
    """A port of a user's own, which raises when it is told to."""

    fails = False

    def set_guest(self, state: PortState, *, single: bool = False) -> None:
        if self.fails:
            raise OopsError("set_guest")
        super().set_guest(state, single=single)


class BadChardev(ProtocolChardev):
    """A user's kind of chardev, which raises when it is told."""

    def guest_opened(self, is_open: bool) -> None:
        raise OopsError("guest_opened")


async def test_a_control_message_is_completed_whatever_came_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Linux spins until it is, with a lock held."""
    controller = Controller()
    fragile = FragilePort(1, "bad", BadChardev("b", Upper))
    controller.add_port(fragile)
    controller.add_port(Port(2, "good", ProtocolChardev("c", Upper)))
    async with guest_on(controller, tmp_path / "v") as guest:
        bad = await guest.wait_port(nr=1)
        await bad.wait_host()
        _, unused = await bad.open()
        port = await guest.wait_port(nr=2)
        reader, writer = await port.open()
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"HELLO"
        writer.close()
        unused.close()
        # What is ours may fail as well.
        fragile.fails = True
        _, unused = await bad.open()
        await guest.wait_port(nr=2)
        unused.close()
        await until(lambda: "a message could not be acted upon" in caplog.text)
        reader, writer = await port.open()
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"HELLO"
        writer.close()
        fragile.fails = False
    assert "guest_opened failed" in caplog.text


class LastWords(asyncio.Protocol):
    def __init__(self, heard: list[str]) -> None:
        self.heard = heard

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.heard.append("made")

    def eof_received(self) -> bool:
        self.heard.append("eof")
        raise OopsError("eof_received")

    def connection_lost(self, exc: Exception | None) -> None:
        self.heard.append("lost")
        raise OopsError("connection_lost")


async def test_a_protocol_that_raises_at_the_end_hears_all_of_it(tmp_path: Path) -> None:
    failures: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: failures.append(what))
    heard: list[str] = []
    controller = Controller()
    chardev = ProtocolChardev("c", lambda: LastWords(heard))
    controller.add_port(Port(1, "x", chardev))
    async with guest_on(controller, tmp_path / "v") as guest:
        port = await guest.wait_port(nr=1)
        await port.wait_host()
        for turn in (1, 2):
            _, writer = await port.open()
            await until(lambda turn=turn: heard.count("made") >= turn)
            writer.close()
            await until(lambda turn=turn: heard.count("lost") >= turn)
        assert isinstance(chardev.end, ProtocolEnd)
    assert heard == ["made", "eof", "lost"] * 2
    assert [what["message"] for what in failures] == ["the protocol of a port failed"] * 4
