"""Backlogs that outlive the process: what is in them, and who has put it there."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager

import numpy as np
import pytest

from tests.support.rings import DATA, Ring
from tests.support.waiting import wait_until
from vring import RECORD_SIZE, Backlog, LocalMisuseError, Pump

HEAD = 256
ROOM = 4096 - HEAD
#: Numbers in an area: of the store's record, and of the store.
STATE, ASKED, ADDED, NUMBER = 8, 12, 16, 17
#: And of a queue's record.
KEPT, KEPT_IN = 13, 15


@pytest.fixture
def area():
    return np.zeros(4096, np.uint8)


def numbers(memory):
    return memory.view(np.uint64)


@contextmanager
def stream_pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


def fill(sock):
    """Leave no room; return the number of bytes."""
    count = 0
    while True:
        try:
            count += sock.send(b"*" * 4096)
        except BlockingIOError:
            return count


def drain(sock, count):
    """Read so many bytes."""
    found = b""
    while len(found) < count:
        found += sock.recv(count - len(found))
    return found


def test_what_is_put_in_is_there_for_the_next_one(area):
    assert Backlog(area).data == b""
    assert Backlog(area).replace(b"first")
    again = Backlog(area)
    assert again.data == b"first"
    for i in range(2 * ROOM // 1000):  # around the end
        data = bytes([i]) * 1000
        assert again.replace(data)
        assert Backlog(area).data == data


def test_what_there_is_no_room_for_is_not_put_in(area):
    backlog = Backlog(area)
    assert backlog.replace(bytes(ROOM))
    assert not backlog.replace(bytes(ROOM + 1))
    assert backlog.data == b""


def test_an_area_is_memory_that_is_large_enough_and_aligned():
    for bad in (np.zeros(511, np.uint8), np.zeros(4104, np.uint8)[1:]):
        with pytest.raises(LocalMisuseError, match="512 bytes or more, aligned to 8"):
            Backlog(bad)
    with pytest.raises((BufferError, ValueError)):
        Backlog(bytes(4096))


@pytest.mark.parametrize("added", [ROOM + 1, 1 << 63, (1 << 64) - 1])
def test_a_number_of_bytes_that_cannot_be_is_not_believed(area, added):
    Backlog(area)
    numbers(area)[ADDED] = added
    backlog = Backlog(area)
    assert backlog.data == b""
    assert backlog.replace(b"whole")
    assert Backlog(area).data == b"whole"


def test_it_is_written_as_there_is_room(area):
    backlog = Backlog(area)
    backlog.replace(b"goes on")
    with stream_pair() as (ours, theirs):
        count = fill(ours)
        with pytest.raises(BlockingIOError):
            backlog.write_to(ours.fileno())
        assert Backlog(area).data == b"goes on"
        drain(theirs, count)
        assert backlog.write_to(ours.fileno()) == 7
        assert theirs.recv(99) == b"goes on"
    assert Backlog(area).data == b""


def test_what_the_kernel_says_of_the_last_call_counts(area):
    Backlog(area).replace(b"01234567")
    numbers(area)[STATE] = 1
    area.view(np.uint32)[14] = 5  # the call's length
    with stream_pair() as (ours, theirs):
        backlog = Backlog(area)
        assert backlog.data == b"567"
        assert backlog.write_to(ours.fileno()) == 3
        assert theirs.recv(99) == b"567"


def test_what_a_relay_does_not_have_any_more_was_written(area):
    Backlog(area).replace(b"01234567")
    numbers(area)[STATE], numbers(area)[ASKED] = 4, 8
    pipes = [os.pipe2(os.O_NONBLOCK) for _ in range(2)]
    (out, into), relay = pipes
    os.write(relay[1], b"567")
    backlog = Backlog(area)
    assert backlog.write_to(into, relay=relay) == 3
    assert os.read(out, 99) == b"567"
    assert backlog.data == b""
    for fd in (fd for pair in pipes for fd in pair):
        os.close(fd)


class Guest:
    """A ring with a record, and a pump's flow to a socket."""

    def __init__(self, area, ours, *, packed=False, lossy=True):
        self.ring = Ring(packed=packed)
        self.record = np.zeros(RECORD_SIZE, np.uint8)
        self.backlog = Backlog(area)
        self.lossy = lossy
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.pump = Pump()
        self.queue = self.queue_of()
        self.flow = self.flow_to(ours)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pump.close()
        os.close(self.kick)

    def queue_of(self, **how):
        ring = self.ring
        kind = type(ring.queue)
        places = (ring.desc, ring.avail, ring.used)
        return kind(ring.memory, ring.queue.size, *places, record=self.record, **how)

    def flow_to(self, ours):
        return self.pump.guest_to_host(
            self.queue,
            write_fd=ours.fileno(),
            kick_fd=self.kick,
            call_fd=-1,
            on_event=lambda *_: None,
            lossy=self.lossy,
            backlog=self.backlog,
        )

    def say(self, data):
        self.ring.data[: len(data)] = np.frombuffer(data, np.uint8)
        self.ring.driver.add([(DATA, len(data))], [])
        self.ring.driver.publish()
        os.eventfd_write(self.kick, 1)

    def wait_used(self):
        wait_until(lambda: len(self.ring.driver.get_used()[0]))


