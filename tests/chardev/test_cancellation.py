"""Whoever stops waiting for a chardev to start or stop leaves nothing open, and can begin anew."""

from __future__ import annotations

import asyncio
import inspect
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.support.chardev_kinds import Guest, Peer
from tests.support.leaks import held
from tests.support.waiting import turns, until
from vring_serial.chardev.base import Chardev
from vring_serial.chardev.log import LogOptions, OutputLog
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.errors import ResourceError


def test_start_and_stop_are_all_that_is_awaited() -> None:
    kinds = [Chardev]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
        names = {name for name, _ in inspect.getmembers(kind, inspect.iscoroutinefunction)}
        awaited = {name for name in names if not name.startswith("_")}
        assert awaited == {"start", "aclose", "start_with_log", "aclose_with_log"}
    assert len(kinds) > 8


async def after(count: int, task: asyncio.Future[Any]) -> None:
    """Cancel the task after so many turns of the loop."""
    await turns(count)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("count", range(5))
async def test_a_start_is_cancelled(peer: Peer, count: int, request: pytest.FixtureRequest) -> None:
    before = held()
    await after(count, asyncio.ensure_future(peer.chardev.start()))
    await peer.chardev.aclose()
    if "stdio" not in request.node.name:  # whose test exchanges the standard descriptors
        assert held() == before
    guest = Guest(peer.chardev)
    await peer.chardev.start()
    await peer.connect()
    await guest.opened()
    await peer.chardev.aclose()


@pytest.mark.parametrize("count", range(5))
async def test_a_stop_is_cancelled(peer: Peer, count: int) -> None:
    guest = Guest(peer.chardev)
    await peer.chardev.start()
    await peer.connect()
    await guest.opened()
    await after(count, asyncio.ensure_future(peer.chardev.aclose()))
    if count:
        assert peer.chardev.end is None
        assert guest.events[-1] == "closed"
    await peer.chardev.aclose()
    assert peer.chardev.end is None


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("what", ["start_with_log", "aclose_with_log"])
async def test_a_log_ends_with_its_chardev(tmp_path: Path, count: int, what: str) -> None:
    before = held()
    chardev = SocketChardev("c", SocketOptions(path=str(tmp_path / "c"), server=True, wait=False))
    chardev.log = OutputLog("c", LogOptions(logfile=str(tmp_path / "log")))
    if what == "aclose_with_log":
        await chardev.start_with_log()
    await after(count, asyncio.ensure_future(getattr(chardev, what)()))
    await chardev.aclose_with_log()
    await until(lambda: held() == before)  # its thread ends by itself
    await chardev.start_with_log()
    await chardev.aclose_with_log()
    assert held() == before


def options(kind: str, path: Path) -> SocketOptions:
    match kind:
        case "waiting for a client":
            return SocketOptions(path=str(path), server=True, wait=True)
        case "waiting its turn":
            return SocketOptions(path=str(path))
        case _:
            return SocketOptions(path=str(path), reconnect=5)


@pytest.mark.parametrize("what", ["start", "aclose"])
@pytest.mark.parametrize(
    "kind", ["waiting for a client", "waiting its turn", "connecting again and again"]
)
async def test_a_socket_that_waits_for_its_peer(tmp_path: Path, kind: str, what: str) -> None:
    path = tmp_path / "peer.sock"
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as first:
        if kind == "waiting its turn":
            full.bind(str(path))
            full.listen(0)
            first.connect(str(path))
        before = held()
        chardev = SocketChardev("c", options(kind, path))
        starting = asyncio.ensure_future(chardev.start())
        await turns(10)
        if what == "start":
            await after(0, starting)
            await chardev.aclose()
        else:
            # A stop that is cancelled at once has closed everything all the same.
            await after(1, asyncio.ensure_future(chardev.aclose()))
            for result in await asyncio.gather(starting, return_exceptions=True):
                assert result is None or isinstance(result, ResourceError)
        assert held() == before
        assert path.exists() == (kind == "waiting its turn")
