"""Records: a killed process leaves its ring and its stream so that the next one goes on exactly."""

from __future__ import annotations

import os
import socket
import tty
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.support.processes import number_of
from tests.support.rings import DATA, Ring
from tests.support.waiting import wait_until
from vring import RECORD_SIZE, FlowEvent, LocalMisuseError, PackedQueue, Pump, SplitQueue

PROGRAM = Path(__file__).with_name("killed_pump.py")


#: How often; `make chaos` more often.
KILLS = max(20, int(os.environ.get("VRING_CHAOS_KILLS", "20")))


@pytest.mark.timeout(0 if KILLS > 20 else 200)
@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize(
    ("end", "how"),
    [
        *((end, ["kill"]) for end in ("socket", "pipe", "pty", "file", "append")),
        *((end, ["halt"]) for end in ("socket", "pipe")),
        ("pipe", ["halt", "plain"]),
        *((end, ["kill", "console"]) for end in ("socket", "pipe", "pty")),
    ],
)
def test_a_device_that_ends_at_any_moment_loses_and_doubles_nothing(layout, direction, end, how):
    """Any may be killed, and one that does not outlive the process may be halted."""
    if direction == "in" and (end == "append" or "console" in how):
        pytest.skip("it is about writing")
    assert number_of(PROGRAM, layout, direction, end, str(KILLS), "1", *how) > 50_000


def record():
    return np.zeros(RECORD_SIZE, np.uint8)


def queue_of(ring, **how):
    kind = type(ring.queue)
    return kind(ring.memory, ring.queue.size, ring.desc, ring.avail, ring.used, **how)


@pytest.mark.parametrize("packed", [False, True])
def test_a_queue_goes_on_after_the_chains_that_were_completed(packed):
    ring = Ring(packed=packed)
    memory = record()
    queue = queue_of(ring, record=memory)
    for _ in range(13):  # past the end of the ring
        ring.chain(5)
        queue.push(queue.pop())
        ring.driver.get_used()
    ring.chain(6)
    ring.chain(7)
    queue.pop()  # and dies
    again = queue_of(ring, record=memory, resume=True)
    assert again.avail_index == again.used_index == ring.driver.used_index
    assert [chain.readable_bytes for chain in again.pop_many()] == [6, 7]


@pytest.mark.parametrize("packed", [False, True])
def test_a_queue_that_begins_forgets_what_was_recorded(packed):
    ring = Ring(packed=packed)
    memory = record()
    memory[:] = 0xFF
    queue_of(ring, record=memory)
    assert queue_of(ring, record=memory, resume=True).avail_index == (0x8000 if packed else 0)


def words(memory):
    """What is behind the system call's part."""
    return memory.view(np.uint64)[8:]


