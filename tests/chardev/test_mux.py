"""mux=on: ports that share a host end, and the keys that say which one is typed to."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chardev_kinds import Guest
from tests.support.descriptors import read_exactly
from tests.support.leaks import held
from tests.support.waiting import LoopClock, turns, until
from vring import send_recorded
from vring_serial.chardev.base import DescriptorEnd
from vring_serial.chardev.hangup import LAST_WORDS_SECONDS, RECHECK_SECONDS, unread
from vring_serial.chardev.mux import Mux, MuxFront
from vring_serial.chardev.mux_input import AREA_SIZE, MuxInput
from vring_serial.chardev.relay import Relay
from vring_serial.chardev.ringbuf import RingbufChardev, RingbufOptions
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.errors import ConfigError

A = b"\x01"


class Place:
    """A server that ports share, and its client.

    Attributes:
        exits: how often the service was asked to end.
    """

    def __init__(self, path: Path, *, exits: bool = False) -> None:
        self.path = str(path)
        self.base = SocketChardev("m", SocketOptions(path=self.path, server=True, wait=False))
        self.exits = 0
        self.mux = Mux(self.base, on_exit=self._exit if exits else None)
        self.fronts: list[MuxFront] = []
        self.guests: list[Guest] = []
        self.sock: socket.socket | None = None

    def _exit(self) -> None:
        self.exits += 1

    async def add(self, name: str) -> Guest:
        front = self.mux.front(name, label=f"port {name}")
        guest = Guest(front)
        await front.start()
        self.fronts.append(front)
        self.guests.append(guest)
        return guest

    async def come(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(self.sock, self.path)
        for guest in self.guests:
            await guest.opened()

    async def types(self, data: bytes) -> None:
        assert self.sock is not None
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def sees(self, size: int) -> bytes:
        assert self.sock is not None
        return await read_exactly(self.sock.fileno(), size)

    def leave(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    async def aclose(self) -> None:
        self.leave()
        for front in self.fronts:
            await front.aclose()


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    """Two ports, the second of which has the focus."""
    before = held()
    place = Place(tmp_path / "m")
    for name in ("a", "b"):
        await place.add(name)
    await place.come()
    yield place
    await place.aclose()
    assert not held().descriptors.keys() - before.descriptors.keys()


async def test_who_was_added_last_is_typed_to_as_with_qemu(place: Place) -> None:
    a, b = place.guests
    await place.types(b"hello")
    assert await b.read(5) == b"hello"
    assert unread(a.read_fd) == 0
    assert [front.has_focus for front in place.fronts] == [False, True]


async def test_the_keys_choose_in_a_circle(place: Place) -> None:
    a, b = place.guests
    await place.types(A + b"cto a" + A + b"cto b" + A + b"c" + A + b"cstill")
    assert await a.read(4) == b"to a"
    assert await b.read(9) == b"to bstill"


async def test_what_all_ports_write_goes_out(place: Place) -> None:
    a, b = place.guests
    await a.write(b"from a")
    assert await place.sees(6) == b"from a"
    await b.write(b"from b")
    assert await place.sees(6) == b"from b"


async def test_the_escape_twice_is_one(place: Place) -> None:
    await place.types(b"x" + A + A + b"y" + A + A + A + A)
    assert await place.guests[1].read(5) == b"x" + A + b"y" + A + A


async def test_unknown_keys_and_a_break_do_nothing(place: Place) -> None:
    await place.types(A + b"b" + A + b"q" + A + b"\0" + b"x")
    assert await place.guests[1].read(1) == b"x"
    assert place.sock is not None
    with pytest.raises(BlockingIOError):
        place.sock.recv(1)


@pytest.mark.parametrize("key", [b"h", b"?"])
async def test_help_says_what_there_is_and_who_is_typed_to(place: Place, key: bytes) -> None:
    await place.types(A + key + b"x")
    assert await place.guests[1].read(1) == b"x"
    assert place.sock is not None
    text = place.sock.recv(4096).decode()
    assert text.startswith("\n\rC-a h    print this help\n\r")
    assert text.endswith("input goes to port b\n\r")


@pytest.mark.parametrize("key", [b"s", b"t"])
async def test_what_is_qemus_alone_is_refused_on_the_terminal(place: Place, key: bytes) -> None:
    await place.types(A + key + b"x")
    assert await place.guests[1].read(1) == b"x"
    assert place.sock is not None
    assert f"C-a {key.decode()} " in place.sock.recv(4096).decode()


async def test_x_hangs_up(place: Place) -> None:
    await place.types(b"last" + A + b"x")
    for guest in place.guests:
        await guest.closed()
    assert place.sock is not None
    assert await asyncio.get_running_loop().sock_recv(place.sock, 1) == b""
    place.leave()
    await place.come()
    await place.types(b"next")
    assert await place.guests[1].read(4) == b"next"


async def test_x_ends_the_service_where_it_may(tmp_path: Path) -> None:
    place = Place(tmp_path / "m", exits=True)
    guest = await place.add("a")
    await place.come()
    await place.types(A + b"xgoes on")
    assert await guest.read(7) == b"goes on"
    assert place.exits == 1
    await place.aclose()


async def test_four_ports_as_with_qemu(place: Place) -> None:
    for name in ("c", "d"):
        await place.add(name)
    with pytest.raises(ConfigError, match="too many uses of multiplexed chardev 'm'"):
        place.mux.front("e")
    await place.fronts.pop().aclose()
    await place.add("e")


async def test_a_port_that_goes_gives_the_focus_to_the_next(place: Place) -> None:
    await place.fronts.pop().aclose()
    await place.types(b"now a")
    assert await place.guests[0].read(5) == b"now a"
    assert place.guests[0].events == ["opened"]


async def test_a_port_that_comes_later_is_open_and_typed_to(place: Place) -> None:
    await place.types(b"b")
    assert await place.guests[1].read(1) == b"b"
    c = await place.add("c")
    assert c.events == ["opened"]
    await place.types(b"c")
    assert await c.read(1) == b"c"


async def test_what_a_peer_sent_before_it_left_is_read(place: Place, clock: LoopClock) -> None:
    """It shut down its sending side, as nc -N does."""
    await place.types(b"last words")
    assert place.sock is not None
    place.sock.shutdown(socket.SHUT_WR)
    b = place.guests[1]
    await until(lambda: unread(b.read_fd) == 10)
    await clock.forward(LAST_WORDS_SECONDS + RECHECK_SECONDS)
    assert b.end is not None
    assert await b.read(10) == b"last words"
    await clock.forward(RECHECK_SECONDS)
    for guest in place.guests:
        await guest.closed()


async def test_what_a_peer_sent_that_is_gone_is_read_within_the_stated_time(
    place: Place, clock: LoopClock
) -> None:
    await place.types(b"last words")
    b = place.guests[1]
    await until(lambda: unread(b.read_fd) == 10)
    place.leave()
    await turns(20)
    assert b.end is not None
    await clock.forward(LAST_WORDS_SECONDS)
    for guest in place.guests:
        await guest.closed()


async def test_the_next_peer_types_nothing_of_the_last(place: Place, clock: LoopClock) -> None:
    await place.types(b"of the last" + A)
    await until(lambda: unread(place.guests[1].read_fd) == 11)
    place.leave()
    await clock.forward(LAST_WORDS_SECONDS)
    for guest in place.guests:
        await guest.closed()
    await place.come()
    await place.types(b"cc")
    assert await place.guests[1].read(2) == b"cc"


async def test_a_port_that_reads_nothing_holds_input_up_and_nothing_else(place: Place) -> None:
    a, b = place.guests
    data = bytes(range(2, 256)) * 4096
    typing = asyncio.create_task(place.types(data + A + b"cto a"))
    await turns(200)
    assert unread(a.read_fd) == 0
    await a.write(b"and out")
    assert await place.sees(7) == b"and out"
    received = b""
    while len(received) < len(data):
        received += await b.read(min(65536, len(data) - len(received)))
    assert received == data
    assert await a.read(4) == b"to a"
    await typing


async def test_output_to_a_ring_buffer_is_that_of_all() -> None:
    base = RingbufChardev("r", RingbufOptions(size=1024))
    mux = Mux(base)
    async with AsyncExitStack() as stack:
        guests = []
        for name in ("a", "b"):
            front = mux.front(name)
            guests.append(Guest(front))
            await stack.enter_async_context(front)
        await guests[0].write(b"a")
        await guests[1].write(b"b")
        assert base.read() == b"ab"


# --- what is kept


def oracle(data: bytes, names: int, focus: int) -> list[bytes]:
    """What each of so many front ends gets, by the rules read once more."""
    got = [b""] * names
    escaped = False
    for byte in data:
        if escaped or byte != 1:
            if escaped and byte == ord("c"):
                focus = (focus + 1) % names
            if not escaped or byte == 1:
                got[focus] += bytes([byte])
            escaped = False
        else:
            escaped = True
    return got


@given(
    st.binary(max_size=200).map(lambda data: data.translate(bytes([1, 99, *range(2, 256)]))),
    st.randoms(use_true_random=False),
)
def test_at_every_byte_a_successor_goes_on(data: bytes, chance: random.Random) -> None:
    """Pieces of any size, front ends that take any part, and another process after any step."""
    area = memoryview(bytearray(AREA_SIZE))
    host, back = socket.socketpair()
    pairs = [socket.socketpair() for _ in range(3)]
    for sock in (back, *(ours for ours, _ in pairs)):
        sock.setblocking(False)
    end = DescriptorEnd(back.fileno(), back.fileno())
    mux = MuxInput(area)
    for number in range(3):
        mux.add(f"f{number}", number)

    def step(left: bytes) -> bytes:
        if mux.pending and (key := mux.command()) is not None:
            if key == ord("c"):
                mux.set_focus(((mux.focus or 0) + 1) % 3)
        elif mux.pending:
            assert mux.focus is not None
            mux.send(pairs[mux.focus][0].fileno())
        elif left:
            size = chance.randint(1, len(left))
            host.sendall(left[:size])
            left = left[size:]
            assert mux.receive(end)
        return left

    left = data
    while left or mux.pending:
        left = step(left)
        if chance.random() < 0.5:
            mux = MuxInput(area)
    got = []
    for ours, theirs in pairs:
        ours.close()
        got.append(theirs.makefile("rb").read())
        theirs.close()
    assert got == oracle(data, 3, 2)
    host.close()
    back.close()


class DiedError(Exception):
    """Instead of the process, right after a system call."""


def dying(call: Callable[..., int]) -> Callable[..., int]:
    """Return what makes the call, and then dies."""

    def call_and_die(*arguments: object) -> int:
        call(*arguments)
        raise DiedError

    return call_and_die


async def test_what_went_before_a_death_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    area = memoryview(bytearray(AREA_SIZE))
    host, back = socket.socketpair()
    ours, theirs = socket.socketpair()
    with host, back, ours, theirs:
        back.setblocking(False)
        mux = MuxInput(area)
        mux.add("a", 0)
        host.sendall(A + A + b"rest")
        mux.receive(DescriptorEnd(back.fileno(), -1))
        assert mux.command() is None
        with monkeypatch.context() as patch:
            patch.setattr("vring_serial.chardev.mux_input.send_recorded", dying(send_recorded))
            with pytest.raises(DiedError):
                mux.send(ours.fileno())
        mux = MuxInput(area)
        assert mux.command() is None
        mux.send(ours.fileno())
        assert theirs.recv(99) == A + b"rest"
        assert not mux.pending


async def test_what_a_pipe_gave_before_a_death_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are in the memory, and how many they are is what the relay no longer holds."""
    area = memoryview(bytearray(AREA_SIZE))
    pipe, relay = os.pipe(), Relay(*os.pipe())
    ours, theirs = socket.socketpair()
    try:
        end = DescriptorEnd(pipe[0], -1, read_relay=relay)
        mux = MuxInput(area)
        mux.add("a", 0)
        os.write(pipe[1], b"before")
        assert mux.receive(end) == 6
        os.write(pipe[1], b";dead")
        with monkeypatch.context() as patch:
            patch.setattr("vring_serial.chardev.mux_input.os.readv", dying(os.readv))
            with pytest.raises(DiedError):
                mux.receive(end)
        mux = MuxInput(area)
        assert mux.receive(end) == 5
        os.write(pipe[1], b";after")
        assert mux.receive(end) == 6
        while mux.pending:
            assert mux.command() is None
            mux.send(ours.fileno())
        assert theirs.recv(99) == b"before;dead;after"
    finally:
        for fd in (*pipe, *relay):
            os.close(fd)
        ours.close()
        theirs.close()
