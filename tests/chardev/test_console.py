"""console: scrollback, several clients, slow ones, hostile ones, and who says how large it is."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.attached import Client
from tests.support.chardev_kinds import Guest
from tests.support.leaks import held
from tests.support.waiting import LoopClock, turns, until
from vring_serial.chardev.console import (
    MOST_VIEWERS,
    SCROLLBACK_MAX,
    ConsoleChardev,
    ConsoleOptions,
)
from vring_serial.chardev.hangup import LAST_WORDS_SECONDS, unread
from vring_serial.chardev.scrollback import Scrollback
from vring_serial.chardev.viewer import HELLO_SECONDS
from vring_serial.errors import ConfigError
from vring_serial.proto.attach import Hello, Kind, Resize, pack_frame

RING = 1 << 20  # the least


class Place:
    """A started console with a guest.

    Attributes:
        written: all that the guest wrote.
    """

    def __init__(self, path: Path, scrollback: int) -> None:
        self.path = path
        self.chardev = ConsoleChardev("dut", ConsoleOptions(path=str(path), scrollback=scrollback))
        self.guest = Guest(self.chardev)
        self.written = b""
        self.clients: list[Client] = []

    async def come(self, hello: Hello | None = None) -> Client:
        self.clients.append(await Client.come(self.path, hello))
        return self.clients[-1]

    async def says(self, data: bytes) -> None:
        """Have the guest write, and the console take it."""
        await self.guest.write(data)
        self.written += data
        await until(lambda: self.chardev.scrollback.end == len(self.written))

    async def is_full(self) -> None:
        """Wait until the guest's side has no more room for what was typed."""
        before = -1
        while (now := unread(self.guest.read_fd)) != before or now < 100_000:
            before = now
            await turns(50)

    async def hears(self, data: bytes) -> None:
        assert await self.guest.read(len(data)) == data


@pytest.fixture
async def place(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """With 4 KiB of scrollback."""
    before = held()
    place = Place(tmp_path / "c", 4096)
    await place.chardev.start()
    yield place
    for client in place.clients:
        client.close()
    await place.chardev.aclose()
    await until(lambda: not held().descriptors.keys() - before.descriptors.keys())
    assert not place.path.exists()


async def test_everybody_sees_all_and_types(place: Place) -> None:
    await place.says(b"booted\nlogin: ")
    ends = [await place.come() for _ in range(3)]
    for i, client in enumerate(ends):
        client.type(b"%d\n" % i)
        await place.hears(b"%d\n" % i)
        await place.says(b"%d\nlogin: " % i)
    for client in ends:
        await client.reach(len(place.written))
        assert client.shown == place.written
        assert client.welcome.live == len(b"booted\nlogin: ")
    assert place.chardev.description.endswith("c (3 attached)")


async def test_who_is_read_only_cannot_type_whatever_he_sends(place: Place) -> None:
    for kind, payload in ((Kind.INPUT, b"rm -rf /\n"), (Kind.RESIZE, Resize(1, 1).pack())):
        client = await place.come(Hello(read_only=True, cols=9, rows=9))
        client.send(kind, payload)
        await client.end()
        assert client.bye == f"{kind.name} of a client that is read-only"
    other = await place.come()
    other.type(b"ok")
    await place.hears(b"ok")
    assert place.guest.sizes == []


async def test_scrollback_begins_at_a_line(place: Place) -> None:
    await place.says(b"".join(b"line %d\n" % i for i in range(900)))
    client = await place.come()
    await client.reach(len(place.written))
    assert place.written.endswith(b"\n" + client.shown)
    assert 4096 - 10 < len(client.shown) <= 4096
    await place.says(b"x" * 5000)  # no line ends here
    client = await place.come()
    await client.reach(len(place.written))
    assert client.shown == b"x" * 4096


async def test_a_reader_that_stops_loses_lines_and_is_told_and_nobody_waits(place: Place) -> None:
    stopped = await place.come(Hello(read_only=True))
    quick = await place.come()
    line = b"%07d\n"
    wanted = 8 * RING
    numbers = iter(range(1 << 30))
    while len(place.written) < wanted:
        await place.says(b"".join(line % next(numbers) for _ in range(8192)))
        await quick.reach(len(place.written))
    assert quick.shown == place.written
    assert quick.lost == []
    await stopped.reach(len(place.written))
    (lost,) = stopped.lost
    assert len(stopped.shown) + lost == len(place.written)
    at = next(
        n
        for n in range(0, len(stopped.shown), 8)
        if stopped.shown[n : n + 8] != place.written[n : n + 8]
    )
    assert stopped.shown[at - at % 8 :] == place.written[at + lost :]
    assert len(stopped.shown) >= RING // 2
    assert stopped.welcome.position == 0


async def test_who_was_cut_off_goes_on_where_he_was(place: Place) -> None:
    await place.says(b"one\ntwo\n")
    client = await place.come()
    await client.reach(4)
    resume = (client.welcome.stream, 4)
    client.close()
    await place.says(b"three\n")
    again = await place.come(Hello(resume=resume))
    await again.reach(len(place.written))
    assert again.shown == b"two\nthree\n"
    await place.says(b"x\n" * RING)
    late = await place.come(Hello(resume=resume))
    await late.reach(len(place.written))
    assert 4 + late.lost[0] + len(late.shown) == len(place.written)
    for strange in ((resume[0] ^ 2, 4), (resume[0], 1 << 40)):
        other = await place.come(Hello(resume=strange))
        await other.reach(len(place.written))
        assert 0 < len(other.shown) <= 4096


async def test_the_terminal_has_the_size_of_who_used_it_last(place: Place) -> None:
    def sizes(*wanted: tuple[int, int]) -> bool:
        return place.guest.sizes == list(wanted)

    first = await place.come(Hello(cols=80, rows=24))
    await until(lambda: sizes((80, 24)))
    second = await place.come(Hello(cols=132, rows=43))
    await place.come(Hello(read_only=True, cols=20, rows=5))
    await place.come(Hello())  # a pipe
    await until(lambda: sizes((80, 24), (132, 43)))
    first.type(b"x")
    await until(lambda: sizes((80, 24), (132, 43), (80, 24)))
    second.send(Kind.RESIZE, Resize(100, 30).pack())
    await until(lambda: place.guest.sizes[-1] == (100, 30))
    second.close()
    await until(lambda: place.guest.sizes[-1] == (80, 24))
    first.close()
    await turns()
    assert place.guest.sizes[-1] == (80, 24)


async def test_what_the_guest_does_not_take_holds_only_who_types_it(place: Place) -> None:
    typist = await place.come(Hello(cols=80, rows=24))
    other = await place.come()
    data = os.urandom(1 << 20)
    for at in range(0, len(data), 4096):
        typist.type(data[at : at + 4096])
    await place.is_full()
    await place.says(b"still here\n")
    await typist.reach(11)
    await other.reach(11)
    await place.hears(data)
    typist.type(b"more")
    await place.hears(b"more")


async def test_who_leaves_while_the_guest_takes_nothing_is_forgotten(
    place: Place, clock: LoopClock
) -> None:
    typist = await place.come()
    for _ in range(256):
        typist.type(bytes(4096))
    await place.is_full()
    typist.close()
    for _ in range(round(LAST_WORDS_SECONDS) + 2):
        await turns()
        await clock.forward(1.0)
    await until(lambda: "attached" not in place.chardev.description)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "unknown here"),
        (b"\x02\0\0\0\1\0\0\0x", "INPUT before HELLO"),
        (b"\x01\0\0\0\1\0\0\0x", "payload of 1 bytes"),
        (b"\x01\0\0\0\xff\xff\xff\x7f", "at most"),
    ],
)
async def test_strangers_are_told_and_sent_away(place: Place, data: bytes, reason: str) -> None:
    client = await Client.connect(place.path)
    client.send_raw(data)
    await client.end()
    assert reason in client.bye
    client.close()