STATE, POSITION, LEFT, NEXT_POSITION, NEXT_LEFT = range(5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("published", [False, True])
def test_what_was_booked_counts_if_it_was_published(packed, published):
    ring = Ring(packed=packed)
    memory = record()
    queue = queue_of(ring, record=memory)
    start = int(words(memory)[POSITION])
    ring.chain(10)
    ring.chain(10)
    if published:
        queue.push(queue.pop())
    words(memory)[:5] = 2, start, 3, start + 1, 4
    again = queue_of(ring, record=memory, resume=True)
    assert again.avail_index == start + published
    state, position, left = (int(n) for n in words(memory)[:3])
    assert (state, position) == (0, start + published)
    assert left == (4 if published else 3)


def test_a_split_ring_that_is_elsewhere_is_believed_and_the_record_is_not():
    ring = Ring(index=9)
    memory = record()
    queue_of(ring, record=memory, index=4)
    words(memory)[LEFT] = 77
    assert queue_of(ring, record=memory, resume=True).avail_index == 9
    assert words(memory)[LEFT] == 0


@pytest.mark.parametrize("at", [8, 0x8008, 0x1_0000, 1 << 40])
@pytest.mark.parametrize("booked", [False, True])
def test_a_forged_place_in_a_packed_ring_is_refused(at, booked):
    ring = Ring(packed=True)
    memory = record()
    queue_of(ring, record=memory)
    if booked:
        words(memory)[:4] = 2, 0x8001, 0, at
        ring.bytes[:] = 0
        words(memory)[POSITION] = at
    else:
        words(memory)[POSITION] = at
    with pytest.raises(LocalMisuseError, match=f"the record says {at:#x}, which is no place in it"):
        queue_of(ring, record=memory, resume=True)


@pytest.mark.parametrize("kind", [SplitQueue, PackedQueue])
def test_a_record_is_memory_that_can_be_written_and_is_aligned(kind):
    ring = Ring(packed=kind is PackedQueue)
    with pytest.raises(LocalMisuseError, match="a record has 128 bytes, aligned to 8"):
        queue_of(ring, record=np.zeros(RECORD_SIZE - 1, np.uint8))
    with pytest.raises(LocalMisuseError, match="a record has 128 bytes, aligned to 8"):
        queue_of(ring, record=np.zeros(RECORD_SIZE + 8, np.uint8)[1:])
    with pytest.raises((BufferError, ValueError)):
        queue_of(ring, record=bytes(RECORD_SIZE))
    with pytest.raises(LocalMisuseError, match="there is no record to go on from"):
        queue_of(ring, resume=True)


@pytest.mark.parametrize("owed", [3, 10, 13, 25, 1000])
def test_bytes_that_went_are_not_sent_again(owed):
    """Also when the driver took chains back meanwhile, and fewer bytes are there."""
    ring = Ring()
    memory = record()
    queue_of(ring, record=memory)
    ring.data[: 3 * 0x1000 : 0x1000] = 1, 2, 3
    for i, length in enumerate((10, 10, 10)):
        ring.data[0x1000 * i : 0x1000 * i + length] = 10 * i + np.arange(length)
        ring.driver.add([(DATA + 0x1000 * i, length)], [])
    ring.driver.publish()
    words(memory)[LEFT] = owed
    queue = queue_of(ring, record=memory, resume=True)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(10)
    kick = os.eventfd(0, os.EFD_NONBLOCK)
    with ours, theirs, Pump() as pump:
        pump.guest_to_host(
            queue, write_fd=ours.fileno(), kick_fd=kick, call_fd=-1, on_event=lambda *_: None
        )
        received = theirs.recv(99) if owed < 30 else b""
        assert received == bytes(range(30))[owed:]
        used = []
        wait_until(lambda: used.extend(ring.driver.get_used()[0]) or len(used) == 3)
    os.close(kick)


# --- ends that are asked how far they came: a call that the record has open

FILE, RELAY = 3, 4


class End:
    """A queue whose record has a call open, and a flow that goes on with it.

    Args:
        lengths: of the chains that the driver offers.
        opened: state, position and bytes of the call.
        left: bytes before it.
    """

    def __init__(self, lengths, opened, *, left=0, packed=False, writable=False):
        self.ring = Ring(packed=packed)
        self.record = record()
        queue_of(self.ring, record=self.record)
        for i, length in enumerate(lengths):
            at = 0x1000 * i
            self.ring.data[at : at + length] = 10 * i + np.arange(length)
            chain = [(DATA + at, length)]
            self.ring.driver.add([], chain) if writable else self.ring.driver.add(chain, [])
        self.ring.driver.publish()
        state, position, asked = opened
        words(self.record)[:5] = state, words(self.record)[POSITION], left, position, asked
        self.queue = queue_of(self.ring, record=self.record, resume=True)
        self.events = []
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.pump = Pump()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pump.close()
        os.close(self.kick)

    def go_on(self, **how):
        attach = self.pump.guest_to_host if "write_fd" in how else self.pump.host_to_guest
        return attach(
            self.queue,
            **how,
            kick_fd=self.kick,
            call_fd=-1,
            on_event=lambda event, detail: self.events.append(event),
        )

    def used(self, count):
        """The lengths of so many completed chains."""
        found = []
        wait_until(lambda: found.extend(self.ring.driver.get_used()[1]) or len(found) >= count)
        return [int(length) for length in found]


@pytest.fixture
def pipe():
    with pipes(1) as made:
        yield made[0]


@contextmanager
def pipes(count):
    made = [os.pipe2(os.O_NONBLOCK) for _ in range(count)]
    yield made
    for fd in (fd for pair in made for fd in pair):
        os.close(fd)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("position", "asked", "gone"),
    [
        (10, 30, 0),  # the call has not happened
        (7, 30, 3),
        (0, 10, 10),
        (0, 4, 4),  # somebody else has appended to it
        (99, 30, 10),  # somebody has cut it off, and then it was written
    ],
)
def test_the_position_of_a_file_tells_what_was_written(tmp_path, packed, position, asked, gone):
    (tmp_path / "file").write_bytes(b"0123456789")
    fd = os.open(tmp_path / "file", os.O_WRONLY)
    os.lseek(fd, 10, os.SEEK_SET)
    with End((10, 10, 10), (FILE, position, asked), left=5, packed=packed) as end:
        end.go_on(write_fd=fd, kept=True)
        end.used(3)
    os.close(fd)
    expected = bytes(range(30))[5 + gone :]
    assert (tmp_path / "file").read_bytes() == b"0123456789" + expected


