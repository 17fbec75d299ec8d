"""Whoever stops waiting for a controller or a transport leaves it stopped, or can stop it again."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from tests.support import waiting
from tests.support.leaks import held
from vring_serial.chardev.null import NullChardev
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.guest.guest import EmbeddedGuest
from vring_serial.proto.vfio_user import Message
from vring_serial.proto.vfio_user_dma import DmaAccess
from vring_serial.proto.vfio_user_wire import Command
from vring_serial.transport.vfio_user.remote import RemoteMemory
from vring_serial.transport.vfio_user.server import VfioUserServer
from vring_serial.transport.vhost_user.backend import VhostUserBackend


def awaitables(kind):
    """Names of the public methods that are awaited."""
    members = inspect.getmembers(kind, inspect.iscoroutinefunction)
    return {name for name, _ in members if not name.startswith("_")}


def test_all_of_them_are_tried():
    assert awaitables(VhostUserBackend) == {"start", "aclose"}
    assert awaitables(VfioUserServer) == {"start", "aclose"}
    assert awaitables(RemoteMemory) == set(), "read and write return futures"
    of_controller = {"start", "aclose", "plug_port", "remove_port", "change_chardev"}
    assert awaitables(Controller) == of_controller


async def after(turns, work):
    """Do some work, and cancel it after so many turns of the loop; returns the task."""
    task = asyncio.ensure_future(work)
    await waiting.turns(turns)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return task


class Slow(NullChardev):
    """A chardev of a user's that takes its time both ways."""

    def __init__(self, id):
        super().__init__(id)
        self.is_open = False

    async def start(self):
        await waiting.turns(1)
        self.is_open = True
        await super().start()

    async def aclose(self):
        await super().aclose()
        self.is_open = False
        await waiting.turns(1)


class Failing(NullChardev):
    """A chardev of a user's that cannot be stopped."""

    async def aclose(self):
        await super().aclose()
        raise RuntimeError("cannot be stopped")


def make(tmp_path):
    """A controller whose ports have slow ends, and a socket in between."""
    controller = Controller()
    for nr in (1, 3):
        controller.add_port(Port(nr, f"slow {nr}", Slow(f"slow{nr}")))
    options = SocketOptions(path=str(tmp_path / "port.sock"), server=True, wait=False)
    controller.add_port(Port(2, "socket", SocketChardev("socket", options)))
    return controller


def is_stopped(controller, tmp_path):
    slow = [port.chardev for port in controller.ports.values() if isinstance(port.chardev, Slow)]
    return not any(c.is_open for c in slow) and not (tmp_path / "port.sock").exists()


@pytest.mark.parametrize("turns", range(8))
async def test_a_controller_is_cancelled_while_it_starts(tmp_path, turns):
    before = held()
    controller = make(tmp_path)
    task = await after(turns, controller.start())
    if not task.cancelled():
        await controller.aclose()
    assert is_stopped(controller, tmp_path)
    assert held() == before
    await controller.start()
    await controller.aclose()


@pytest.mark.parametrize("turns", range(1, 8))
async def test_a_controller_is_cancelled_while_it_stops(tmp_path, turns):
    """All of its chardevs are stopped by then, and its pump is closed."""
    before = held()
    controller = make(tmp_path)
    await controller.start()
    await after(turns, controller.aclose())
    assert is_stopped(controller, tmp_path)
    assert held() == before
    await controller.start()
    await controller.aclose()


async def test_a_chardev_that_cannot_be_stopped_keeps_no_other_from_it(tmp_path):
    before = held()
    controller = make(tmp_path)
    controller.add_port(Port(4, "failing", Failing("failing")))
    controller.add_port(Port(5, "slow too", Slow("slow5")))
    await controller.start()
    with pytest.raises(RuntimeError, match="cannot be stopped"):
        await controller.aclose()
    assert is_stopped(controller, tmp_path)
    assert held() == before


@pytest.mark.parametrize("turns", range(4))
async def test_plugging_and_removing_are_cancelled(tmp_path, turns):
    controller = make(tmp_path)
    await controller.start()
    port = Port(7, "plugged", Slow("plugged"))
    task = await after(turns, controller.plug_port(port))
    assert (7 in controller.ports) == (not task.cancelled())
    assert port.chardev.is_open == (not task.cancelled())
    if not task.cancelled():
        await after(turns, controller.remove_port(7))
        assert not port.chardev.is_open
    assert 7 not in controller.ports
    other = Port(7, "another", Slow("another"))
    await controller.plug_port(other)
    new = Slow("new")
    await new.start()
    await after(turns, controller.change_chardev(7, new))
    assert new.is_open
    assert other.chardev is (new if turns else other.chardev)
    await controller.remove_port(7)
    await controller.aclose()


@pytest.mark.parametrize("turns", range(3))
@pytest.mark.parametrize("transport", [VhostUserBackend, VfioUserServer])
@pytest.mark.parametrize("what", ["start", "aclose"])
async def test_a_transport_is_cancelled(tmp_path, transport, what, turns):
    path = tmp_path / "device.sock"
    before = held()
    controller = Controller()
    backend = transport(controller, str(path))
    if what == "aclose":
        await backend.start()
    await after(turns, getattr(backend, what)())
    await backend.aclose()
    assert not path.exists()
    await backend.start()
    assert path.exists()
    if transport is VhostUserBackend:
        await controller.start()
        async with EmbeddedGuest(str(path), memory=16 << 20):
            pass
        await controller.aclose()
    await backend.aclose()
    del backend, controller
    assert held() == before


async def test_reading_a_clients_memory_is_cancelled():
    """The answer that comes after all is nobody's, and not the next one's."""
    sent = []
    memory = RemoteMemory(sent.append, 4096)
    await after(2, memory.read(0x1000, 8192))
    reading = asyncio.ensure_future(memory.read(0x9000, 4))
    await waiting.turns(1)
    assert len(sent) == 3
    for number, (address, data) in enumerate(
        [(0x1000, bytes(4096)), (0x2000, bytes(4096)), (0x9000, b"next")]
    ):
        answer = DmaAccess(address, len(data), data)
        memory.handle_reply(reply_to(number, answer))
    assert await reading == b"next"
    unanswered = asyncio.ensure_future(memory.read(0x9000, 4))
    await waiting.turns(1)
    memory.close()
    with pytest.raises(ConnectionError):
        await unanswered


def reply_to(number, answer):
    return Message(Command.DMA_READ, number, 1, answer.pack())
