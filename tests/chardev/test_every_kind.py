"""What holds for every kind of chardev, with a real peer on the other side."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import sys
from types import FrameType

import pytest

from tests.support.chardev_kinds import (
    COMING_BACK,
    LEAVING,
    RECEIVING,
    SENDING,
    WITH_LAST_WORDS,
    Guest,
    Peer,
)
from tests.support.leaks import held
from tests.support.waiting import DEADLINE, LoopClock, turns, until
from vring_serial.chardev.base import DescriptorEnd
from vring_serial.chardev.hangup import LAST_WORDS_SECONDS, RECHECK_SECONDS, is_leaving
from vring_serial.errors import LocalProtocolError, ResourceError

PATTERN = bytes(range(256)) * 16


async def connected(peer: Peer) -> Guest:
    guest = Guest(peer.chardev)
    await peer.chardev.start()
    await peer.connect()
    await guest.opened()
    return guest


async def left(peer: Peer, guest: Guest, clock: LoopClock) -> None:
    """The peer leaves, and whoever looks for that has looked."""
    await peer.disconnect()
    await until(lambda: is_leaving(guest.read_fd))
    await clock.forward(1.0)  # ptys are looked at by a timer


async def calls_in_turns(count: int) -> int:
    """How many functions of chardevs the event loop calls while it makes so many turns."""
    calls = 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and "vring_serial/chardev" in frame.f_code.co_filename

    sys.setprofile(note)
    try:
        await turns(count)
    finally:
        sys.setprofile(None)
    return calls


async def test_an_end_opens_and_stop_closes_it(peer: Peer) -> None:
    guest = await connected(peer)
    await peer.chardev.aclose()
    assert peer.chardev.end is None
    assert guest.events == ["opened", "closed"]


async def test_stop_twice_and_before_start(peer: Peer) -> None:
    guest = Guest(peer.chardev)
    await peer.chardev.aclose()
    await peer.chardev.start()
    await peer.connect()
    await guest.opened()
    await peer.chardev.aclose()
    await peer.chardev.aclose()
    assert guest.events == ["opened", "closed"]


#: Without those whose peer is gone for good, or has to be there at the start.
AGAIN = [kind for kind in RECEIVING if kind not in ("stdio", "serial")]


@pytest.mark.parametrize("peer", AGAIN, indirect=True)
async def test_start_again_after_stop(peer: Peer) -> None:
    guest = await connected(peer)
    await peer.chardev.aclose()
    await peer.disconnect()
    await peer.chardev.start()
    await peer.connect()
    await guest.opened()
    await guest.write(b"again")
    assert await peer.receive(5) == b"again"


async def test_start_twice_does_nothing(peer: Peer) -> None:
    guest = await connected(peer)
    before = held()
    await peer.chardev.start()
    assert held() == before
    assert guest.events == ["opened"]


async def test_it_works_without_a_user(peer: Peer) -> None:
    await peer.chardev.start()
    await peer.connect()
    await peer.chardev.aclose()


async def test_one_user_only(peer: Peer) -> None:
    Guest(peer.chardev)
    with pytest.raises(LocalProtocolError, match="dut"):
        Guest(peer.chardev)


@pytest.mark.parametrize("peer", RECEIVING, indirect=True)
async def test_the_guests_output_arrives(peer: Peer) -> None:
    guest = await connected(peer)
    await guest.write(PATTERN)
    async with asyncio.timeout(DEADLINE):
        assert await peer.receive(len(PATTERN)) == PATTERN


@pytest.mark.parametrize("peer", SENDING, indirect=True)
async def test_the_peers_bytes_arrive(peer: Peer) -> None:
    guest = await connected(peer)
    await peer.send(PATTERN)
    assert await guest.read(len(PATTERN)) == PATTERN


async def test_descriptors_never_block(peer: Peer) -> None:
    guest = await connected(peer)
    end = guest.end
    fds = (end.read_fd, end.write_fd) if isinstance(end, DescriptorEnd) else ()
    for fd in fds:
        assert fd < 0 or not os.get_blocking(fd)
        assert fd < 0 or not os.get_inheritable(fd)


@pytest.mark.parametrize("peer", RECEIVING, indirect=True)
async def test_a_reader_that_does_not_read_loses_nothing(peer: Peer) -> None:
    guest = await connected(peer)
    total = 512 * 1024
    data = os.urandom(total)
    writing = asyncio.create_task(guest.write(data))
    await turns()  # the peer does not read; the loop stays ours
    received = b""
    async with asyncio.timeout(DEADLINE):
        while len(received) < total:
            received += await peer.receive(min(65536, total - len(received)))
    assert received == data
    await writing


async def test_a_peer_that_leaves_is_noticed_although_nobody_reads(peer: Peer) -> None:
    guest = await connected(peer)
    await peer.disconnect()
    if peer.leaves:
        await until(lambda: "closed" in guest.events)
    else:
        assert guest.events == ["opened"]


@pytest.mark.parametrize("peer", COMING_BACK, indirect=True)
async def test_the_next_peer_is_served(peer: Peer) -> None:
    guest = await connected(peer)
    for turn in range(1, 4):
        await peer.disconnect()
        await until(lambda turn=turn: guest.events.count("closed") == turn)
        await peer.connect()
        await until(lambda turn=turn: guest.events.count("opened") == turn + 1)
        await guest.write(PATTERN)
        assert await peer.receive(len(PATTERN)) == PATTERN
        await peer.send(b"and back")
        assert await guest.read(8) == b"and back"


@pytest.mark.parametrize("peer", WITH_LAST_WORDS, indirect=True)
async def test_bytes_of_a_peer_that_left_are_delivered(peer: Peer, clock: LoopClock) -> None:
    guest = await connected(peer)
    await peer.send(PATTERN)
    await left(peer, guest, clock)
    assert await calls_in_turns(500) < 100, "it spins while bytes wait"
    assert "closed" not in guest.events
    assert await guest.read(len(PATTERN)) == PATTERN
    try:
        assert os.read(guest.read_fd, 1) == b""
        reason = None
    except OSError as error:
        reason = error
    peer.chardev.peer_gone(reason)
    assert "closed" in guest.events


BREAKING = [kind for kind in WITH_LAST_WORDS if kind != "pty"]  # which takes writes always


@pytest.mark.parametrize("peer", BREAKING, indirect=True)
async def test_last_words_are_delivered_although_writing_fails(
    peer: Peer, clock: LoopClock
) -> None:
    guest = await connected(peer)
    await peer.send(b"last words")
    await left(peer, guest, clock)
    peer.chardev.peer_gone(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert guest.events == ["opened"]
    assert await guest.read(10) == b"last words"
    peer.chardev.peer_gone()
    assert guest.events == ["opened", "closed"]


@pytest.mark.parametrize("peer", BREAKING, indirect=True)
async def test_last_words_that_nobody_reads_do_not_keep_the_end(
    peer: Peer, clock: LoopClock
) -> None:
    guest = await connected(peer)
    await peer.send(b"last words")
    await left(peer, guest, clock)
    peer.chardev.peer_gone(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert guest.end is not None
    await clock.forward(LAST_WORDS_SECONDS)
    await until(lambda: "closed" in guest.events)


@pytest.mark.parametrize("peer", WITH_LAST_WORDS, indirect=True)
async def test_a_peer_that_left_is_let_go_when_its_bytes_are_read_and_no_more(
    peer: Peer, clock: LoopClock
) -> None:
    """Who read the last bytes may have stopped before it came to the end of file."""
    guest = await connected(peer)
    await peer.send(b"last words")
    await left(peer, guest, clock)
    assert await guest.read(10) == b"last words"
    await clock.forward(RECHECK_SECONDS)
    await until(lambda: "closed" in guest.events)


@pytest.mark.parametrize("peer", LEAVING, indirect=True)
async def test_peer_gone_closes_before_it_returns(peer: Peer) -> None:
    guest = await connected(peer)
    await peer.disconnect()
    peer.chardev.peer_gone(None)
    assert guest.events == ["opened", "closed"]
    peer.chardev.peer_gone(None)
    assert guest.events == ["opened", "closed"]


async def test_peer_gone_without_an_end_is_nothing(peer: Peer) -> None:
    guest = Guest(peer.chardev)
    peer.chardev.peer_gone(None)
    peer.chardev.guest_opened(True)
    peer.chardev.guest_opened(False)
    assert guest.events == []


async def test_the_description_is_one_phrase(peer: Peer) -> None:
    await connected(peer)
    assert peer.chardev.description
    assert "\n" not in peer.chardev.description


async def test_running_out_of_descriptors_leaves_nothing_behind(peer: Peer) -> None:
    """Start with room for 0, 1, 2... descriptors until it succeeds."""
    guest = Guest(peer.chardev)
    # Once without a limit: the loop has its threads by then, and stdio's kind its pipes.
    await peer.chardev.start()
    await peer.chardev.aclose()
    guest.events.clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = held().descriptors
    files = sorted(os.listdir(peer.directory))
    highest = max(map(int, before))
    # Numbers below the highest may be free; take them, so that the limit counts.
    fillers = [os.dup(0) for _ in range(highest - len(before) + 2)]
    for room in range(12):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max([highest, *fillers]) + 1 + room, hard))
        failure = None
        try:
            await peer.chardev.start()
        except ResourceError as error:
            failure = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if failure is None:
            break
        assert "dut" in failure
        assert len(held().descriptors) == len(before) + len(fillers)
        assert sorted(os.listdir(peer.directory)) == files
        assert guest.events == []
    else:
        pytest.fail("it never started")
    await peer.chardev.aclose()
    for fd in fillers:
        os.close(fd)