def test_the_position_of_a_file_that_is_not_kept_tells_nothing(tmp_path):
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.write(b"0123456789")
        with End((10, 10), (FILE, 0, 20)) as end:
            end.go_on(write_fd=file.fileno())
            end.used(2)
    assert (tmp_path / "file").read_bytes() == b"0123456789" + bytes(range(20))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("position", "given"), [(6, 0), (2, 4), (9, 0)])
def test_the_position_of_a_file_tells_what_was_read(tmp_path, packed, position, given):
    """What was read is in the guest's buffers, whose chains are to be completed."""
    (tmp_path / "file").write_bytes(b"012345" + b"the rest")
    with (
        (tmp_path / "file").open("rb", buffering=0) as file,
        End((4, 8), (FILE, position, 12), packed=packed, writable=True) as end,
    ):
        file.seek(6)
        end.go_on(read_fd=file.fileno(), kept=True)
        assert end.used(2) == [4, 8] if given else [4, 4]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("held", "gone"), [(20, 0), (8, 12), (0, 20), (25, 0)])
def test_what_the_relay_does_not_have_any_more_was_written(packed, held, gone):
    with pipes(2) as ((out, into), relay):
        os.write(relay[1], b"?" * held)
        with End((10, 10, 10), (RELAY, 0, 20), left=5, packed=packed) as end:
            end.go_on(write_fd=into, relay=relay)
            end.used(3)
        assert os.read(out, 99) == bytes(range(30))[5 + gone :]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("given", [0, 3, 6])
def test_what_the_relay_does_not_have_any_more_is_with_the_guest(packed, given):
    with pipes(2) as ((out, _), relay):
        os.write(relay[1], b"inside"[given:])
        with End((8, 8), (RELAY, 0, 6), packed=packed, writable=True) as end:
            flow = end.go_on(read_fd=out, relay=relay)
            lengths = end.used((given > 0) + (given < 6))
            assert lengths == [n for n in (given, 6 - given) if n]
            flow.detach()


def test_a_relay_is_emptied_of_what_is_in_the_queue_again():
    """The driver may take its buffers back, and what is in the relay with them."""
    with pipes(2) as ((_out, into), relay):
        os.write(into, bytes(1 << 16))  # there is no room
        ring = Ring()
        kick = os.eventfd(0, os.EFD_NONBLOCK)
        with Pump() as pump:
            flow = pump.guest_to_host(
                queue_of(ring, record=record()),
                write_fd=into,
                kick_fd=kick,
                call_fd=-1,
                relay=relay,
                on_event=lambda *_: None,
            )
            ring.chain(100)
            os.eventfd_write(kick, 1)
            wait_until(lambda: flow.counters.kicks)
            assert flow.detach() == b""
            assert ring.driver.get_used()[0].tolist() == []
        os.close(kick)
        with pytest.raises(BlockingIOError):
            os.read(relay[0], 1)


@pytest.mark.parametrize("bad", ["blocking", "file"])
def test_a_relay_is_a_pipe_that_does_not_block(pipe, bad, tmp_path):
    with (tmp_path / "file").open("wb") as file, End((1,), (0, 0, 0)) as end:
        relay = (pipe[0], file.fileno()) if bad == "file" else pipe
        os.set_blocking(pipe[0], bad == "blocking")
        with pytest.raises(LocalMisuseError, match="is no pipe, or it is blocking"):
            end.go_on(write_fd=pipe[1], relay=relay)


def test_a_terminal_that_is_not_spliced_is_told_once():
    """A terminal with O_APPEND is such a one, and all of them in kernels before 5.11."""
    master, slave = os.openpty()
    tty.setraw(slave)
    flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_APPEND
    fd = os.open(os.ttyname(slave), flags)
    with pipes(1) as (relay,), End((10, 10), (0, 0, 0)) as end:
        end.go_on(write_fd=fd, relay=relay)
        end.used(2)
        wait_until(lambda: end.pump.dispatch() or end.events)
        assert os.read(master, 99) == bytes(range(20))
        assert end.events == [FlowEvent.INEXACT]
    for number in (fd, master, slave):
        os.close(number)
