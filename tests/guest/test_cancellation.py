"""Whoever stops waiting leaves the guest usable, and whoever waits is told when it is stopped."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.support.leaks import held
from tests.support.scripted_backend import ScriptedDevice, ScriptedServer
from tests.support.waiting import DEADLINE, turns, until
from vring_serial.chardev.ringbuf import RingbufChardev
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.guest.errors import BackendClosedError, PortRemovedError
from vring_serial.guest.frontend import Frontend
from vring_serial.guest.guest import EmbeddedGuest
from vring_serial.guest.memory import GuestRam
from vring_serial.guest.port import GuestPort
from vring_serial.guest.queue import DriverQueue
from vring_serial.proto import vhost_user as vu
from vring_serial.transport.vhost_user.backend import VhostUserBackend


def awaitables(kind: type) -> set[str]:
    """Names of the public methods that are awaited."""
    return {
        name
        for name, method in inspect.getmembers(kind, inspect.iscoroutinefunction)
        if not name.startswith("_")
    }


async def let_wait(task: asyncio.Future[Any]) -> None:
    """The task runs until it waits for something that does not come."""
    await turns()
    assert not task.done()


async def cancel(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- the frontend's requests


def queue_of(ram: GuestRam) -> DriverQueue:
    return DriverQueue(0, ram, 16, event_idx=False)


INFLIGHT = vu.Inflight(4096, 0, 2, 16)
#: Every request of a frontend, and the message of it that is not answered in time.
REQUESTS: dict[str, tuple[vu.Request, Callable[[Frontend, GuestRam], Coroutine[Any, Any, Any]]]] = {
    "ask": (vu.Request.GET_QUEUE_NUM, lambda f, ram: f.ask(vu.Request.GET_QUEUE_NUM, vu.U64)),
    "tell": (vu.Request.SET_OWNER, lambda f, ram: f.tell(vu.Request.SET_OWNER)),
    "negotiate_protocol": (vu.Request.GET_FEATURES, lambda f, ram: f.negotiate_protocol()),
    "set_features": (vu.Request.SET_FEATURES, lambda f, ram: f.set_features(1 << 32)),
    "set_status": (vu.Request.SET_STATUS, lambda f, ram: f.set_status(1)),
    "get_status": (vu.Request.GET_STATUS, lambda f, ram: f.get_status()),
    "read_config": (vu.Request.GET_CONFIG, lambda f, ram: f.read_config(0, 8)),
    "set_memory": (vu.Request.SET_MEM_TABLE, lambda f, ram: f.set_memory(ram)),
    "set_queue": (vu.Request.SET_VRING_CALL, lambda f, ram: f.set_queue(queue_of(ram), ram)),
    "enable_queues": (vu.Request.SET_VRING_ENABLE, lambda f, ram: f.enable_queues([0])),
    "stop_queues": (vu.Request.GET_VRING_BASE, lambda f, ram: f.stop_queues([0])),
    "reset": (vu.Request.SET_STATUS, lambda f, ram: f.reset()),
    "set_log": (vu.Request.SET_LOG_BASE, lambda f, ram: f.set_log(0, 4096)),
    "save_state": (vu.Request.SET_DEVICE_STATE_FD, lambda f, ram: f.save_state()),
    "load_state": (vu.Request.SET_DEVICE_STATE_FD, lambda f, ram: f.load_state(b"")),
    "get_inflight": (vu.Request.GET_INFLIGHT_FD, lambda f, ram: f.get_inflight(2, 16)),
    "set_inflight": (vu.Request.SET_INFLIGHT_FD, lambda f, ram: f.set_inflight(0, INFLIGHT)),
}


def test_all_of_them_are_tried() -> None:
    assert awaitables(Frontend) == REQUESTS.keys() | {"connect"}
    of_guest = {"start", "aclose", "wait_port", "settle", "wait_lost", "go_on"}
    assert awaitables(EmbeddedGuest) == of_guest
    assert awaitables(GuestPort) == {"open", "take_rings", "wait_host", "wait_removed"}


def everything(backend: Any) -> None:
    known = vu.ProtocolFeature
    backend.protocol_features |= known.STATUS | known.INFLIGHT_SHMFD
    backend.protocol_features |= known.LOG_SHMFD | known.DEVICE_STATE


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_request_that_is_cancelled(scripted: ScriptedServer, name: str) -> None:
    """Its answer, which comes when nobody waits for it, is not taken for the next one's."""
    scripted.prepare = everything
    frontend = Frontend(scripted.path)
    await frontend.connect()
    await frontend.negotiate_protocol()
    ram = GuestRam(1 << 20)
    kind, call = REQUESTS[name]
    backend = scripted.backend
    before = len(backend.requests)
    backend.script[kind] = None
    calling = asyncio.ensure_future(call(frontend, ram))
    await until(lambda: kind.name in backend.requests[before:])
    await cancel(calling)
    del backend.script[kind]
    asking = asyncio.ensure_future(frontend.get_status())
    await let_wait(asking)  # behind the other's answer
    answer: vu.Payload = vu.U64(0)
    if kind == vu.Request.GET_CONFIG:
        answer = vu.ConfigAccess(0, bytes(8))
    if kind == vu.Request.GET_VRING_BASE:
        answer = vu.VringState(0, 7)
    if kind == vu.Request.GET_INFLIGHT_FD:
        answer = INFLIGHT
    backend.channel.send_now(vu.reply(kind, answer))
    backend.status = 5
    assert await asking == 5
    assert frontend.closed is None
    frontend.close()
    ram.close()


