"""A connection that a successor goes on with: nothing lost, nothing doubled, wherever it dies."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.processes import number_of
from tests.support.shelves import ShelfKeeper
from tests.support.waiting import turns, until
from tests.transport.dying_pieces import LAYOUTS
from vring import (
    RECORD_SIZE,
    LocalMisuseError,
    receive_recorded,
    recorded,
    send_recorded,
    set_record,
)
from vring_serial import unix_fds
from vring_serial.keeping import Keeping
from vring_serial.transport.closer import Closer
from vring_serial.transport.pieces import Pieces
from vring_serial.transport.repeatable import AREA_SIZE, Handled, RepeatableConnection
from vring_serial.unix_fds import Received

PROGRAM = Path(__file__).with_name("dying_connection.py")
PIECES_PROGRAM = Path(__file__).with_name("dying_pieces.py")
#: The fields of a record (vring/_record.pxd), and its states.
FIELDS = struct.Struct("<56xI4x5Q")
IDLE, CALL, BOOKED = range(3)
UNSET = 0xFFFFFFFF


@pytest.fixture
def keeper() -> Iterator[ShelfKeeper]:
    keeper = ShelfKeeper()
    yield keeper
    keeper.close()


def test_answers_go_once_at_whatever_line_the_process_dies() -> None:
    assert number_of(PROGRAM) > 100


@pytest.mark.parametrize("protocol", LAYOUTS)
def test_messages_that_come_at_once_have_their_descriptors_wherever_the_process_dies(
    protocol: str,
) -> None:
    assert number_of(PIECES_PROGRAM, protocol) > 50


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        # Each piece of the stream: bytes, and descriptors beside them.
        ([(b"--", 0), (b"+2", 2), (b"--", 0)], [(b"--", 0), (b"+2", 2), (b"--", 0)]),
        ([(b"--", 0), (b"?1", 1)], [(b"--", 0), (b"?1", 1)]),
        ([(b"?1", 1), (b"+2", 2)], [(b"?1", 1), (b"+2", 2)]),
        ([(b"+2--", 2), (b"+1", 1)], [(b"+2", 2), (b"--", 0), (b"+1", 1)]),
        # Several messages in one piece.
        ([(b"+1+1", 2)], [(b"+1", 1), (b"+1", 1)]),
        ([(b"+1+2", 3), (b"+1", 1)], [(b"+1", 1), (b"+2", 2), (b"+1", 1)]),
        ([(b"--+1", 1), (b"--", 0)], [(b"--", 0), (b"+1", 1), (b"--", 0)]),
        ([(b"--?1--", 1)], [(b"--", 0), (b"?1", 1), (b"--", 0)]),
        ([(b"?1+1", 2)], [(b"?1", 1), (b"+1", 1)]),
        ([(b"?1?1", 1)], [(b"?1", 0), (b"?1", 1)]),
        ([(b"--", 0), (b"?1", 0), (b"?1", 1)], [(b"--", 0), (b"?1", 0), (b"?1", 1)]),
        ([(b"+1+1", 2)] * 2, [(b"+1", 1)] * 4),
        ([(b"?1", 0), (b"+1+1", 2)], [(b"?1", 0), (b"+1", 1), (b"+1", 1)]),
        # Too many and too few.
        ([(b"+1--", 3)], [(b"+1", 1), (b"--", 2)]),
        ([(b"+1+1", 1), (b"--", 0)], [(b"+1", 0), (b"+1", 1), (b"--", 0)]),
        ([(b"----", 4)], [(b"--", 0), (b"--", 4)]),
        # The last one not whole.
        ([(b"+1+", 2), (b"1--", 0)], [(b"+1", 1), (b"+1", 1), (b"--", 0)]),
        ([(b"?1+", 2), (b"2", 0), (b"+1", 1)], [(b"?1", 0), (b"+2", 2), (b"+1", 1)]),
        ([(b"--+", 1), (b"2", 1), (b"+1", 1)], [(b"--", 0), (b"+2", 2), (b"+1", 1)]),
        ([(b"--+", 1), (b"2+1", 2)], [(b"--", 0), (b"+2", 2), (b"+1", 1)]),
        # A message in two pieces, the descriptors beside either or both of them.
        ([(b"+", 2), (b"2", 0), (b"--", 0)], [(b"+2", 2), (b"--", 0)]),
        ([(b"+", 0), (b"1", 1), (b"+1", 1)], [(b"+1", 1), (b"+1", 1)]),
        ([(b"+", 1), (b"2--", 1)], [(b"+2", 2), (b"--", 0)]),
        ([(b"+", 1), (b"2", 1)], [(b"+2", 2)]),
        ([(b"+", 3), (b"1--", 0), (b"+1", 1)], [(b"+1", 3), (b"--", 0), (b"+1", 1)]),
    ],
)
async def test_descriptors_are_those_of_their_message(
    keeper: ShelfKeeper, pieces: list[tuple[bytes, int]], expected: list[tuple[bytes, int]]
) -> None:
    """A look at one message brings the descriptors of the next piece as well."""
    shelf = keeper.begin()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    got: list[tuple[bytes, int]] = []
    closer = Closer()

    def received(data: Received) -> bool:
        got.append((data.data, len(data.fds)))
        closer.close(data.fds)
        return False

    for data, count in pieces:
        unix_fds.send(theirs, data, [theirs.fileno()] * count)
    connection = connect(ours, closer, received, lambda error: None, shelf)
    try:
        await until(lambda: len(got) == len(expected), lambda: f"{got}")
        assert got == expected
        await turns(2)
        keeper.begin()
        assert keeper.store.descriptors == {}
    finally:
        connection.close()
        theirs.close()
        await until(lambda: not closer.waiting)


def fds_of(message: bytes) -> range:
    if message == b"--":
        return range(1)
    most = int(message[1:])
    return range(most if message.startswith(b"+") else 0, most + 1)


def connect(
    sock: socket.socket,
    closer: Closer,
    received: Callable[[Received], bool],
    lost: Callable[[OSError | None], None],
    keeping: Keeping,
) -> RepeatableConnection:
    """Messages have two bytes; ``+N`` has N descriptors, and ``?N`` as many at most."""
    return RepeatableConnection(
        sock,
        size_of=lambda _: 2,
        header_size=1,
        fds_of=fds_of,
        pieces=Pieces(keeping, closer, 0),
        record=lambda _: None,
        handled=Handled(),
        area=memoryview(mmap.mmap(-1, AREA_SIZE)),
        read_size=4096,
        max_fds=4,
        closer=closer,
        received=received,
        go_on=lambda: False,
        lost=lost,
    )


@pytest.mark.parametrize("count", [0, 1])
async def test_a_peer_that_leaves_within_a_message_is_gone(keeper: ShelfKeeper, count: int) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    left: list[OSError | None] = []
    closer = Closer()
    connect(ours, closer, lambda _: False, left.append, keeper.begin())
    beside = unix_fds.make_eventfd()
    unix_fds.send(theirs, b"+", [beside] * count)
    await turns(4)
    theirs.close()
    os.close(beside)
    await until(lambda: left)
    assert left == [None]
    await until(lambda: not closer.waiting)


async def test_a_peer_that_reads_nothing_is_listened_to_while_it_is_asked() -> None:
    """It may wait for us to read its answers."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    got: list[bytes] = []
    recorded_answers: list[bytes] = []

    def received(data: Received) -> bool:
        got.append(data.data)
        connection.ask(bytes(10_000))
        return False

    connection = RepeatableConnection(
        ours,
        size_of=lambda _: 2,
        header_size=1,
        fds_of=lambda _: range(1),
        pieces=None,
        record=lambda handled: recorded_answers.append(handled.answer),
        handled=Handled(),
        area=memoryview(mmap.mmap(-1, AREA_SIZE)),
        read_size=4096,
        max_fds=4,
        closer=Closer(),
        received=received,
        go_on=lambda: False,
        lost=lambda error: None,
    )
    try:
        theirs.send(b"--" * 100)  # 1 MB of questions, which no socket has room for
        await until(lambda: len(got) == 100, lambda: f"{len(got)}")
        asked = 0
        while asked < 1_000_000:
            asked += len(await asyncio.to_thread(theirs.recv, 1 << 20))
        assert set(recorded_answers) == {b""}
    finally:
        connection.close()
        theirs.close()