async def test_another_version_and_a_second_hello_are_refused(place: Place) -> None:
    client = await Client.connect(place.path)
    client.send(Kind.HELLO, Hello(version=2).pack())
    await client.end()
    assert client.bye == "version 1 is spoken here, not 2"
    client.close()
    client = await place.come()
    client.send(Kind.HELLO, Hello().pack())
    await client.end()
    assert client.bye == "a second HELLO"


async def test_silent_and_too_many_clients_do_not_stay(place: Place, clock: LoopClock) -> None:
    silent = await Client.connect(place.path)
    for _ in range(MOST_VIEWERS - 1):
        await place.come()
    more = await Client.connect(place.path)
    await more.end()
    assert more.bye == f"{MOST_VIEWERS} clients are attached already"
    await clock.forward(HELLO_SECONDS)
    await silent.end()
    assert silent.bye == "no HELLO came"
    await place.come()
    silent.close()
    more.close()


async def test_descriptors_beside_bytes_are_not_kept(place: Place) -> None:
    client = await place.come()
    before = held().descriptors
    with suppress(OSError), client.sock as sock:  # the kernel may refuse them
        socket.send_fds(sock, [pack_frame(Kind.INPUT, b"y")], [0])
    client.type(b"x")
    assert (await place.guest.read(1)) in (b"x", b"y")
    assert held().descriptors.keys() <= before.keys()


async def test_an_operator_sends_all_away_and_closing_says_so(place: Place) -> None:
    assert not place.chardev.send_away()
    client = await place.come()
    assert place.chardev.send_away()
    await client.end()
    assert client.bye == "sent away by an operator"
    client = await place.come()
    await place.guest.write(b"last words\n")
    await place.chardev.aclose()
    await client.end()
    assert (bytes(client.shown), client.bye) == (b"last words\n", "the console was closed")


def test_a_ring_counts_from_the_beginning_of_its_stream() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        area = memoryview(bytearray(Scrollback.area_size(64)))
        ring = Scrollback(area)
        stream = b""
        for i in range(60):
            theirs.send(piece := b"%d\n" % i * (i % 7 + 1))
            stream += piece
            while ring.end < len(stream):
                assert ring.receive(ours.fileno()) > 0
            assert (ring.start, ring.end) == (max(0, len(stream) - 64), len(stream))
            for position in range(ring.start, ring.end + 1):
                first = bytes(ring.read(position, 64))
                rest = bytes(ring.read(position + len(first), 64))
                assert first + rest == stream[position:]
                line = ring.line_start(position)
                if position > ring.start:
                    at = stream.find(b"\n", position - 1)
                    assert line == (position if position >= ring.end else at + 1)
            other = Scrollback(area)
            assert (other.stream, other.end) == (ring.stream, ring.end)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({}, "path"),
        ({"path": "a\0b"}, "path"),
        ({"path": "c", "scrollback": -1}, "scrollback"),
        ({"path": "c", "scrollback": SCROLLBACK_MAX + 1}, "scrollback"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ConsoleOptions(**options)  # type: ignore[arg-type]
    assert caught.value.where == where
