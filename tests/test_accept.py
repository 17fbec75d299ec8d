"""Listeners of a process that has no descriptors left: all of them, through the one piece."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.support.chardevs import User
from tests.support.waiting import LoopClock, until, until_logged
from vring_serial import SpiceOptions, accept
from vring_serial.accept import Acceptor
from vring_serial.chardev.protocol import SpicevmcOptions
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.cli.agent_end import AgentEnds
from vring_serial.config.topology import ChardevConfig, PortConfig
from vring_serial.transport.door import RETRY_INTERVAL, SETTLED_SECONDS, Door
from vring_serial.unix_socket import UnixListener

DEADLINE = 20.0
Limited = Callable[[], AbstractContextManager[None]]


@contextlib.asynccontextmanager
async def a_door(path: Path) -> AsyncIterator[asyncio.Event]:
    came = asyncio.Event()
    door = Door(
        str(path),
        name="test",
        peer="client",
        on_silent=lambda: None,
        on_connected=lambda sock: (sock.close(), came.set()),
    )
    door.open()
    yield came
    door.close()


@contextlib.asynccontextmanager
async def a_chardev(path: Path) -> AsyncIterator[asyncio.Event]:
    chardev = SocketChardev("a", SocketOptions(path=str(path), server=True, wait=False))
    user = User()
    chardev.attach(user)
    await chardev.start()
    yield user.opened
    await chardev.aclose()


@contextlib.asynccontextmanager
async def looked_for(condition: Callable[[], object]) -> AsyncIterator[asyncio.Event]:
    """An event that is set when the condition is seen to hold."""
    came = asyncio.Event()

    async def look() -> None:
        await until(condition)
        came.set()

    looking = asyncio.ensure_future(look())
    yield came
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)


@contextlib.asynccontextmanager
async def an_agent_socket(path: Path) -> AsyncIterator[asyncio.Event]:
    agents = AgentEnds(str(path))
    agents.factory(PortConfig(1, "x", ChardevConfig("spicevmc", "a", SpicevmcOptions())))
    agents.start()
    (router,) = agents.routers
    async with looked_for(lambda: router.clients) as came:
        yield came
    await agents.aclose()


@contextlib.asynccontextmanager
async def a_spice_server(path: Path) -> AsyncIterator[asyncio.Event]:
    from vring_serial.spice.server import SpiceServer

    server = SpiceServer(SpiceOptions(unix=True, addr=str(path), disable_ticketing=True))
    await server.start()
    async with looked_for(lambda: server.unauthenticated) as came:
        yield came
    await server.aclose()


LISTENERS = [
    pytest.param(a_door, id="door"),
    pytest.param(a_chardev, id="chardev"),
    pytest.param(an_agent_socket, id="agent-socket"),
    pytest.param(a_spice_server, id="spice", marks=pytest.mark.peer("libspice-server.so.1")),
]
Listening = Callable[[Path], AbstractAsyncContextManager[asyncio.Event]]


@pytest.mark.parametrize("listening", LISTENERS)
async def test_it_is_said_once_and_tried_ever_less_often(
    listening: Listening,
    tmp_path: Path,
    out_of_descriptors: Limited,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(accept, "PAUSE", 0.005)
    monkeypatch.setattr(accept, "PAUSE_MOST", 0.05)
    caplog.set_level(logging.INFO, "vring_serial")
    pauses: list[float] = []
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def counted(delay: float, callback: Callable[..., object], *args: Any) -> object:
        if getattr(callback, "__func__", None) is Acceptor.resume:
            pauses.append(delay)
        return call_later(delay, callback, *args)

    monkeypatch.setattr(loop, "call_later", counted)
    path = tmp_path / "s"
    async with listening(path) as came:
        with socket.socket(socket.AF_UNIX) as client:
            with out_of_descriptors():
                client.connect(str(path))
                await until(lambda: len(pauses) >= 8)
            assert not came.is_set()
            async with asyncio.timeout(DEADLINE):
                await came.wait()
    assert pauses[:4] == [0.005, 0.01, 0.02, 0.04]
    assert set(pauses[4:]) == {0.05}
    lines = [r.getMessage() for r in caplog.records if "cannot accept" in r.getMessage()]
    assert len(lines) == 1
    assert "cannot accept a client: Too many open files" in lines[0]
    assert "accepts a client again" in caplog.text


@pytest.mark.parametrize("listening", LISTENERS)
async def test_when_a_peer_leaves_those_who_wait_come_in_at_once(
    listening: Listening,
    tmp_path: Path,
    out_of_descriptors: Limited,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(accept, "PAUSE", 3600.0)
    other = SocketChardev("other", SocketOptions(path=str(tmp_path / "o"), server=True, wait=False))
    user = User()
    other.attach(user)
    await other.start()
    path = tmp_path / "s"
    async with listening(path) as came, asyncio.timeout(DEADLINE):
        with socket.socket(socket.AF_UNIX) as client:
            with socket.socket(socket.AF_UNIX) as first:
                first.connect(str(tmp_path / "o"))
                await user.opened.wait()
                with out_of_descriptors():
                    client.connect(str(path))
                    await until_logged(caplog, "cannot accept")
            await came.wait()
    await other.aclose()


@pytest.mark.peer("libspice-server.so.1")
async def test_a_leaving_spice_client_lets_others_in(
    tmp_path: Path,
    out_of_descriptors: Limited,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(accept, "PAUSE", 3600.0)
    path = tmp_path / "s"
    async with (
        a_spice_server(path) as spice,
        a_door(tmp_path / "d") as came,
        asyncio.timeout(DEADLINE),
    ):
        with socket.socket(socket.AF_UNIX) as client:
            with socket.socket(socket.AF_UNIX) as first:
                first.connect(str(path))
                await spice.wait()
                with out_of_descriptors():
                    client.connect(str(tmp_path / "d"))
                    await until_logged(caplog, "cannot accept")
            await came.wait()


async def test_who_admits_anybody_leaves_what_frontends_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(accept, "PAUSE", 3600.0)
    clients: list[socket.socket] = []
    frontends: list[socket.socket] = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    door = Door(
        str(tmp_path / "d"),
        name="d",
        peer="frontend",
        on_silent=lambda: None,
        on_connected=frontends.append,
        descriptors=40,
    )
    door.open()
    listener = UnixListener(str(tmp_path / "s"), backlog=100)
    acceptor = Acceptor(clients.append, name="s", peer="client", yields=True)
    acceptor.open([listener.socket])
    outside = [socket.socket(socket.AF_UNIX) for _ in range(60)]
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 60, limits[1]))
    try:
        async with asyncio.timeout(DEADLINE):
            for sock in outside[:-1]:
                sock.connect(str(tmp_path / "s"))
            await until_logged(caplog, "kept for frontends")
            outside[-1].connect(str(tmp_path / "d"))
            await until(lambda: frontends)
        assert len(clients) == 20
        theirs = [os.dup(0) for _ in range(39)]
        for fd in theirs:
            os.close(fd)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        acceptor.close()
        listener.close()
        door.close()
        for sock in (*outside, *clients, *frontends):
            sock.close()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("oops")], ids=type
)
async def test_a_door_whose_session_does_not_start_opens_again(
    tmp_path: Path,
    clock: LoopClock,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    came = asyncio.Event()

    def serve(sock: socket.socket) -> None:
        if not came.is_set():
            came.set()
            raise error
        sock.send(b"served")
        sock.close()

    door = Door(
        str(tmp_path / "d"),
        name="test",
        peer="frontend",
        on_silent=lambda: None,
        on_connected=serve,
    )
    door.open()
    async with asyncio.timeout(DEADLINE):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "d")
        assert await reader.read() == b""
        writer.close()
        reader, writer = await asyncio.open_unix_connection(tmp_path / "d")
        await clock.forward(accept.PAUSE)
        assert await reader.read() == b"served"
        writer.close()
    door.close()
    assert "test: cannot accept a frontend: " in caplog.text
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def test_a_door_that_connects_goes_on_after_a_session_that_does_not_start(
    tmp_path: Path, clock: LoopClock
) -> None:
    calls: list[socket.socket] = []

    def serve(sock: socket.socket) -> None:
        calls.append(sock)
        if len(calls) < 3:
            raise OSError(errno.EMFILE, "Too many open files")

    listener = UnixListener(str(tmp_path / "d"))
    door = Door(
        str(tmp_path / "d"),
        name="test",
        peer="frontend",
        on_silent=lambda: None,
        listen=False,
        on_connected=serve,
    )
    door.open()
    for count in (1, 2):
        await until(lambda count=count: len(calls) == count)
        await clock.forward(RETRY_INTERVAL)
    await until(lambda: len(calls) == 3)
    assert [sock.fileno() < 0 for sock in calls] == [True, True, False]
    calls[2].close()
    door.close()
    listener.close()


async def test_one_connection_that_is_lost_is_no_reason_to_pause(tmp_path: Path) -> None:
    lost = [errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN]
    taken: list[socket.socket] = []
    done = asyncio.Event()

    def take(listening: socket.socket) -> None:
        if lost:
            raise OSError(lost.pop(), "lost")
        taken.append(listening.accept()[0])
        done.set()

    listener = UnixListener(str(tmp_path / "s"))
    acceptor = Acceptor(name="s", peer="client", take=take)
    acceptor.open([listener.socket])
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        async with asyncio.timeout(DEADLINE):
            await done.wait()
    acceptor.close()
    listener.close()
    taken[0].close()


async def test_a_frontend_that_has_settled_needs_no_reserve(
    tmp_path: Path, clock: LoopClock
) -> None:
    came: list[socket.socket] = []
    door = Door(
        str(tmp_path / "d"),
        name="d",
        peer="frontend",
        on_silent=lambda: None,
        on_connected=came.append,
        descriptors=40,
    )
    door.open()
    assert accept.reserved() == 40
    with socket.socket(socket.AF_UNIX) as frontend:
        frontend.connect(str(tmp_path / "d"))
        async with asyncio.timeout(DEADLINE):
            await until(lambda: came)
        assert accept.reserved() == 40
        await clock.forward(SETTLED_SECONDS)
        assert not accept.reserved()
    came[0].close()
    door.gone()
    assert accept.reserved() == 40
    door.close()
    assert accept.reserved() == 0
