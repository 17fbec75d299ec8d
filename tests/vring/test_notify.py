"""Kicks and calls to descriptors whose other owner wants them to block."""

from __future__ import annotations

import itertools
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.call_end import CallEnd
from tests.support.waiting import DEADLINE, wait_until
from vring import Drained, Pump, drain, notify
from vring.testing import GuestQueue

FULL = 2**64 - 2
QUEUE, SLOT = 64, 2048


pytestmark = pytest.mark.usefixtures("blocked_call_ends_the_run")


@pytest.fixture
def eventfd() -> Iterator[int]:
    """Blocking, as a hostile peer has it."""
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


def test_an_eventfd_counts(eventfd: int) -> None:
    for _ in range(1000):  # more than there is room for in what the kernel tells of them
        notify(eventfd)
    assert os.eventfd_read(eventfd) == 1000


def test_a_full_eventfd_does_not_block(eventfd: int) -> None:
    os.eventfd_write(eventfd, FULL)
    for _ in range(10):
        notify(eventfd)
    assert os.eventfd_read(eventfd) >= FULL
    notify(eventfd)
    assert os.eventfd_read(eventfd) == 1


def test_while_the_peer_fills_it_again_and_again(eventfd: int) -> None:
    """Between any check and a write after it."""
    done = False

    def fill() -> None:
        while not done:
            os.eventfd_write(eventfd, FULL)
            os.eventfd_read(eventfd)

    # It may end up waiting for room itself.
    peer = threading.Thread(target=fill, daemon=True)
    peer.start()
    until = time.monotonic() + 1  # a race, which takes what turns it gets in this time
    while time.monotonic() < until:
        notify(eventfd)
    done = True
    while peer.is_alive():
        drain(eventfd)
        peer.join(0.01)


def test_in_many_threads(eventfd: int) -> None:
    threads = [
        threading.Thread(target=lambda: [notify(eventfd) for _ in range(20_000)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.eventfd_read(eventfd) == 80_000


def test_in_a_child_of_fork(eventfd: int) -> None:
    notify(eventfd)
    child = os.fork()
    if child == 0:
        notify(eventfd)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    notify(eventfd)
    assert os.eventfd_read(eventfd) == 3


def test_sockets() -> None:
    a, b = socket.socketpair()
    with a, b:
        notify(a.fileno())
        assert b.recv(100) == (1).to_bytes(8, "little")
        a.setblocking(False)
        try:
            while True:
                a.send(bytes(4096))
        except BlockingIOError:
            a.setblocking(True)
        notify(a.fileno())
        b.close()
        notify(a.fileno())
    notify(-1)


def test_nothing_is_written_to_what_is_neither(tmp_path: Path) -> None:
    """A pipe's reader can hold its lock, and a file system may take as long as it likes."""
    reader, writer = os.pipe2(os.O_NONBLOCK)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        for fd in (writer, file):
            notify(fd)
        assert drain(reader) is Drained.EMPTY
        assert os.fstat(file).st_size == 0
    finally:
        for fd in (reader, writer, file):
            os.close(fd)


def test_an_empty_eventfd_is_not_waited_for(eventfd: int) -> None:
    assert drain(eventfd) is Drained.EMPTY
    os.eventfd_write(eventfd, 3)
    assert drain(eventfd) is Drained.READ
    assert drain(eventfd) is Drained.EMPTY
    assert drain(-1) is Drained.ENDED


@pytest.mark.parametrize("incoming", [False, True])
def test_the_pump_goes_on_while_a_call_cannot_be_written(incoming: bool) -> None:
    """All flows share its thread: those of the guest that blocks, and everybody else's."""
    data = np.zeros(GuestQueue.bytes_needed(QUEUE, SLOT), np.uint8)
    guest = GuestQueue(data, QUEUE, SLOT, writable=incoming)
    kick_fd, call_fd = os.eventfd(0), os.eventfd(0)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(DEADLINE)
    events: list[object] = []
    arguments = {
        "kick_fd": kick_fd,
        "call_fd": call_fd,
        "on_event": lambda *event: events.append(event),
    }
    with ours, theirs, Pump() as pump:
        if incoming:
            flow = pump.host_to_guest(guest.device_queue(), read_fd=ours.fileno(), **arguments)
        else:
            flow = pump.guest_to_host(guest.device_queue(), write_fd=ours.fileno(), **arguments)
        # Only now: what was found before says nothing.
        os.set_blocking(call_fd, True)
        os.eventfd_write(call_fd, FULL)
        for turn in range(20):
            if incoming:
                guest.offer()
                os.eventfd_write(kick_fd, 1)
                theirs.sendall(b"%d" % turn)
                wait_until(lambda turn=turn: guest.receive() == b"%d" % turn)
            else:
                guest.send(b"%2d" % turn, [2])
                os.eventfd_write(kick_fd, 1)
                assert theirs.recv(100) == b"%2d" % turn
                wait_until(lambda: len(guest.collect()))
        assert flow.counters.calls > 1
        flow.detach()
    assert select.select([call_fd], [], [], 0)[0]
    os.close(kick_fd)
    os.close(call_fd)
    assert events == []


class CalledFlow:
    """A flow to nowhere that is attached with one call descriptor, to be exchanged for others."""

    def __init__(self, pump: Pump, call_fd: int) -> None:
        data = np.zeros(GuestQueue.bytes_needed(QUEUE, SLOT), np.uint8)
        self.guest = GuestQueue(data, QUEUE, SLOT, writable=False)
        self.kick_fd = os.eventfd(0)
        self.call_fd = os.dup(call_fd)
        self.flow = pump.guest_to_host(
            self.guest.device_queue(),
            write_fd=-1,
            kick_fd=self.kick_fd,
            call_fd=self.call_fd,
            on_event=lambda event, detail: None,
            lossy=True,  # a console's driver is called for each chain
        )

    def exchange(self, fd: int) -> None:
        os.dup2(fd, self.call_fd)

    def send(self) -> None:
        self.guest.send(b"x", [1])
        os.eventfd_write(self.kick_fd, 1)

    def wait_used(self) -> None:
        wait_until(
            lambda: (self.guest.collect(), self.guest.driver.num_free == QUEUE)[1],
            "the pump goes on",
        )

    def close(self) -> None:
        self.flow.detach()
        os.close(self.kick_fd)
        os.close(self.call_fd)


def test_calls_of_a_running_flow_change_their_kind(make_call: Callable[[str], Any]) -> None:
    with Pump() as pump:
        for before, after in itertools.permutations(CallEnd.KINDS, 2):
            old, new = make_call(before), make_call(after)
            called = CalledFlow(pump, old.fd)
            for call in (old, new, old):
                called.exchange(call.fd)
                for _ in range(3):
                    called.send()
                    call.wait()
                    called.wait_used()
            called.close()


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM", "SOCK_SEQPACKET"])
def test_a_socket_in_an_eventfds_place_is_sent_to(
    eventfd: int, make_call: Callable[[str], Any], kind: str
) -> None:
    """poll would say that it has no room, and what it says holds for no write after it anyway."""
    call = make_call(kind)
    with Pump() as pump, socket.socket(fileno=os.dup(call.fd)) as sock:
        called = CalledFlow(pump, eventfd)
        called.exchange(call.fd)
        sock.send(bytes(1024))
        assert not select.select([], [call.fd], [], 0)[1]
        called.send()
        called.wait_used()
        called.close()
    assert call.received() == bytes(1024) + (1).to_bytes(8, "little")
