"""Records: a killed process leaves its ring and its stream so that the next one goes on exactly."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest

from tests.support.processes import number_of
from tests.support.rings import DATA, Ring
from tests.support.waiting import wait_until
from vring import RECORD_SIZE, LocalMisuseError, PackedQueue, Pump, SplitQueue

PROGRAM = Path(__file__).with_name("killed_pump.py")


@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize(("end", "how"), [("socket", "kill"), ("socket", "halt"), ("pipe", "halt")])
def test_a_device_that_ends_at_any_moment_loses_and_doubles_nothing(layout, direction, end, how):
    """A socket's may be killed; that of a pipe may be halted."""
    assert number_of(PROGRAM, layout, direction, "60", "1", end, how) > 100_000


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
