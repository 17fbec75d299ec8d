"""A frontend that says nothing keeps nobody out; one that is alone may take its time."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.waiting import LoopClock, turns
from vring_serial.proto.vhost_user import Request, VringState, request
from vring_serial.transport import door
from vring_serial.transport.vhost_user.backend import PROTOCOL_FEATURES, VhostUserBackend

OFFERED = int(PROTOCOL_FEATURES)


@pytest.mark.parametrize(
    "words",
    [
        b"",
        b"\1",
        request(Request.SET_OWNER)[:-1],
        request(Request.GET_FEATURES),
        request(Request.SET_VRING_BASE, VringState(0, 0)),
    ],
    ids=["nothing", "a byte", "a broken message", "a question", "another message"],
)
async def test_the_next_one_gets_in(
    backend: VhostUserBackend,
    connect: Callable[[], Any],
    words: bytes,
    clock: LoopClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second, third = connect(), connect(), connect()
    first.send_bytes(words)
    second.send(Request.GET_QUEUE_NUM)
    await turns()
    await clock.forward(door.HANDSHAKE_SECONDS)
    assert (await second.receive()).name == "GET_QUEUE_NUM"
    if words != request(Request.GET_FEATURES):
        assert await first.is_sent_away()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no first words in" in caplog.text
    # The second has asked and no more, and the third is served as well.
    await clock.forward(door.HANDSHAKE_SECONDS)
    await third.negotiate(OFFERED)
    await third.set_up(0)
    assert await third.echo(0, b"served")


async def test_one_who_has_begun_stays(
    backend: VhostUserBackend, connect: Callable[[], Any], clock: LoopClock
) -> None:
    for greeting in (Request.SET_OWNER, None):
        first = connect()
        if greeting is None:
            await first.negotiate(OFFERED)
        else:
            first.send(greeting)
        second = connect()
        second.send(Request.GET_QUEUE_NUM)
        await turns()
        await clock.forward(door.HANDSHAKE_SECONDS)
        assert await first.number(Request.GET_QUEUE_NUM) == 4
        with pytest.raises(BlockingIOError):
            second.sock.recv(1, socket.MSG_PEEK)
        first.close()
        assert (await second.receive()).name == "GET_QUEUE_NUM"
        second.close()


async def test_one_who_is_alone_may_take_its_time(
    backend: VhostUserBackend, connect: Callable[[], Any], clock: LoopClock
) -> None:
    """QEMU's chardev connects when it is made, and a device may be plugged much later."""
    first = connect()
    await turns()
    await clock.forward(2 * door.HANDSHAKE_SECONDS)
    await first.negotiate(OFFERED)
    second = connect()
    await clock.forward(2 * door.HANDSHAKE_SECONDS)
    await first.set_up(0)
    assert await first.echo(0, b"served")
    first.close()
    await second.negotiate(OFFERED)


async def test_stopping_while_one_says_nothing(
    backend: VhostUserBackend, connect: Callable[[], Any], clock: LoopClock
) -> None:
    first, second = connect(), connect()
    await turns()
    await backend.aclose()
    for frontend in (first, second):
        assert await frontend.is_sent_away()
    await backend.start()
    await clock.forward(door.HANDSHAKE_SECONDS)
    assert await connect().number(Request.GET_QUEUE_NUM) == 4
