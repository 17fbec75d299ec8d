"""The device's own state, given to a frontend and taken from one: also from a hostile one."""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.leaks import held
from tests.support.waiting import until
from vring_serial import unix_fds
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.device.console.state import CONSOLE
from vring_serial.device.queue_device import QueueDevice
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.proto.control import PortState
from vring_serial.proto.vhost_user import (
    U64,
    DeviceStateTransfer,
    ProtocolFeature,
    Request,
    request,
)
from vring_serial.transport.vhost_user.backend import PROTOCOL_FEATURES, VhostUserBackend
from vring_serial.transport.vhost_user.device_state import MAX_STATE
from vring_serial.transport.vhost_user.state import FRONTEND, FrontendState

SAVE, LOAD = DeviceStateTransfer.SAVE, DeviceStateTransfer.LOAD
FEATURES = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 1


def make_controller(*, name: str = "org.test", max_ports: int = 2) -> Controller:
    controller = Controller(max_ports=max_ports)
    chardev = ProtocolChardev("test", asyncio.Protocol, connected=False)
    controller.add_port(Port(1, name, chardev))
    return controller


def state_of(controller: Controller, guest: PortState = PortState.OPEN, owed: bytes = b"") -> bytes:
    """A state in which a driver has the port open, and the host end is owed bytes."""
    with controller.settled():
        state = CONSOLE.unpack(controller.save_state())
    state.controller.control.driver_ready = True
    state.controller.control.ports[1].state = state.ports[1].guest = guest
    state.ports[1].chain.residue = owed
    return CONSOLE.pack(state)


@pytest.fixture
async def controller() -> AsyncIterator[Controller]:
    made = make_controller()
    await made.start()
    yield made
    await made.aclose()


@pytest.fixture
async def frontend(
    controller: Controller, path: Path, connect: Callable[[], Any]
) -> AsyncIterator[Any]:
    async with VhostUserBackend(controller, str(path)):
        made = connect()
        await made.negotiate(int(PROTOCOL_FEATURES), FEATURES)
        yield made
        made.close()


async def begin(frontend: Any, direction: int, *, phase: int = 0) -> tuple[int, tuple[int, ...]]:
    """Offer a channel; what is answered, and the descriptors beside it."""
    reader, writer = os.pipe()
    payload = struct.pack("=II", direction, phase)
    head = request(Request.SET_DEVICE_STATE_FD)[:8] + struct.pack("=I", len(payload))
    frontend.send_bytes(head + payload, (writer if direction == SAVE else reader,))
    os.close(writer)
    await until(lambda: select.select([frontend.sock], [], [], 0)[0])
    received = unix_fds.receive(frontend.sock, 4096, 8)
    os.set_blocking(reader, False)
    if direction == SAVE:  # nobody holds, or wrote to, what was offered
        await until(lambda: select.select([reader], [], [], 0)[0])
        assert os.read(reader, 1) == b""
    os.close(reader)
    return U64.unpack(received.data[12:]).value, received.fds


async def saved(frontend: Any) -> bytes:
    value, (fd,) = await begin(frontend, SAVE)
    assert value == 0
    with open(fd, "rb") as channel:
        return channel.read()


async def load(frontend: Any, state: bytes) -> int:
    """What CHECK_DEVICE_STATE answers."""
    value, (fd,) = await begin(frontend, LOAD)
    assert value == 0
    with open(fd, "wb") as channel:
        channel.write(state)
    return int(await frontend.number(Request.CHECK_DEVICE_STATE))


async def test_a_state_is_read_from_memory_to_its_end(frontend: Any) -> None:
    value, (fd,) = await begin(frontend, SAVE)
    assert value == 0
    with open(fd, "rb") as channel:
        assert CONSOLE.unpack(channel.read()).max_ports == 2
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    assert await frontend.number(Request.CHECK_DEVICE_STATE) == 0


async def test_a_device_in_service_goes_on_from_a_state(
    frontend: Any, controller: Controller
) -> None:
    assert await load(frontend, state_of(make_controller(), owed=b"owed")) == 0
    port = controller.ports[1]
    assert port.guest_open
    assert port.state.chain.residue == b"owed"
    # The next state is that one.
    again = CONSOLE.unpack(await saved(frontend))
    assert again.ports[1].chain.residue == b"owed"
    assert again.controller.control.ports[1].state is PortState.OPEN


async def test_what_is_owed_is_not_paid_before_a_queue_starts(
    controller: Controller, frontend: Any
) -> None:
    assert await load(frontend, state_of(make_controller(), owed=b"owed")) == 0
    assert controller.state.still
    await frontend.set_up(0)
    assert not controller.state.still


@pytest.mark.parametrize("checked", [False, True])
async def test_a_frontend_that_leaves_with_the_state_takes_the_driver_along(
    frontend: Any, controller: Controller, checked: bool
) -> None:
    assert await load(frontend, state_of(make_controller(), owed=b"owed")) == 0
    await frontend.set_up(2)  # it counts here
    await frontend.base(2)
    await saved(frontend)
    if checked:
        assert await frontend.number(Request.CHECK_DEVICE_STATE) == 0
    frontend.sock.close()
    await until(lambda: not controller.state.still)
    port = controller.ports[1]
    assert port.guest_open is not checked
    assert port.state.chain.residue == (b"" if checked else b"owed")