@pytest.mark.parametrize("packed", [False, True])
def test_what_a_console_says_to_a_slow_reader_is_in_the_backlog(area, packed):
    with stream_pair() as (ours, theirs):
        count = fill(ours)
        with Guest(area, ours, packed=packed) as guest:
            for data in (b"one", b"two"):
                guest.say(data)
                guest.wait_used()
            with pytest.raises(LocalMisuseError, match="until it is detached"):
                _ = guest.backlog.data
            with pytest.raises(LocalMisuseError, match="until it is detached"):
                guest.pump.guest_to_host(
                    Ring().queue,
                    write_fd=-1,
                    kick_fd=guest.kick,
                    call_fd=-1,
                    on_event=lambda *_: None,
                    backlog=guest.backlog,
                )
            assert guest.flow.detach() == b""
            assert guest.backlog.data == Backlog(area).data == b"onetwo"
            guest.flow_to(ours)
            drain(theirs, count)
            wait_until(lambda: _peek(theirs) == b"onetwo")
        assert Backlog(area).data == b""


def _peek(sock):
    try:
        return sock.recv(99, socket.MSG_PEEK)
    except BlockingIOError:
        return b""


def test_a_queues_record_has_what_was_added_last(area):
    with stream_pair() as (ours, _):
        fill(ours)
        with Guest(area, ours) as guest:
            guest.say(b"counted")
            guest.wait_used()
            guest.flow.detach()
            numbers(area)[ADDED] = 0  # as if it had been killed before that store
            assert Backlog(area).data == b""
            guest.backlog = Backlog(area)
            guest.flow_to(ours).detach()
            assert guest.backlog.data == b"counted"
            # Of another backlog, the record says nothing.
            numbers(area)[ADDED], numbers(area)[NUMBER] = 0, 77
            guest.backlog = Backlog(area)
            guest.flow_to(ours).detach()
            assert guest.backlog.data == b""
            assert numbers(guest.record)[KEPT] == 0
            assert numbers(guest.record)[KEPT_IN] == 77


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("enough", [500, 4500])
def test_the_rest_of_a_chain_is_in_the_backlog_if_there_is_room(area, packed, enough):
    data = bytes(np.random.default_rng(1).integers(0, ord("*"), 8000, dtype=np.uint8))
    with stream_pair() as (ours, theirs):
        fill(ours)
        with Guest(area, ours, packed=packed, lossy=False) as guest:
            guest.say(data)
            heard = b""
            while len(heard) < enough:  # and room for a part of it, each time
                heard += _after(theirs, b"*")
            residue = guest.flow.detach()
            rest = residue or guest.backlog.data
            assert bool(residue) == (len(rest) > ROOM)
            assert (heard + _all(theirs) + rest) == data
            guest.wait_used()


def _after(sock, noise):
    try:
        return sock.recv(500).lstrip(noise)
    except BlockingIOError:
        return b""


def _all(sock):
    found = b""
    while piece := _peek(sock):
        found += sock.recv(len(piece))
    return found


def test_a_residue_beside_a_backlog_is_refused(area):
    ring = Ring()
    kick = os.eventfd(0)
    with Pump() as pump, pytest.raises(LocalMisuseError, match="a residue beside a Backlog"):
        pump.guest_to_host(
            ring.queue,
            write_fd=-1,
            kick_fd=kick,
            call_fd=-1,
            residue=b"x",
            on_event=lambda *_: None,
            backlog=Backlog(area),
        )
    os.close(kick)
