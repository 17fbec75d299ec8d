"""Peers that send descriptors which take for ever: to look at, to map, and to close."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.waiting import LoopClock, until
from vring_serial import unix_fds
from vring_serial.proto.vhost_user import (
    U64,
    MemoryRegion,
    MemoryTable,
    Payload,
    Request,
    SingleRegion,
    VringDescriptor,
)
from vring_serial.transport import closer, door
from vring_serial.transport.vhost_user.backend import PROTOCOL_FEATURES, VhostUserBackend

OFFERED = int(PROTOCOL_FEATURES)


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """A close that blocks ends the test run: nothing else could."""
    signal.alarm(60)
    yield
    signal.alarm(0)


REGION = MemoryRegion(4 << 20, 4096, 4 << 20, 0)

MESSAGES: dict[str, tuple[Request, Payload | None]] = {
    "kick": (Request.SET_VRING_KICK, VringDescriptor(1)),
    "call": (Request.SET_VRING_CALL, VringDescriptor(1)),
    "error": (Request.SET_VRING_ERR, VringDescriptor(1)),
    "channel": (Request.SET_BACKEND_REQ_FD, None),
    "table": (Request.SET_MEM_TABLE, MemoryTable((REGION,))),
    "region": (Request.ADD_MEM_REG, SingleRegion(REGION)),
    "log": (Request.SET_LOG_FD, None),
    "features": (Request.SET_FEATURES, U64(1)),
}


@pytest.mark.parametrize("which", ["fuse", "overlay"])
async def test_a_file_that_does_not_answer_holds_nobody_up(
    backend: VhostUserBackend, connect: Callable[[], Any], hostile_files: Any, which: str
) -> None:
    frontend = connect()
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    for kind, payload in MESSAGES.values():
        assert await frontend.acked(kind, payload, (getattr(hostile_files, which),)) != 0
        assert await frontend.echo(0, b"served all the same")
    assert not hostile_files.gone
    assert backend.unclosed == len(MESSAGES)
    # All of them are closed once the file system lets them.
    hostile_files.end()
    await until(lambda: not backend.unclosed)


async def test_peers_wait_while_too_much_cannot_be_closed(
    backend: VhostUserBackend,
    connect: Callable[[], Any],
    hostile_files: Any,
    clock: LoopClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(closer, "MOST", 4)
    frontend = connect()
    await frontend.negotiate(OFFERED)
    frontend.send(Request.SET_LOG_FD, None, (hostile_files.fuse,) * 5, need_reply=True)
    assert await frontend.is_sent_away()
    following = connect()
    following.send(Request.GET_FEATURES)
    for _ in range(3):
        await clock.forward(door.RETRY_INTERVAL)
    with pytest.raises(BlockingIOError):
        following.sock.recv(1, socket.MSG_PEEK)
    assert not hostile_files.gone
    hostile_files.end()
    assert (await following.receive()).name == "GET_FEATURES"
    lines = [record.getMessage() for record in caplog.records]
    assert sum("descriptors that it sent cannot" in line for line in lines) == 1
    assert sum("descriptors that the last one sent cannot" in line for line in lines) == 1


@pytest.mark.parametrize("count", [1, 9])
async def test_a_connection_that_lingers_in_a_message(
    backend: VhostUserBackend,
    connect: Callable[[], Any],
    lingering: Callable[[], int],
    count: int,
) -> None:
    """A message with descriptors that it should not have; none is closed in our thread."""
    frontend = connect()
    await frontend.negotiate(OFFERED)
    fds = tuple(lingering() for _ in range(count))
    frontend.send(Request.SET_LOG_FD, None, fds, need_reply=True)
    unix_fds.close_all(fds)
    assert (await frontend.receive()).decode_reply(U64).value != 0
    assert backend.unclosed
    assert await frontend.number(Request.GET_QUEUE_NUM) == 4


@pytest.mark.parametrize("how", ["call", "error", "base", "status", "gone"])
async def test_a_connection_that_lingers_in_a_call_socket(
    backend: VhostUserBackend, connect: Callable[[], Any], lingering: Callable[[], int], how: str
) -> None:
    frontend = connect()
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    kind = Request.SET_VRING_ERR if how == "error" else Request.SET_VRING_CALL
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert await frontend.acked(kind, VringDescriptor(0), (theirs.fileno(),)) == 0
        fd = lingering()
        unix_fds.send(ours, b"x", [fd])
        os.close(fd)
    if how in ("call", "error"):
        assert await frontend.acked(kind, VringDescriptor(0), (frontend.calls[0],)) == 0
    elif how == "base":
        await frontend.base(0)
    elif how == "status":
        assert await frontend.acked(Request.SET_STATUS, U64(0)) == 0
    else:
        await backend.aclose()
    assert backend.unclosed == 1


async def test_a_connection_that_lingers_in_a_socket_that_is_closed(
    backend: VhostUserBackend, connect: Callable[[], Any], lingering: Callable[[], int]
) -> None:
    """Nobody has read it: it goes with the socket that it was sent to."""
    frontend = connect()
    await frontend.negotiate(OFFERED)
    await frontend.open_channel()
    for sock in (frontend.channel, frontend.sock):
        fd = lingering()
        unix_fds.send(sock, b"x", [fd])
        os.close(fd)
    await backend.aclose()
    assert backend.unclosed