def make_record() -> bytearray:
    record = bytearray(RECORD_SIZE)
    set_record(record, 0)
    return record


@pytest.mark.parametrize(
    ("state", "length", "gone"),
    [(IDLE, 7, 100), (CALL, UNSET, 100), (CALL, 7, 107), (BOOKED, 7, 107), (BOOKED, UNSET, 107)],
)
def test_a_record_counts_every_byte_once_in_each_state(state: int, length: int, gone: int) -> None:
    record = make_record()
    FIELDS.pack_into(record, 0, length, state, 3, 100, 3, 107)
    assert recorded(record) == (3, gone)
    sender, receiver = socket.socketpair()
    with sender, receiver:
        assert send_recorded(sender.fileno(), b"12", record) == 2
    assert recorded(record) == (3, gone + 2)


def test_calls_add_their_lengths() -> None:
    record = make_record()
    taken = make_record()
    sender, receiver = socket.socketpair()
    with sender, receiver:
        set_record(record, 9, 5)
        while True:
            try:
                send_recorded(sender.fileno(), bytes(10_000), record)
            except BlockingIOError:
                break
        number, length = recorded(record)
        assert number == 9
        assert length > 10_000
        data = bytearray(1 << 20)
        assert receive_recorded(receiver.fileno(), data, taken) == length - 5
        assert recorded(taken) == (0, length - 5)
        with pytest.raises(BlockingIOError):
            receive_recorded(receiver.fileno(), data, taken)
        receiver.close()
        with pytest.raises(BrokenPipeError):
            send_recorded(sender.fileno(), b"x", record)
    assert recorded(record) == (9, length)


def test_descriptors_go_with_a_recorded_byte() -> None:
    record = make_record()
    sender, receiver = socket.socketpair()
    with sender, receiver:
        assert send_recorded(sender.fileno(), b"12", record, [0] * 253) == 2
        received = unix_fds.receive(receiver, 9, 253)
        assert (received.data, len(received.fds)) == (b"12", 253)
        unix_fds.close_all(received.fds)
        with pytest.raises(LocalMisuseError, match="more than 253"):
            send_recorded(sender.fileno(), b"12", record, [0] * 254)
        with pytest.raises(OSError, match="sendmmsg"):
            send_recorded(sender.fileno(), b"12", record, [-1])
        assert recorded(record) == (0, 2)
        with pytest.raises(BlockingIOError):
            receiver.recv(1, socket.MSG_DONTWAIT)


def test_what_cannot_be_a_record_is_refused() -> None:
    with pytest.raises(LocalMisuseError):
        recorded(bytearray(RECORD_SIZE - 1))
    with pytest.raises(LocalMisuseError):
        recorded(memoryview(bytearray(RECORD_SIZE + 8))[1:])
