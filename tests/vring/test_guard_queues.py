"""Queues and flows whose memory is cut off: no zeros are taken for the guest's bytes."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.waiting import DEADLINE, wait_until
from vring import Batch, FlowEvent, GuestMemory, MemoryWatch, Pump, Region, RingError
from vring.errors import MemoryLostError
from vring.testing import GuestQueue

QUEUE, SLOT = 64, 2048


class Guest:
    """A stream's end over a memfd that it can cut off, and the device's view of that."""

    def __init__(self, *, writable: bool) -> None:
        self.memfd = os.memfd_create("guest")
        size = -(-GuestQueue.bytes_needed(QUEUE, SLOT) // 4096) * 4096
        os.ftruncate(self.memfd, size)
        self.watch = MemoryWatch()
        self.own = Region.map(self.memfd, size, guest_addr=0)
        self.guest = GuestQueue(
            self.own, QUEUE, SLOT, writable=writable, event_idx=True, guest_addr=0
        )
        region = Region.map(self.memfd, size, guest_addr=0, watch=self.watch)
        self.queue = self.guest.device_queue(memory=GuestMemory([region]))
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK)

    def cut_off(self) -> None:
        os.ftruncate(self.memfd, 0)

    def told(self) -> bool:
        return bool(select.select([self.watch], [], [], DEADLINE)[0])

    def close(self) -> None:
        for fd in (self.memfd, self.kick_fd, self.call_fd):
            os.close(fd)


@pytest.fixture
def make_guest() -> Iterator[Callable[..., Guest]]:
    made: list[Guest] = []

    def make(**options: bool) -> Guest:
        made.append(Guest(**options))
        return made[-1]

    yield make
    for guest in made:
        guest.close()


# --- queues


def test_a_queue_says_that_its_memory_is_lost(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(writable=False)
    guest.guest.send(b"x" * 100, [100])
    guest.cut_off()
    with pytest.raises(MemoryLostError, match="cut off"):
        guest.queue.pop_many()
    assert isinstance(guest.queue.broken, MemoryLostError)
    assert guest.queue.in_flight == 0


@pytest.mark.parametrize(
    "take",
    [
        lambda batch: batch.gather(),
        lambda batch: batch.gather_into(bytearray(100)),
        lambda batch: batch[0].read(),
    ],
)
def test_zeros_are_not_taken_for_the_guests_bytes(
    make_guest: Callable[..., Guest], take: Callable[[Batch], object]
) -> None:
    guest = make_guest(writable=False)
    guest.guest.send(b"x" * 100, [100])
    batch = guest.queue.pop_many()
    assert batch.gather() == b"x" * 100
    guest.cut_off()
    with pytest.raises(MemoryLostError):
        take(batch)


# --- the pump


def wait_for(events: list[tuple[FlowEvent, object]], pump: Pump) -> tuple[FlowEvent, object]:
    wait_until(lambda: (pump.dispatch(), events)[1], "an event")
    return events[0]


@pytest.mark.parametrize("incoming", [False, True])
@pytest.mark.parametrize("slots", ["small", "large"])
def test_the_pump_stops_and_says_why(
    make_guest: Callable[..., Guest], incoming: bool, slots: str
) -> None:
    """Small segments are copied (a signal), large ones given to a system call (EFAULT)."""
    length = 100 if slots == "small" else SLOT
    guest = make_guest(writable=incoming)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    events: list[tuple[FlowEvent, object]] = []
    arguments = {
        "kick_fd": guest.kick_fd,
        "call_fd": guest.call_fd,
        "on_event": lambda *event: events.append(event),
    }
    with ours, theirs, Pump() as pump:
        if incoming:
            guest.guest.offer()
            flow = pump.host_to_guest(guest.queue, read_fd=ours.fileno(), **arguments)
            theirs.sendall(b"h" * 10)
            wait_until(lambda: guest.guest.receive() == b"h" * 10)
        else:
            flow = pump.guest_to_host(guest.queue, write_fd=ours.fileno(), **arguments)
        guest.cut_off()
        if incoming:
            theirs.sendall(b"h" * length)
        os.eventfd_write(guest.kick_fd, 1)
        event, detail = wait_for(events, pump)
        assert event is FlowEvent.RING_BROKEN
        assert isinstance(detail, MemoryLostError)
        assert guest.told()
        assert flow.detach() == b""
        if not incoming:
            theirs.setblocking(False)
            with pytest.raises(BlockingIOError):
                theirs.recv(1)


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("length", [100, SLOT])
def test_no_zeros_reach_the_host(
    make_guest: Callable[..., Guest], lossy: bool, length: int
) -> None:
    """Under traffic, again and again: what the host gets is what the guest sent, and no more."""
    for attempt in range(30):
        guest = make_guest(writable=False)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.settimeout(DEADLINE)
        events: list[tuple[FlowEvent, object]] = []
        sent = threading.Event()

        def send(guest: Guest = guest, sent: threading.Event = sent) -> None:
            while not sent.is_set() and not guest.own.lost:
                try:
                    guest.guest.collect()
                    n = guest.guest.driver.num_free
                    if guest.guest.send(b"g" * length * n, [length] * n):
                        os.eventfd_write(guest.kick_fd, 1)
                except RingError:
                    return

        with ours, theirs, Pump() as pump:
            flow = pump.guest_to_host(
                guest.queue,
                write_fd=ours.fileno(),
                kick_fd=guest.kick_fd,
                call_fd=guest.call_fd,
                on_event=lambda *event, events=events: events.append(event),
                lossy=lossy,
            )
            sender = threading.Thread(target=send)
            sender.start()
            received = bytearray(theirs.recv(1 << 20))
            for _ in range(attempt):
                received += theirs.recv(1 << 20)
            theirs.setblocking(False)
            guest.cut_off()

            def is_broken(
                guest: Guest = guest,
                theirs: socket.socket = theirs,
                events: list[tuple[FlowEvent, object]] = events,
                received: bytearray = received,
            ) -> bool:
                os.eventfd_write(guest.kick_fd, 1)
                with contextlib.suppress(BlockingIOError):
                    received += theirs.recv(1 << 20)
                pump.dispatch()
                return any(event is FlowEvent.RING_BROKEN for event, _ in events)

            wait_until(is_broken)
            sent.set()
            sender.join()
            flow.detach()
            assert isinstance(events[-1][1], MemoryLostError)
            assert received == b"g" * len(received)


class Apart:
    """A queue whose buffers alone are in memory that is cut off: nothing else finds that out."""

    LENGTH = 1 << 20
    FIRST = 1 << 32

    def __init__(self) -> None:
        self.memfd = os.memfd_create("buffers")
        os.ftruncate(self.memfd, self.LENGTH)
        rings = bytearray(GuestQueue.bytes_needed(QUEUE, 1))
        self.guest = GuestQueue(rings, QUEUE, 1, writable=False, guest_addr=0)
        buffers = Region.map(self.memfd, self.LENGTH, guest_addr=self.FIRST)
        self.queue = self.guest.device_queue(memory=GuestMemory([Region(0, rings), buffers]))
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK)

    def send(self, length: int, count: int = 1) -> None:
        """Chains of as many bytes each, which hold whatever is there."""
        for _ in range(count):
            self.guest.driver.add([(self.FIRST, length)], [])
        if self.guest.driver.publish():
            os.eventfd_write(self.kick_fd, 1)

    def close(self) -> None:
        for fd in (self.memfd, self.kick_fd, self.call_fd):
            os.close(fd)


@pytest.fixture
def apart() -> Iterator[Apart]:
    apart = Apart()
    yield apart
    apart.close()


@pytest.mark.parametrize("count", [1, 5])
def test_no_zeros_go_into_a_backlog(apart: Apart, count: int) -> None:
    os.pwrite(apart.memfd, b"kept", 0)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    events: list[tuple[FlowEvent, object]] = []
    with ours, theirs, Pump() as pump:
        with contextlib.suppress(BlockingIOError):
            while ours.send(bytes(4096)):
                pass  # until it is full
        flow = pump.guest_to_host(
            apart.queue,
            write_fd=ours.fileno(),
            kick_fd=apart.kick_fd,
            call_fd=apart.call_fd,
            on_event=lambda *event: events.append(event),
            lossy=True,
        )
        apart.send(4)
        wait_until(lambda: len(apart.guest.collect()))
        os.ftruncate(apart.memfd, 0)
        apart.send(20, count)
        event, detail = wait_for(events, pump)
        assert event is FlowEvent.RING_BROKEN
        assert isinstance(detail, MemoryLostError)
        assert flow.detach() == b"kept"
        assert len(apart.guest.collect()) == 0


def test_no_zeros_become_residue(apart: Apart) -> None:
    os.pwrite(apart.memfd, b"g" * apart.LENGTH, 0)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs, Pump() as pump:
        flow = pump.guest_to_host(
            apart.queue,
            write_fd=ours.fileno(),
            kick_fd=apart.kick_fd,
            call_fd=apart.call_fd,
            on_event=lambda *event: None,
        )
        apart.send(apart.LENGTH)
        wait_until(lambda: flow.counters.throttled_ns)
        os.ftruncate(apart.memfd, 0)
        assert flow.detach() == b""
        taken = flow.counters.bytes
        assert 0 < taken < apart.LENGTH
        assert flow.counters.dropped == apart.LENGTH - taken
        assert theirs.recv(taken, socket.MSG_WAITALL) == b"g" * taken
        assert len(apart.guest.collect()) == 0
