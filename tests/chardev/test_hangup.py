"""The watch for peers that leave: it does not wake for bytes, and forgets what it is told to."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.support.waiting import LoopClock, turns
from vring_serial.chardev.hangup import RECHECK_SECONDS, HangupWatch, is_leaving, unread

pytestmark = pytest.mark.usefixtures("no_leak")


async def test_bytes_do_not_wake_it_and_a_hangup_does_once() -> None:
    gone: list[int] = []
    watch = HangupWatch(gone.append)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        watch.watch(ours.fileno())
        theirs.send(b"unread")
        await turns()
        assert gone == []
        assert ours.recv(6) == b"unread"
        theirs.shutdown(socket.SHUT_WR)
        await turns()
        assert gone == [ours.fileno()]
        theirs.close()
        await turns()
        assert gone == [ours.fileno()]
    watch.close()


async def test_a_peer_that_left_before_the_watch_began() -> None:
    gone: list[int] = []
    watch = HangupWatch(gone.append)
    ours, theirs = socket.socketpair()
    theirs.close()
    watch.watch(ours.fileno())
    await turns()
    assert gone == [ours.fileno()]
    ours.close()
    watch.close()


async def test_what_is_unwatched_is_not_told() -> None:
    gone: list[int] = []
    watch = HangupWatch(gone.append)
    ours, theirs = socket.socketpair()
    watch.watch(ours.fileno())
    theirs.close()
    watch.unwatch(ours.fileno())
    watch.unwatch(ours.fileno())
    await turns()
    assert gone == []
    ours.close()
    watch.close()


async def test_one_callback_may_end_the_watch_of_another() -> None:
    gone: list[int] = []
    pairs = [socket.socketpair() for _ in range(2)]

    def end_all(fd: int) -> None:
        gone.append(fd)
        for ours, _ in pairs:
            watch.unwatch(ours.fileno())

    watch = HangupWatch(end_all)
    for ours, theirs in pairs:
        watch.watch(ours.fileno())
        theirs.close()
    await turns()
    assert len(gone) == 1
    for ours, _ in pairs:
        ours.close()
    watch.close()


async def test_a_callback_may_close_the_watch(clock: LoopClock) -> None:
    gone: list[int] = []

    def close(fd: int) -> None:
        gone.append(fd)
        watch.close()

    watch = HangupWatch(close)
    pairs = [socket.socketpair() for _ in range(3)]
    pairs[1][1].send(b"unread")
    for ours, theirs in pairs:
        watch.watch(ours.fileno())
        theirs.close()
    await turns()
    assert gone == [pairs[0][0].fileno()]
    pairs[1][0].recv(6)
    await clock.forward(RECHECK_SECONDS)
    assert gone == [pairs[0][0].fileno()]
    watch.close()
    for ours, _ in pairs:
        ours.close()


async def test_patience_begins_with_the_hangup_and_may_end_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vring_serial.chardev.hangup.RECHECK_SECONDS", 0.01)
    gone: list[int] = []
    asked: list[bool] = []
    seconds = 60.0

    def patience(fd: int, entirely: bool) -> float:
        asked.append(entirely)
        return seconds

    watch = HangupWatch(gone.append, patience)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        watch.watch(ours.fileno())
        theirs.send(b"unread")
        await turns()
        assert asked == []
        theirs.shutdown(socket.SHUT_WR)
        await turns()
        assert set(asked) == {False}
        theirs.close()
        asked.clear()
        await turns()
        assert set(asked) == {True}
        assert gone == []
        seconds = 0.0
        watch.look_again()
        await turns(2)
        assert gone == [ours.fileno()]
    watch.close()


async def test_a_peer_that_is_condemned_counts_as_gone_entirely() -> None:
    gone: list[int] = []
    watch = HangupWatch(gone.append, lambda fd, entirely: 0.0 if entirely else 60.0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        watch.watch(ours.fileno())
        assert not watch.condemn(ours.fileno())
        assert gone == []
        theirs.send(b"unread")
        assert watch.condemn(ours.fileno())
        assert gone == [ours.fileno()]
    watch.close()


def test_either_way_of_shutting_down_tells_who_is_leaving() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not is_leaving(ours.fileno())
        theirs.shutdown(socket.SHUT_RD)
        assert not is_leaving(ours.fileno())
        theirs.shutdown(socket.SHUT_WR)
        assert is_leaving(ours.fileno())


async def test_a_regular_file_cannot_hang_up(tmp_path: Path) -> None:
    gone: list[int] = []
    watch = HangupWatch(gone.append)
    with (tmp_path / "file").open("wb") as file:
        watch.watch(file.fileno())
        await turns()
        watch.unwatch(file.fileno())
    watch.close()
    assert gone == []


def test_end_of_file_is_no_unread_byte() -> None:
    ours, theirs = socket.socketpair()
    assert unread(ours.fileno()) == 0
    theirs.send(b"xy")
    assert unread(ours.fileno()) == 2
    theirs.close()
    assert unread(ours.fileno()) == 2
    ours.recv(2)
    assert unread(ours.fileno()) == 0
    ours.close()


def test_pipes_and_terminals_have_unread_bytes_too() -> None:
    for ours, theirs in (os.pipe(), os.openpty()):
        assert unread(ours) == 0
        os.write(theirs, b"x")
        assert unread(ours) == 1
        os.close(theirs)
        assert unread(ours) == 1
        os.read(ours, 1)
        assert unread(ours) == 0
        os.close(ours)