class Narrow(socket.socket):
    """A socket that takes five bytes and is full then, again and again."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(fileno=sock.detach())
        self.calls = itertools.count()

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None) -> int:
        if next(self.calls) % 2:
            raise BlockingIOError
        (data,) = buffers
        return super().sendmsg([data[:5]], ancdata, flags, address)


async def test_a_request_that_is_cancelled_in_the_middle_of_its_bytes() -> None:
    one, theirs = socket.socketpair()
    ours = Narrow(one)
    ours.setblocking(False)
    theirs.setblocking(False)
    frontend = Frontend("test")
    frontend.attach(ours)
    calling = asyncio.ensure_future(frontend.tell(vu.Request.SET_FEATURES, vu.U64(1 << 32)))
    await turns(3)
    await cancel(calling)
    telling = asyncio.ensure_future(frontend.tell(vu.Request.SET_OWNER))
    parser = vu.VhostUserParser(vu.Request)
    seen: list[str] = []
    async with asyncio.timeout(DEADLINE):
        while len(seen) < 2:
            parser.receive_data(await asyncio.get_running_loop().sock_recv(theirs, 100), ())
            while (message := parser.next_message()) is not None:
                message.decode()
                seen.append(message.name)
    await telling
    assert seen == ["SET_FEATURES", "SET_OWNER"]
    frontend.close()
    theirs.close()


async def test_connecting_is_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "full.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(path))
            before = held()
            for count in range(4):
                connecting = asyncio.ensure_future(Frontend(str(path)).connect())
                await turns(count)
                connecting.cancel()
                await asyncio.gather(connecting, return_exceptions=True)
            assert held() == before


async def test_whoever_waits_for_an_answer_is_told_of_the_end(scripted: ScriptedServer) -> None:
    frontend = Frontend(scripted.path)
    await frontend.connect()
    await until(lambda: scripted.accepted)
    scripted.backend.script[vu.Request.GET_FEATURES] = None
    asking = asyncio.ensure_future(frontend.negotiate_protocol())
    await until(lambda: "GET_FEATURES" in scripted.backend.requests)
    waiting = asyncio.ensure_future(frontend.tell(vu.Request.SET_OWNER))
    await let_wait(waiting)
    frontend.close()
    for task in (asking, waiting):
        with pytest.raises(BackendClosedError):
            await task


# --- the guest


class Served:
    """A real device with one port, for one guest after another."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.controller = Controller(max_ports=4)
        self.controller.add_port(Port(1, "org.example.data", RingbufChardev("ring")))
        self.backend = VhostUserBackend(self.controller, self.path)

    async def works(self) -> None:
        """The next guest is served, its port written to."""
        async with EmbeddedGuest(self.path, memory=32 << 20) as guest:
            port = await guest.wait_port(1)
            await port.wait_host()
            _, writer = await port.open()
            writer.write(b"here")
            await writer.drain()