async def test_a_state_that_was_brought_for_nothing_is_forgotten(
    frontend: Any, controller: Controller
) -> None:
    assert await load(frontend, state_of(make_controller(), owed=b"owed")) == 0
    frontend.sock.close()
    await until(lambda: not controller.state.still)
    assert not controller.ports[1].guest_open
    assert not controller.ports[1].state.chain.residue


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda good: b"", "the first bytes are others"),
        (lambda good: good[: len(good) // 2], "the checksum does not fit"),
        (lambda good: good[:60] + bytes([good[60] ^ 1]) + good[61:], "the checksum does not fit"),
        (lambda good: good[:8] + b"\x09" + good[9:], "its layout has version 9"),
        (
            lambda good: good[:12] + struct.pack("<I", (1 << 25) - 20) + good[16:],
            f"{1 << 25} bytes; {MAX_STATE} are allowed",
        ),
        (lambda _: FRONTEND.pack(FrontendState()), "the state of 'vhost-user frontend', not of"),
        (lambda _: state_of(make_controller(name="org.other")), "org.other"),
        (lambda _: state_of(make_controller(max_ports=3)), "max_ports 3, not 2"),
    ],
)
async def test_a_state_that_does_not_fit_is_named_and_changes_nothing(
    frontend: Any,
    controller: Controller,
    make: Callable[[bytes], bytes],
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad = make(state_of(make_controller()))
    before = held()
    assert await load(frontend, bad) == 1
    assert why in caplog.text
    assert held() == before
    assert not controller.ports[1].guest_open
    assert not controller.state.still
    # The session goes on, and takes one that fits.
    assert await frontend.number(Request.CHECK_DEVICE_STATE) == 1
    assert await load(frontend, state_of(make_controller())) == 0


async def test_a_state_that_is_too_large_does_not_go_in(frontend: Any) -> None:
    _, (fd,) = await begin(frontend, LOAD)
    with open(fd, "wb", buffering=0) as channel:
        channel.seek(MAX_STATE)
        with pytest.raises(PermissionError):
            channel.write(b"x")
    assert await frontend.number(Request.CHECK_DEVICE_STATE) == 1


async def test_no_state_moves_while_a_queue_runs(
    frontend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await frontend.set_up(0)
    assert await begin(frontend, SAVE) == (DeviceStateTransfer.REFUSED, ())
    assert await begin(frontend, LOAD) == (DeviceStateTransfer.REFUSED, ())
    assert "queue 0 is running" in caplog.text
    await frontend.base(0)
    _, (fd,) = await begin(frontend, LOAD)
    with open(fd, "wb") as channel:
        channel.write(state_of(make_controller()))
    await frontend.resume(0, 0)
    assert await frontend.number(Request.CHECK_DEVICE_STATE) == 1


@pytest.mark.parametrize(("direction", "phase"), [(2, 0), (0, 1), (1, 7), (1 << 31, 0)])
async def test_what_is_not_known_is_refused(frontend: Any, direction: int, phase: int) -> None:
    answer = await begin(frontend, direction, phase=phase)
    assert answer == (DeviceStateTransfer.REFUSED, ())


async def test_no_state_is_on_its_way(frontend: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert await frontend.number(Request.CHECK_DEVICE_STATE) == 1
    assert "no state is on its way" in caplog.text


async def test_a_channel_is_needed(frontend: Any) -> None:
    frontend.send(Request.SET_DEVICE_STATE_FD, DeviceStateTransfer(SAVE))
    answer = await frontend.receive()
    assert answer.decode_reply(U64).value == DeviceStateTransfer.REFUSED


async def test_without_the_feature_there_is_no_state(
    controller: Controller, path: Path, connect: Callable[[], Any]
) -> None:
    async with VhostUserBackend(controller, str(path)):
        frontend = connect()
        await frontend.negotiate(int(PROTOCOL_FEATURES & ~ProtocolFeature.DEVICE_STATE))
        assert await begin(frontend, SAVE) == (DeviceStateTransfer.REFUSED, ())
        assert await frontend.number(Request.CHECK_DEVICE_STATE) == 1
        frontend.close()


class Speechless(QueueDevice):
    """It does not say what its state is."""

    def serve(self, index: int, running: RunningQueue) -> bool:
        return False


async def test_a_device_that_does_not_say_what_its_state_is(
    path: Path, connect: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncExitStack() as stack:
        device = Speechless("speechless", 42, 4)
        await stack.enter_async_context(VhostUserBackend(device, str(path)))
        frontend = connect()
        await frontend.negotiate(int(PROTOCOL_FEATURES), 1 << 32)
        assert await begin(frontend, SAVE) == (DeviceStateTransfer.REFUSED, ())
        assert "does not say what its state is" in caplog.text
        assert await frontend.number(Request.GET_FEATURES)
        frontend.close()
