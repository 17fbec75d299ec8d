"""Whatever the device writes to guest memory is marked in the log, and nothing outside of it is."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from tests.support.waiting import wait_until
from vring import (
    LOG_PAGE,
    DirtyLog,
    GuestMemory,
    LocalMisuseError,
    PackedDriver,
    PackedQueue,
    Pump,
    Region,
    SplitDriver,
    SplitQueue,
)

PAGES = 600
SIZE = 512
#: Each part of the ring begins a page of its own.
DESC, AVAIL, USED, DATA = 0x10000, 0x20000, 0x30000, 0x40000


class Guest:
    """A ring of 512 descriptors near the end of its indices, in memory that is looked at by pages.

    Memory is two regions that touch at DATA + 0x8000.
    """

    def __init__(self, packed: bool, event_idx: bool, used_addr: int | None = None) -> None:
        self.bytes = np.zeros(PAGES * LOG_PAGE, np.uint8)
        border = DATA + 0x8000
        self.memory = GuestMemory(
            [Region(0, self.bytes[:border]), Region(border, self.bytes[border:])]
        )
        self.bits = np.zeros(PAGES // 8, np.uint8)
        self.log = DirtyLog(self.bits)
        index = SIZE - 3 | 0x8000 if packed else 65533
        if not packed:
            self.memory.write(USED + 2, index.to_bytes(2, "little"))
        parts = (self.memory, SIZE, DESC, AVAIL, USED)
        kinds: tuple[Any, Any] = (
            (PackedDriver, PackedQueue) if packed else (SplitDriver, SplitQueue)
        )
        self.driver = kinds[0](*parts, index=index, event_idx=event_idx)
        self.queue = kinds[1](*parts, index=index, event_idx=event_idx, name="q")
        self.queue.set_log(self.log, used_addr)

    def marked(self) -> set[int]:
        pages = np.flatnonzero(np.unpackbits(self.bits, bitorder="little"))
        self.bits[:] = 0
        return {int(page) for page in pages}

    @contextmanager
    def all_marked(self) -> Iterator[None]:
        """Fail if a page changes in the ``with`` and is not marked at its end."""
        before = self.bytes.copy()
        self.marked()
        yield
        changed = {int(at) // LOG_PAGE for at in np.flatnonzero(before != self.bytes)}
        assert changed
        assert changed - self.marked() == set()

    def offer(self, *buffers: tuple[int, int], together: bool = False) -> None:
        for chain in [buffers] if together else [(buffer,) for buffer in buffers]:
            self.driver.add((), chain)
        self.driver.publish()


LAYOUTS = [(packed, event_idx) for packed in (False, True) for event_idx in (False, True)]


@pytest.fixture(params=LAYOUTS, ids=lambda p: f"{'packed' if p[0] else 'split'}-{p[1]:d}")
def guest(request: pytest.FixtureRequest) -> Guest:
    return Guest(*request.param)


def push_written(guest: Guest) -> None:
    chain = guest.queue.pop()
    chain.write(b"x" * chain.writable_bytes)
    guest.queue.push(chain)


def push_through_views(guest: Guest) -> None:
    chain = guest.queue.pop()
    for view in chain.writable:
        view[:] = b"v" * len(view)
    guest.queue.push(chain, chain.writable_bytes)


def push_scattered(guest: Guest) -> None:
    batch = guest.queue.pop_many()
    used, written = batch.scatter(b"s" * int(batch.writable_bytes.sum()))
    guest.queue.push_many(batch, written, used)


def push_iterated(guest: Guest) -> None:
    for chain in guest.queue:
        chain.write(b"i" * chain.writable_bytes)


@pytest.mark.parametrize("push", [push_written, push_through_views, push_scattered, push_iterated])
def test_what_is_written_into_buffers_is_marked(
    guest: Guest, push: Callable[[Guest], None]
) -> None:
    # Over the border of the regions, and from the middle of a page to the middle of another.
    guest.offer((DATA + 0x7800, 0x3000), (DATA + 0x20000, 17), together=True)
    with guest.all_marked():
        push(guest)


def test_no_more_is_marked_than_was_written(guest: Guest) -> None:
    guest.offer((DATA, 16 * LOG_PAGE))
    guest.marked()
    chain = guest.queue.pop()
    chain.write(b"x" * (LOG_PAGE + 1))
    guest.queue.push(chain)
    data = DATA // LOG_PAGE
    assert {page for page in guest.marked() if page >= data} == {data, data + 1}


def test_the_ring_is_marked_where_it_wraps_around(guest: Guest) -> None:
    for _ in range(4):
        guest.offer(*[(DATA + i * 64, 8) for i in range(200)])
        with guest.all_marked():
            batch = guest.queue.pop_many()
            guest.queue.push_many(batch, 0)
        guest.driver.get_used()


def test_each_wish_for_kicks_is_marked(guest: Guest) -> None:
    quiet = guest.queue.event_idx and isinstance(guest.queue, SplitQueue)
    for change in (
        guest.queue.disable_notifications,
        guest.queue.enable_notifications,
        guest.queue.disable_notifications,
    ):
        before = guest.bytes.copy()
        guest.marked()
        change()
        if not quiet or change == guest.queue.enable_notifications:
            assert guest.marked() == {
                USED // LOG_PAGE,
                (USED + (4 + 8 * SIZE if quiet else 0)) // LOG_PAGE,
            } - ({USED // LOG_PAGE} if quiet else set())
        else:
            assert (before == guest.bytes).all()


@pytest.mark.parametrize("size", [64, 5000])
def test_what_a_pump_receives_is_marked(guest: Guest, size: int) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    kick_fd, call_fd = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    with ours, theirs, Pump() as pump:
        guest.offer(*[(DATA + i * 3000, 3000) for i in range(20)])
        theirs.sendall(b"r" * size)
        with guest.all_marked():
            flow = pump.host_to_guest(
                guest.queue,
                read_fd=ours.fileno(),
                kick_fd=kick_fd,
                call_fd=call_fd,
                on_event=lambda event, detail: None,
            )
            wait_until(lambda: flow.counters.bytes == size)
            flow.detach()
    os.close(kick_fd)
    os.close(call_fd)


def test_the_device_area_is_marked_under_the_address_that_stands_for_it() -> None:
    for packed in (False, True):
        guest = Guest(packed, False, used_addr=0x80000)
        guest.offer((DATA, 8))
        guest.marked()
        push_written(guest)
        guest.queue.enable_notifications()
        pages = guest.marked()
        assert 0x80 in pages
        assert USED // LOG_PAGE not in pages


def test_nothing_outside_the_log_is_touched() -> None:
    guard = np.full(64, 0xA5, np.uint8)
    log = DirtyLog(guard[16:18])
    guard[16:18] = 0
    assert log.end == 16 * LOG_PAGE
    log.mark(15 * LOG_PAGE, 1 << 40)
    log.mark(16 * LOG_PAGE, 1)
    log.mark(2**64 - 1, 2**64 - 1)
    log.mark(2**63, 1)
    log.mark(0, 0)
    assert guard[16:18].tolist() == [0, 0x80]
    log.mark(0, 2**64 - 1)
    assert guard[16:18].tolist() == [0xFF, 0xFF]
    assert set(guard[:16].tolist() + guard[18:].tolist()) == {0xA5}


def test_bits_that_others_set_stay() -> None:
    bits = bytearray(b"\x81")
    DirtyLog(bits).mark(3 * LOG_PAGE, LOG_PAGE)
    assert bits == b"\x89"


def bits_of(taken: bytearray) -> set[int]:
    return {at for at in range(8 * len(taken)) if taken[at // 8] >> at % 8 & 1}


@pytest.mark.parametrize("first", [0, 3, 8, 13])
@pytest.mark.parametrize("count", [1, 5, 8, 19])
def test_each_mark_is_taken_once_and_others_stay(first: int, count: int) -> None:
    log = DirtyLog(bytearray(8))
    marked = {0, 3, 7, 8, 13, 15, 16, 20, 40}
    for page in marked:
        log.mark(page * LOG_PAGE, 1)
    wanted = {page - first for page in marked if first <= page < first + count}
    assert bits_of(log.take(first * LOG_PAGE, count * LOG_PAGE)) == wanted
    assert not any(log.take(first * LOG_PAGE, count * LOG_PAGE))
    assert bits_of(log.take(0, 64 * LOG_PAGE)) == marked - {first + page for page in wanted}


def test_marks_are_taken_in_pages_of_any_size() -> None:
    log = DirtyLog(bytearray(8))

    def take(size: int) -> set[int]:
        for page in (2, 9, 10):
            log.mark(page * LOG_PAGE, 1)
        return bits_of(log.take(2 * LOG_PAGE, 10 * LOG_PAGE, size))

    assert take(LOG_PAGE) == {0, 7, 8}
    assert take(2 * LOG_PAGE) == {0, 3, 4}
    assert take(LOG_PAGE // 2) == {0, 1, 14, 15, 16, 17}
    assert take(1 << 40) == {0}
    log.mark(2 * LOG_PAGE, 1)
    assert bits_of(log.take(2 * LOG_PAGE + 100, 200, 64)) == {0, 1, 2, 3}, "within the range"


def test_what_has_no_bit_is_not_taken() -> None:
    log = DirtyLog(bytearray(b"\xff"))
    assert bits_of(log.take(7 * LOG_PAGE, 4 * LOG_PAGE)) == {0}
    assert not any(log.take(2**64 - 8 * LOG_PAGE, 8 * LOG_PAGE))
    assert log.take(0, 0) == b""
    with pytest.raises(LocalMisuseError, match="a page size of 0"):
        log.take(0, 1, 0)


def test_a_log_may_be_taken_away_again(guest: Guest) -> None:
    guest.queue.set_log(None)
    guest.offer((DATA, 8))
    guest.marked()
    push_written(guest)
    assert guest.marked() == set()


def test_what_cannot_be_a_log_is_refused(guest: Guest) -> None:
    with pytest.raises(LocalMisuseError, match="not writable"):
        DirtyLog(b"constant")
    with pytest.raises(LocalMisuseError, match="not an address of 64 bits"):
        guest.log.mark(-1, 1)
    with pytest.raises(LocalMisuseError, match="not an address of 64 bits"):
        guest.queue.set_log(guest.log, 2**64)
