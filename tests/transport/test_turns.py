"""A frontend that sends many small messages leaves others their turns of the loop."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.support import waiting
from tests.support.waiting import DEADLINE
from vring_serial import turns
from vring_serial.proto.vhost_user import U64, ProtocolFeature, Request, request
from vring_serial.transport.vhost_user.session import READ_SIZE
from vring_serial.turns import Turn

FLOOD = READ_SIZE // 12


@asynccontextmanager
async def counted_turns() -> AsyncIterator[list[int]]:
    """How often somebody else's work had its turn."""
    loop = asyncio.get_running_loop()
    count = [0]

    def mine() -> None:
        nonlocal handle
        count[0] += 1
        handle = loop.call_soon(mine)

    handle = loop.call_soon(mine)
    yield count
    handle.cancel()


class Clock:
    """Goes on by a millisecond whenever somebody looks at it."""

    def __init__(self) -> None:
        self._ticks = itertools.count()

    def monotonic(self) -> float:
        return next(self._ticks) * 0.001


def test_a_turn_has_messages_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "SECONDS", 100)
    turn = Turn()
    assert sum(turn.another() for _ in range(1000)) == turns.MESSAGES
    monkeypatch.setattr(turns, "SECONDS", 0)
    turn = Turn()
    assert [turn.another(), turn.another()] == [True, False]


@pytest.mark.parametrize("slow", [False, True], ids=["many", "slow"])
async def test_a_flood_is_handled_in_many_turns(
    frontend: Any, device: Any, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await frontend.negotiate(int(ProtocolFeature.REPLY_ACK | ProtocolFeature.STATUS))
    if slow:
        monkeypatch.setattr(turns, "time", Clock())
    else:
        monkeypatch.setattr(turns, "SECONDS", 100)
    frontend.send_bytes(request(Request.GET_FEATURES) * FLOOD)
    loop = asyncio.get_running_loop()
    answers = b""
    async with counted_turns() as count, asyncio.timeout(DEADLINE):
        while len(answers) < FLOOD * 20:
            answers += await loop.sock_recv(frontend.sock, 1 << 16)
    assert len(answers) == FLOOD * 20
    assert count[0] >= FLOOD / (3 if slow else turns.MESSAGES)
    # In their order, and nothing is left.
    for status in (1, 3, 11, 15):
        frontend.send(Request.SET_STATUS, U64(status))
    assert await frontend.number(Request.GET_STATUS) == 15


async def test_a_frontend_that_leaves_in_the_middle(
    frontend: Any, device: Any, backend: Any, connect: Any
) -> None:
    """What it said before it left is done; what is cut off is not."""
    await frontend.negotiate(int(ProtocolFeature.REPLY_ACK | ProtocolFeature.STATUS))
    statuses = [status for _ in range(100) for status in (1, 3)]
    data = b"".join(request(Request.SET_STATUS, U64(status)) for status in statuses)
    assert len(data) <= READ_SIZE
    frontend.send_bytes(data)
    frontend.close()
    following = connect()
    assert await following.number(Request.GET_QUEUE_NUM) == 4
    assert [what[1] for what in device.told if what[0] == "status"] == statuses


async def test_a_backend_that_stops_in_the_middle(frontend: Any, backend: Any) -> None:
    frontend.send_bytes(request(Request.GET_FEATURES) * FLOOD)
    await waiting.turns(2)
    await backend.aclose()
    async with counted_turns() as count:
        await waiting.until(lambda: count[0] >= 10)
