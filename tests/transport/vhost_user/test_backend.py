"""The backend and its frontends: the sequences of real ones, and how they come and go."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.leaks import held
from tests.support.waiting import DEADLINE, LoopClock, turns, until
from vring_serial.errors import ConfigError, LocalProtocolError, ResourceError
from vring_serial.proto.vhost_user import (
    U64,
    ConfigAccess,
    MemoryTable,
    Request,
    VringDescriptor,
    VringState,
    request,
)
from vring_serial.transport import door
from vring_serial.transport.vhost_user.backend import VhostUserBackend

#: MQ, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS
OFFERED = 0x9B22B
FEATURES = 1 << 32 | 1 << 29 | 1 << 28
BIT_30 = 1 << 30
LOG_ALL = 1 << 26


def header(kind: int, flags: int, size: int) -> bytes:
    return struct.pack("=III", kind, flags, size)


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


async def exchange(frontend: Any, data: bytes, answer: bytes, fds: tuple[int, ...] = ()) -> None:
    """Bytes out, exactly these bytes back."""
    frontend.send_bytes(data, fds)
    assert await frontend.receive_bytes(len(answer)) == answer


# --- User-Mode Linux ------------------------------------------------------------------------------


async def uml_boots(frontend: Any) -> None:
    frontend.send_bytes(header(3, 1, 0))
    await exchange(frontend, header(1, 1, 0), header(1, 5, 8) + u64(FEATURES | BIT_30 | LOG_ALL))
    await exchange(frontend, header(15, 1, 0), header(15, 5, 8) + u64(OFFERED))
    # 0, 3, 5, 9 of what is offered; the message itself asks for the acknowledgement already.
    await exchange(frontend, header(16, 9, 8) + u64(0x229), header(16, 5, 8) + u64(0))
    frontend.channel, theirs = socket.socketpair()
    frontend.channel.setblocking(False)
    with theirs:
        await exchange(frontend, header(21, 9, 0), header(21, 5, 8) + u64(0), (theirs.fileno(),))
    await exchange(frontend, header(17, 1, 0), header(17, 5, 8) + u64(4))


async def uml_loads_the_driver(frontend: Any, sockets: list[socket.socket]) -> None:
    async def acked(kind: int, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        data = header(kind, 9, len(payload)) + payload
        await exchange(frontend, data, header(kind, 5, 8) + u64(0), fds)

    await acked(2, u64(FEATURES | BIT_30))
    access = struct.pack("=III", 0, 8, 0)
    await exchange(
        frontend,
        header(24, 1, 20) + access + bytes(8),
        header(24, 5, 20) + access + bytes(range(8)),
    )
    region = frontend.region
    # Room for two regions, one is filled.
    await acked(5, MemoryTable((region,)).pack() + bytes(32), (frontend.memfd,))
    for index in (0, 1):
        call, theirs = socket.socketpair()
        call.setblocking(False)
        sockets.append(call)
        with theirs:
            await acked(13, u64(index), (theirs.fileno(),))
        await acked(8, struct.pack("=II", index, 64))
        await acked(10, struct.pack("=II", index, 0))
        await acked(9, frontend.ring(index).pack())
    for index in (0, 1):
        kick, _ = frontend.eventfds(index)
        await acked(12, u64(index), (kick,))
        await acked(18, struct.pack("=II", index, 1))


async def uml_removes_the_driver(frontend: Any) -> None:
    for index in (1, 0):
        data = header(18, 9, 8) + struct.pack("=II", index, 0)
        await exchange(frontend, data, header(18, 5, 8) + u64(0))
    await exchange(frontend, header(1, 1, 0), header(1, 5, 8) + u64(FEATURES | BIT_30 | LOG_ALL))


async def test_user_mode_linux_from_boot_to_the_second_driver(frontend: Any, device: Any) -> None:
    sockets: list[socket.socket] = []
    await uml_boots(frontend)
    for _ in range(2):
        await uml_loads_the_driver(frontend, sockets)
        assert await frontend.echo(1, b"hello")
        # Exactly 8 bytes for the one call.
        assert sockets[-1].recv(100) == u64(1)
        await uml_removes_the_driver(frontend)
        assert not device.running
    assert [what for what in device.told if what[0] in ("start", "stop")] == [
        *[("start", 0, 0), ("start", 1, 0), ("stop", 1, 1), ("stop", 0, 0)] * 2
    ]
    for sock in sockets:
        sock.close()


# --- QEMU -----------------------------------------------------------------------------------------


async def qemu_starts(frontend: Any) -> None:
    await exchange(frontend, header(1, 1, 0), header(1, 5, 8) + u64(FEATURES | BIT_30 | LOG_ALL))
    await exchange(frontend, header(15, 1, 0), header(15, 5, 8) + u64(OFFERED))
    frontend.send_bytes(header(16, 1, 8) + u64(OFFERED))
    await exchange(frontend, header(17, 1, 0), header(17, 5, 8) + u64(4))
    await exchange(frontend, header(36, 1, 0), header(36, 5, 8) + u64(64))
    frontend.channel, theirs = socket.socketpair()
    frontend.channel.setblocking(False)
    with theirs:
        await exchange(frontend, header(21, 9, 0), header(21, 5, 8) + u64(0), (theirs.fileno(),))
    frontend.send_bytes(header(3, 1, 0))
    await exchange(frontend, header(1, 1, 0), header(1, 5, 8) + u64(FEATURES | BIT_30 | LOG_ALL))
    for index in range(4):
        frontend.eventfds(index)
        frontend.send_bytes(header(13, 1, 8) + u64(index), (frontend.calls[index],))
        frontend.send_bytes(header(14, 1, 8) + u64(index), (frontend.kicks[index],))


async def qemu_starts_the_driver(frontend: Any, bases: tuple[int, int] = (0, 0)) -> None:
    access = struct.pack("=III", 0, 12, 0)
    await exchange(
        frontend,
        header(24, 1, 24) + access + bytes(12),
        header(24, 5, 24) + access + bytes(range(12)),
    )
    frontend.send_bytes(header(2, 1, 8) + u64(FEATURES | BIT_30))
    await exchange(frontend, header(40, 1, 0), header(40, 5, 8) + u64(0))
    frontend.send_bytes(header(39, 1, 8) + u64(0xB))
    region = struct.pack("=QQQQQ", 0, 0, frontend.region.size, frontend.region.user_address, 4096)
    await exchange(
        frontend, header(37, 9, 40) + region, header(37, 5, 8) + u64(0), (frontend.memfd,)
    )
    for index, base in enumerate(bases):
        frontend.send_bytes(header(8, 1, 8) + struct.pack("=II", index, 64))
        frontend.send_bytes(header(10, 1, 8) + struct.pack("=II", index, base))
        address = frontend.ring(index) if base == 0 else frontend.addresses[index]
        frontend.addresses[index] = address
        frontend.send_bytes(header(9, 1, 40) + address.pack())
        frontend.send_bytes(header(12, 1, 8) + u64(index), (frontend.kicks[index],))
        frontend.send_bytes(header(13, 1, 8) + u64(index), (frontend.calls[index],))
    # All queues of the device, also those that the driver did not set up.
    for index in range(4):
        frontend.send_bytes(header(18, 1, 8) + struct.pack("=II", index, 1))
        frontend.send_bytes(header(13, 1, 8) + u64(index), (frontend.calls[index],))
    frontend.send_bytes(header(39, 1, 8) + u64(0xF))
    await exchange(frontend, header(40, 1, 0), header(40, 5, 8) + u64(0xF))


async def qemu_stops(frontend: Any, bases: tuple[int, int]) -> None:
    for index in range(4):
        frontend.send_bytes(header(18, 1, 8) + struct.pack("=II", index, 0))
    for index, base in enumerate(bases):
        await exchange(
            frontend,
            header(11, 1, 8) + struct.pack("=II", index, 0),
            header(11, 5, 8) + struct.pack("=II", index, base),
        )
    region = struct.pack("=QQQQQ", 0, 0, frontend.region.size, frontend.region.user_address, 0)
    await exchange(frontend, header(38, 9, 40) + region, header(38, 5, 8) + u64(0))
    frontend.send_bytes(header(39, 1, 8) + u64(0))


async def test_qemu_runs_pauses_and_goes_on(frontend: Any, device: Any) -> None:
    frontend.addresses = {}
    await qemu_starts(frontend)
    await qemu_starts_the_driver(frontend)
    assert await frontend.echo(0, b"one")
    assert await frontend.echo(1, b"two")
    assert await frontend.echo(1, b"three")
    assert os.eventfd_read(frontend.calls[1]) >= 1
    await qemu_stops(frontend, (1, 2))
    # What the guest made available before it was paused is served when it goes on, with no kick.
    frontend.put(1, b"while paused")
    before = len(device.told)
    await qemu_starts_the_driver(frontend, (1, 2))
    assert await frontend.used(1) == [12]
    assert frontend.echoed(b"while paused")
    assert ("reset",) not in device.told
    assert ("start", 1, 2) in device.told[before:]
    await qemu_stops(frontend, (1, 3))
    await exchange(frontend, header(40, 1, 0), header(40, 5, 8) + u64(0))


# --- coming and going -----------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 5, 12], ids=["whole", "in-header", "at-payload"])
@pytest.mark.parametrize("steps", range(9))
async def test_a_frontend_may_leave_at_any_point(
    steps: int,
    cut: int,
    backend: VhostUserBackend,
    connect: Callable[[], Any],
    device: Any,
) -> None:
    events: list[str] = []
    backend.on_peer = events.append
    before = held()
    first = connect()
    await first.ask(Request.GET_FEATURES)
    kick, call = first.eventfds(0)
    script: list[tuple[bytes, tuple[int, ...]]] = [
        (request(Request.SET_PROTOCOL_FEATURES, U64(OFFERED)), ()),
        (request(Request.SET_FEATURES, U64(FEATURES | BIT_30)), ()),
        (request(Request.SET_MEM_TABLE, MemoryTable((first.region,))), (first.memfd,)),
        (request(Request.SET_VRING_NUM, VringState(0, 64)), ()),
        (request(Request.SET_VRING_ADDR, first.ring(0)), ()),
        (request(Request.SET_VRING_KICK, VringDescriptor(0)), (kick,)),
        (request(Request.SET_VRING_CALL, VringDescriptor(0)), (call,)),
        (request(Request.SET_VRING_ENABLE, VringState(0, 1)), ()),
        (request(Request.SET_VRING_ERR, VringDescriptor(0)), (call,)),
    ]
    for data, fds in script[:steps]:
        first.send_bytes(data, fds)
    if cut:
        data, fds = script[steps]
        first.send_bytes(data[:cut], fds)
    first.memory = first.drivers = None
    first.close()
    await until(lambda: events == ["connected", "gone"])
    assert not device.running
    assert held() == before
    second = connect()
    await second.negotiate(OFFERED)
    await second.set_up(0)
    assert await second.echo(0, b"still there")


async def test_the_next_frontend_waits_for_the_first_to_go(
    backend: VhostUserBackend, connect: Callable[[], Any]
) -> None:
    first, second = connect(), connect()
    await first.ask(Request.GET_FEATURES)
    second.send(Request.GET_FEATURES)
    await turns()
    await first.ask(Request.GET_FEATURES)
    first.close()
    assert (await second.receive()).decode_reply(U64).value == FEATURES | BIT_30 | LOG_ALL


async def test_stopping_stops_the_queues_and_removes_the_socket(
    path: Path, device: Any, connect: Callable[[], Any]
) -> None:
    before = held().descriptors
    backend = VhostUserBackend(device, str(path))
    await backend.start()
    with pytest.raises(LocalProtocolError):
        await backend.start()
    frontend = connect()
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    await backend.aclose()
    await backend.aclose()
    assert device.told[-1] == ("stop", 0, 0)
    assert not path.exists()
    assert await frontend.is_sent_away()
    assert device.on_config_change is None
    frontend.close()
    assert held().descriptors == before


async def test_sockets_that_cannot_be_made_are_named(path: Path, device: Any) -> None:
    path.write_text("precious")
    with pytest.raises(ResourceError, match=rf"{path}: exists and is not a socket"):
        await VhostUserBackend(device, str(path)).start()
    assert path.read_text() == "precious"
    assert device.on_config_change is None
    with pytest.raises(ResourceError, match="107 at most"):
        await VhostUserBackend(device, "x" * 108, listen=False).start()


def test_more_queues_than_the_protocol_can_name(path: Path, device: Any) -> None:
    device.num_queues = 257
    with pytest.raises(ConfigError, match="257 queues, vhost-user allows 256"):
        VhostUserBackend(device, str(path))


async def test_connecting_to_a_frontend_that_listens(
    path: Path,
    device: Any,
    clock: LoopClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    backend = VhostUserBackend(device, str(path), listen=False)
    await backend.start()
    said = "no frontend yet: No such file or directory"
    await until(lambda: said in caplog.text)
    for _ in range(5):  # attempts more, of which nothing is said
        await clock.forward(door.RETRY_INTERVAL)
    assert caplog.text.count(said) == 1
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        for _ in range(2):
            await clock.forward(door.RETRY_INTERVAL)
            async with asyncio.timeout(DEADLINE):
                sock, _ = await loop.sock_accept(listener)
                with sock:
                    await loop.sock_sendall(sock, header(1, 1, 0))
                    assert (await loop.sock_recv(sock, 100))[:12] == header(1, 5, 8)
        await backend.aclose()
    assert path.exists()


async def test_frontends_that_come_and_go_do_not_fill_the_log(
    backend: VhostUserBackend, connect: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gone = []
    backend.on_peer = gone.append
    for number in range(1, 101):
        frontend = connect()
        frontend.sock.send(header(99, 1, 0))
        await until(lambda n=number: gone.count("gone") == n)
        frontend.close()
    assert len(caplog.records) < 70


async def test_connecting_goes_on_after_a_lack_of_descriptors(
    path: Path, device: Any, clock: LoopClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    backend = VhostUserBackend(device, str(path), listen=False)
    await backend.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        for _ in range(3):
            await clock.forward(door.RETRY_INTERVAL)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await clock.forward(door.RETRY_INTERVAL)
    await until(lambda: caplog.text.count("no frontend yet: No such file or directory") == 2)
    await backend.aclose()
    assert caplog.text.count("no frontend yet: Too many open files") == 1


async def test_a_frontend_that_reads_no_replies_is_not_read_from(
    frontend: Any, backend: VhostUserBackend
) -> None:
    loop = asyncio.get_running_loop()
    many = header(1, 1, 0) * 1000
    sent = 0
    while sent < 100_000:
        sending = asyncio.ensure_future(loop.sock_sendall(frontend.sock, many))
        await turns(100)  # far more than it takes to handle so many
        if not sending.done():
            break
        sent += 1000
    assert sent < 100_000
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    # It is served again once it reads.
    replies = 0
    while replies < sent * 20:
        replies += len(await loop.sock_recv(frontend.sock, 1 << 16))
    assert backend is not None


async def test_a_configuration_space_of_any_size_is_echoed_exactly(frontend: Any) -> None:
    for offset, size in ((0, 12), (0, 8), (4, 2), (8, 100), (4000, 256), (0, 0)):
        answer = await frontend.ask(Request.GET_CONFIG, ConfigAccess(offset, bytes(size), 1))
        got = answer.decode_reply(ConfigAccess)
        assert (got.offset, got.flags, len(got.data)) == (offset, 1, size)
        assert got.data == bytes(range(12))[offset : offset + size].ljust(size, b"\0")
