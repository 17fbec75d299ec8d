"""The frontend against backends that answer as told."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.leaks import held
from tests.support.waiting import LoopClock, turns, until
from vring_serial.errors import ResourceError
from vring_serial.guest.errors import (
    BackendClosedError,
    BackendError,
    BackendRefusedError,
    BackendTimeoutError,
)
from vring_serial.guest.frontend import Frontend
from vring_serial.guest.memory import GuestRam
from vring_serial.proto import vhost_user as vu


@pytest.fixture
async def frontend(scripted) -> AsyncIterator[Frontend]:
    frontend = Frontend(scripted.path, timeout=30)
    await frontend.connect()
    await until(lambda: scripted.accepted)
    yield frontend
    frontend.close()


async def test_negotiates_in_the_order_of_linux(scripted, frontend: Frontend) -> None:
    await frontend.negotiate_protocol()
    assert scripted.backend.requests == [
        "SET_OWNER",
        "GET_FEATURES",
        "GET_PROTOCOL_FEATURES",
        "SET_PROTOCOL_FEATURES",
        "GET_QUEUE_NUM",
        "SET_BACKEND_REQ_FD",
    ]
    assert frontend.max_queues == 64
    assert not frontend.offered >> 30 & 1


async def test_uses_nothing_that_is_not_offered(scripted, frontend: Frontend) -> None:
    scripted.backend.features &= ~(1 << 30)
    ram = GuestRam(1 << 16)
    await frontend.negotiate_protocol()
    await frontend.set_status(1)
    assert await frontend.get_status() is None
    assert await frontend.read_config(0, 8) is None
    await frontend.set_features(1 << 32)
    await frontend.set_memory(ram)
    await frontend.enable_queues([0, 1])
    await frontend.reset()
    # A request that is not acknowledged is known to have arrived when a later one was answered.
    await frontend.ask(vu.Request.GET_FEATURES, vu.U64)
    backend = scripted.backend
    assert backend.requests == [
        "SET_OWNER", "GET_FEATURES", "SET_FEATURES", "SET_MEM_TABLE", "GET_FEATURES",
    ]  # fmt: skip
    assert backend.payloads[2] == vu.U64(1 << 32)
    ram.close()


async def test_never_acknowledges_protocol_features_it_does_not_know(
    scripted, frontend: Frontend
) -> None:
    scripted.backend.protocol_features = vu.ProtocolFeature((1 << 21) - 1) | 1 << 40
    await frontend.negotiate_protocol()
    (accepted,) = [
        payload
        for name, payload in zip(scripted.backend.requests, scripted.backend.payloads, strict=True)
        if name == "SET_PROTOCOL_FEATURES"
    ]
    assert isinstance(accepted, vu.U64)
    assert vu.ProtocolFeature.INBAND_NOTIFICATIONS not in vu.ProtocolFeature(accepted.value)
    assert accepted.value < 1 << 21


async def test_memory_in_one_table_or_in_slots(scripted, frontend: Frontend) -> None:
    await frontend.negotiate_protocol()
    ram = GuestRam(1 << 16)
    await frontend.set_memory(ram)
    table = scripted.backend.payloads[-1]
    assert table == vu.MemoryTable((vu.MemoryRegion(ram.guest_addr, ram.size, ram.user_addr),))
    frontend.protocol_features |= vu.ProtocolFeature.CONFIGURE_MEM_SLOTS
    await frontend.set_memory(ram)
    assert scripted.backend.requests[-2:] == ["GET_MAX_MEM_SLOTS", "ADD_MEM_REG"]
    assert scripted.backend.payloads[-1] == vu.SingleRegion(table.regions[0])
    scripted.backend.slots = 0
    with pytest.raises(BackendRefusedError, match="no memory"):
        await frontend.set_memory(ram)
    ram.close()


async def test_a_refusal_is_named_and_the_connection_goes_on(scripted, frontend: Frontend) -> None:
    await frontend.negotiate_protocol()
    scripted.backend.refuse.add(vu.Request.SET_FEATURES)
    with pytest.raises(BackendRefusedError, match="SET_FEATURES"):
        await frontend.set_features(1 << 32)
    assert await frontend.read_config(4, 4) == (4).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"\xff" * 64, "version"),
        (vu.request(vu.Request.GET_FEATURES), "a request"),
        (vu.reply(vu.Request.GET_FEATURES, vu.VringState(1)) + b"\0" * 4, None),
        (vu.reply(vu.Request.GET_FEATURES, vu.Empty()), "0 bytes instead of 8"),
        (vu.reply(vu.Request.GET_QUEUE_NUM, vu.U64(1)), "reply to GET_QUEUE_NUM"),
        (vu.reply(vu.Request.GET_FEATURES, vu.U64(0)) * 2, "nothing was expected"),
        (vu.Header(vu.Request.GET_FEATURES, 5, 1 << 31).pack(), "payload of 2147483648"),
    ],
    ids=["noise", "request", "rest", "empty", "other", "twice", "huge"],
)
async def test_garbage_is_a_named_error_and_the_end(
    scripted, frontend: Frontend, raw: bytes, why: str | None
) -> None:
    lost: list[Exception] = []
    frontend.on_closed = lost.append
    scripted.backend.script[vu.Request.GET_FEATURES] = raw
    if why is None:
        # 8 bytes are 8 bytes: what follows is an incomplete header, and only the end is an error.
        await frontend.ask(vu.Request.GET_FEATURES, vu.U64)
        return

    async def ask_twice() -> None:
        await frontend.ask(vu.Request.GET_FEATURES, vu.U64)
        await frontend.ask(vu.Request.GET_PROTOCOL_FEATURES, vu.U64)

    with pytest.raises(BackendError, match=why):
        await ask_twice()
    assert [type(error) for error in lost] == [BackendError]
    with pytest.raises(BackendError, match=why):
        await frontend.set_features(0)


async def test_replies_split_at_every_byte(scripted) -> None:
    reply = vu.reply(vu.Request.GET_FEATURES, vu.U64(0x1234))
    for cut in range(1, len(reply)):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            frontend = Frontend("pair", timeout=30)
            frontend.attach(ours)
            asking = asyncio.ensure_future(frontend.ask(vu.Request.GET_FEATURES, vu.U64))
            theirs.sendall(reply[:cut])
            await turns(3)
            theirs.sendall(reply[cut:])
            assert (await asking).value == 0x1234
            frontend.close()


async def test_silence_times_out(scripted, frontend: Frontend, clock: LoopClock) -> None:
    scripted.backend.script[vu.Request.GET_FEATURES] = None
    asking = asyncio.ensure_future(frontend.ask(vu.Request.GET_FEATURES, vu.U64))
    await turns()
    await clock.forward(30)
    with pytest.raises(BackendTimeoutError, match="did not answer GET_FEATURES in 30 s"):
        await asking
    with pytest.raises(BackendTimeoutError):
        await frontend.set_features(0)


async def test_a_backend_that_does_not_read_times_out() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        frontend = Frontend("pair", timeout=0.1)
        frontend.attach(ours)

        async def flood() -> None:
            while True:
                await frontend.set_features(0)

        with pytest.raises(BackendTimeoutError, match="did not read SET_FEATURES"):
            await flood()


async def test_a_backend_that_leaves_while_it_is_asked(scripted, frontend: Frontend) -> None:
    scripted.backend.script[vu.Request.GET_FEATURES] = None
    asking = asyncio.ensure_future(frontend.ask(vu.Request.GET_FEATURES, vu.U64))
    await until(lambda: "GET_FEATURES" in scripted.backend.requests)
    scripted.backend.close()
    with pytest.raises(BackendClosedError, match="closed the connection"):
        await asking


async def test_config_of_another_size_is_an_error(scripted, frontend: Frontend) -> None:
    await frontend.negotiate_protocol()
    scripted.backend.script[vu.Request.GET_CONFIG] = vu.reply(
        vu.Request.GET_CONFIG, vu.ConfigAccess(0, bytes(4))
    )
    with pytest.raises(BackendError, match="answered with 4 bytes"):
        await frontend.read_config(0, 8)


async def test_a_refused_config_is_an_error(scripted, frontend: Frontend) -> None:
    await frontend.negotiate_protocol()
    scripted.backend.script[vu.Request.GET_CONFIG] = vu.reply(
        vu.Request.GET_CONFIG, vu.ConfigAccess(0, b"")
    )
    with pytest.raises(BackendRefusedError, match="GET_CONFIG"):
        await frontend.read_config(0, 8)


async def test_the_backend_channel(scripted, frontend: Frontend) -> None:
    changes: list[None] = []
    frontend.on_config_change = lambda: changes.append(None)
    await frontend.negotiate_protocol()
    loop = asyncio.get_running_loop()
    with socket.socket(fileno=os.dup(scripted.backend.fds["SET_BACKEND_REQ_FD"][0])) as channel:
        channel.setblocking(False)
        ask = vu.request(vu.BackendRequest.CONFIG_CHANGE_MSG, need_reply=True)
        refused = vu.request(vu.BackendRequest.VRING_ERR, vu.VringState(1), need_reply=True)
        unknown = vu.Header(999, 9, 0).pack()
        await loop.sock_sendall(channel, ask + refused + unknown)
        parser = vu.VhostUserParser(vu.BackendRequest, replies=True)
        answers: list[int] = []
        while len(answers) < 3:
            parser.receive_data(await loop.sock_recv(channel, 4096))
            while (message := parser.next_message()) is not None:
                answers.append(message.decode_reply(vu.U64).value)
        assert answers[0] == 0
        assert 0 not in answers[1:]
        assert len(changes) == 1
        await loop.sock_sendall(channel, b"\xff" * 12)
        await until(lambda: frontend.closed)
        assert "backend channel" in str(frontend.closed)


async def test_descriptors_with_replies_are_refused_and_closed(
    scripted, frontend: Frontend
) -> None:
    scripted.backend.script[vu.Request.GET_FEATURES] = None
    asking = asyncio.ensure_future(frontend.ask(vu.Request.GET_FEATURES, vu.U64))
    await until(lambda: "GET_FEATURES" in scripted.backend.requests)
    before = len(held().descriptors)
    await scripted.backend.channel.send(vu.reply(vu.Request.GET_FEATURES, vu.U64(0)), [0, 0])
    with pytest.raises(BackendError, match="2 descriptors"):
        await asking
    assert len(held().descriptors) == before - 1  # its socket: the connection is over
    frontend.close()


async def test_nobody_there(tmp_path: Path) -> None:
    frontend = Frontend(str(tmp_path / "no.sock"))
    with pytest.raises(ResourceError, match=r"no\.sock: cannot connect.*No such file"):
        await frontend.connect()
    (tmp_path / "dead.sock").touch()
    with pytest.raises(ResourceError, match="refused"):
        await Frontend(str(tmp_path / "dead.sock")).connect()
    with pytest.raises(ResourceError, match="too long"):
        await Frontend("x" * 200).connect()


async def test_no_descriptor_left_to_connect_with(scripted) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(ResourceError, match="cannot connect to the backend: Too many open"):
            await Frontend(scripted.path).connect()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_backend_that_dies_while_it_is_sent_to_is_told_once(tmp_path, caplog) -> None:
    """Nobody waits for the answer yet; its future must not be found unretrieved later."""
    gc.collect()  # not the futures of other tests
    caplog.clear()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    frontend = Frontend(str(tmp_path / "backend"), timeout=5)
    frontend.attach(ours)
    try:
        while True:
            ours.send(bytes(65536))
    except BlockingIOError:
        pass
    asking = asyncio.ensure_future(frontend.ask(vu.Request.GET_FEATURES, vu.U64))
    await turns()
    theirs.close()
    with pytest.raises(BackendClosedError):
        await asking
    del asking
    gc.collect()
    await turns(1)
    assert "never retrieved" not in caplog.text
