"""Frontends that cut off the memory they share, at any moment: they go, the device stays."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.leaks import held
from tests.support.waiting import until
from vring_serial.proto.vhost_user import Request, SingleRegion
from vring_serial.transport.vhost_user.backend import VhostUserBackend

MEMORY_SIZE = 1 << 20


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Lines of warning and above."""
    caplog.set_level(logging.INFO)
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


async def start(connect: Callable[[], Any]) -> Any:
    frontend = connect()
    await frontend.negotiate(await frontend.number(Request.GET_PROTOCOL_FEATURES))
    await frontend.set_up(0)
    assert await frontend.echo(0, b"all is there")
    return frontend


@pytest.mark.parametrize("left", [0, 4096 + 0x10000, 4096 + 0x80000])
async def test_the_frontend_is_sent_away_and_the_next_is_served(
    backend: VhostUserBackend,
    connect: Callable[[], Any],
    log: Callable[[], list[str]],
    left: int,
) -> None:
    """Nothing left, no ring left, no buffers left."""
    before = held().descriptors
    frontend = await start(connect)
    frontend.put(0, b"before it is cut off")
    os.ftruncate(frontend.memfd, left)
    frontend.kick(0)
    assert await frontend.is_sent_away()
    (line,) = log()
    assert "its memory at guest address 0x0, 0x100000 bytes, is gone" in line
    assert "connection closed" in line
    frontend.close()
    following = await start(connect)
    following.close()
    await until(lambda: held().descriptors == before, "something stays open")


async def test_what_the_frontend_took_back_may_be_cut_off(
    backend: VhostUserBackend, connect: Callable[[], Any], log: Callable[[], list[str]]
) -> None:
    frontend = await start(connect)
    extra = os.memfd_create("extra")
    try:
        os.ftruncate(extra, 4096)
        added = SingleRegion(type(frontend.region)(1 << 32, 4096, 1 << 40, 0))
        assert await frontend.acked(Request.ADD_MEM_REG, added, (extra,)) == 0
        assert await frontend.acked(Request.REM_MEM_REG, added) == 0
        os.ftruncate(extra, 0)
    finally:
        os.close(extra)
    assert await frontend.echo(0, b"still there")
    assert log() == []


async def test_an_unused_region_that_is_cut_off_is_not_missed(
    backend: VhostUserBackend, connect: Callable[[], Any], log: Callable[[], list[str]]
) -> None:
    frontend = await start(connect)
    os.ftruncate(frontend.memfd, 4096 + MEMORY_SIZE - 4096)
    assert await frontend.echo(0, b"still there")
    assert log() == []


async def test_the_backend_can_be_stopped_and_started(
    backend: VhostUserBackend, connect: Callable[[], Any]
) -> None:
    frontend = await start(connect)
    os.ftruncate(frontend.memfd, 0)
    frontend.kick(0)
    await backend.aclose()
    await backend.start()
    await start(connect)