@pytest.fixture
async def served(tmp_path: Path) -> Any:
    served = Served(tmp_path / "device.sock")
    await served.controller.start()
    await served.backend.start()
    yield served
    await served.backend.aclose()
    await served.controller.aclose()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 10, 20, 40, 80, 160])
@pytest.mark.parametrize("what", ["start", "aclose"])
async def test_a_guest_is_cancelled_while_it_starts_or_stops(
    served: Served, what: str, count: int
) -> None:
    await served.works()
    gone = []
    served.backend.on_peer = gone.append
    await until(lambda: not served.backend.has_peer)
    before = held()
    guest = EmbeddedGuest(served.path, memory=32 << 20)
    if what == "aclose":
        await guest.start()
    task = asyncio.ensure_future(getattr(guest, what)())
    await turns(count)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    if what == "start" and not task.cancelled():
        await guest.aclose()
    if what == "aclose" and count == 0:
        await guest.aclose()  # it had not begun
    del guest, task
    await until(lambda: not served.backend.has_peer)
    await until(lambda: held() == before)
    await served.works()


WAITS: dict[str, Callable[[EmbeddedGuest], Coroutine[Any, Any, Any]]] = {
    "wait_port": lambda guest: guest.wait_port(3),
    "settle": lambda guest: guest.settle(60),
    "wait_lost": lambda guest: guest.wait_lost(),
    "wait_host": lambda guest: guest.ports[1].wait_host(False),
    "wait_removed": lambda guest: guest.ports[1].wait_removed(),
}


@pytest.mark.parametrize("name", WAITS)
async def test_waiting_is_cancelled_and_ends_with_the_guest(served: Served, name: str) -> None:
    async with EmbeddedGuest(served.path, memory=32 << 20) as guest:
        await (await guest.wait_port(1)).wait_host()
        first = asyncio.ensure_future(WAITS[name](guest))
        second = asyncio.ensure_future(WAITS[name](guest))
        await let_wait(first)
        await cancel(first)
        await let_wait(second)
        assert guest.lost is None
    async with asyncio.timeout(DEADLINE):
        if name in ("wait_port", "settle"):
            with pytest.raises(PortRemovedError):
                await second
        else:
            await second


async def test_a_move_that_is_cancelled_leaves_the_guest_where_it_is(
    served: Served, scripted: ScriptedServer
) -> None:
    scripted.prepare = everything
    async with EmbeddedGuest(served.path, memory=32 << 20) as guest:
        port = await guest.wait_port(1)
        await port.wait_host()
        other = Frontend(scripted.path)
        await other.connect()
        await other.negotiate_protocol()
        scripted.backend.script[vu.Request.SET_MEM_TABLE] = None  # it never answers
        moving = asyncio.ensure_future(guest.go_on(other, {}))
        await until(lambda: "SET_MEM_TABLE" in scripted.backend.requests)
        await cancel(moving)
        other.close()
        assert guest.lost is None
        _, writer = await port.open()
        writer.write(b"still here")
        await guest.settle(DEADLINE)
        writer.close()
    await served.works()


async def test_taking_the_rings_is_cancelled(scripted: ScriptedServer) -> None:
    """The device has not heard of it yet. The port can be opened, and works, after that."""
    scripted.prepare = lambda backend: None
    guest = EmbeddedGuest(scripted.path, memory=32 << 20, max_ports=4, packed=False)
    await guest.start()
    device = ScriptedDevice(scripted.backend)
    await device.next_control()  # DEVICE_READY
    device.control(1, 1)  # PORT_ADD
    port = await guest.wait_port(1)
    await device.next_control()  # PORT_READY
    device.control(1, 6)  # PORT_OPEN
    await port.wait_host()
    taking = asyncio.ensure_future(port.take_rings())
    await let_wait(taking)
    await cancel(taking)
    assert (await device.next_control())[1:] == (6, 1)
    assert (await device.next_control())[1:] == (6, 0)
    reader, writer = await port.open()
    assert (await device.next_control())[1:] == (6, 1)
    device.send(4, b"for the reader")
    async with asyncio.timeout(DEADLINE):
        assert await reader.read(100) == b"for the reader"
    writer.write(b"for the device")
    assert await device.receive(5) == b"for the device"
    writer.close()
    scripted.backend.close()
    await guest.aclose()
