"""What the control plane does to ports, a thousand times each under traffic: no byte is lost,
doubled or out of place.

The guest is a thread of its own that knows nothing of it; so is the peer.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from vring import Flow, GuestMemory, Pump, Region
from vring.testing import GuestQueue

ROUNDS = 1000
#: Of a prime length, so that a shifted stream does not match again soon.
PATTERN = random.Random(5).randbytes(65_521)
SIZE, SLOT = 64, 2048
#: Any part as long as all buffers of a queue together, whatever it starts with.
REPEATED = PATTERN * (2 + SIZE * SLOT // len(PATTERN))


def expected(start: int, length: int) -> bytes:
    """This part of the stream that both directions carry."""
    start %= len(PATTERN)
    assert start + length <= len(REPEATED)
    return REPEATED[start : start + length]


class Guest(threading.Thread):
    """Sends or receives the stream until told to stop; sleeps only for calls."""

    def __init__(self, *, writable: bool, event_idx: bool, position: int = 0) -> None:
        super().__init__()
        self.event_idx = event_idx
        self.data = np.zeros(GuestQueue.bytes_needed(SIZE, SLOT), np.uint8)
        self.guest = GuestQueue(
            self.data, SIZE, SLOT, writable=writable, event_idx=event_idx, index=65_000
        )
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0)
        self.position = position
        self.done = False
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.done:
                self.receive() if self.guest.writable else self.send()
                if not self.guest.driver.enable_notifications():
                    os.eventfd_read(self.call_fd)
        except BaseException as error:
            self.failure = error

    def send(self) -> None:
        rng = random.Random(self.position)
        self.guest.collect()
        while self.guest.driver.num_free and not self.done:
            n = rng.randint(1, self.guest.driver.num_free)
            lengths = [rng.randint(1, SLOT) for _ in range(min(n, 30))]
            total = sum(lengths)
            if self.guest.send(expected(self.position, total), lengths):
                os.eventfd_write(self.kick_fd, 1)
            self.position += total

    def collect_all(self) -> None:
        data = self.guest.receive()
        assert data == expected(self.position, len(data)), f"at {self.position}"
        self.position += len(data)

    def receive(self) -> None:
        self.collect_all()
        if self.guest.offer():
            os.eventfd_write(self.kick_fd, 1)

    def stop(self) -> None:
        self.done = True
        os.eventfd_write(self.call_fd, 1)
        self.join(10)
        os.close(self.kick_fd)
        os.close(self.call_fd)
        if self.failure:
            raise self.failure


class Peer(threading.Thread):
    """Reads or writes the stream at one end of a socket, until that is closed."""

    def __init__(self, end: socket.socket, position: int, *, writes: bool) -> None:
        super().__init__()
        self.end = end
        self.position = position
        self.writes = writes
        self.failure: BaseException | None = None

    def run(self) -> None:
        rng = random.Random(self.position)
        try:
            while True:
                n = rng.randint(1, 20_000)
                if self.writes:
                    self.position += self.end.send(expected(self.position, n))
                else:
                    data = self.end.recv(n)
                    if not data:
                        return
                    assert data == expected(self.position, len(data)), f"at {self.position}"
                    self.position += len(data)
        except (BrokenPipeError, ConnectionResetError):
            return
        except BaseException as error:
            self.failure = error

    def finish(self) -> int:
        """The position in the stream, when all is read."""
        self.join(10)
        assert not self.is_alive()
        if self.failure:
            raise self.failure
        return self.position


class Port:
    """A port under test: a guest, a peer behind a socket, and a flow between them."""

    def __init__(self, pump: Pump, *, incoming: bool, event_idx: bool) -> None:
        self.pump = pump
        self.incoming = incoming
        self.guest = Guest(writable=incoming, event_idx=event_idx)
        self.queue = self.guest.guest.device_queue()
        self.peer_position = 0
        self.moved = 0
        self.residue = b""
        self.connect()
        self.guest.start()

    def connect(self) -> None:
        self.ours, theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        self.theirs = theirs
        self.peer = Peer(theirs, self.peer_position, writes=self.incoming)
        self.peer.start()

    def disconnect(self) -> None:
        """The host end closes. Bytes that the pump has not read are the next one's to send."""
        if self.incoming:
            self.theirs.shutdown(socket.SHUT_RDWR)
            self.peer.finish()
            self.peer_position = self.moved
        self.ours.close()
        if not self.incoming:
            self.peer_position = self.peer.finish()
        self.theirs.close()

    def attach(self) -> Flow:
        options = {
            "kick_fd": self.guest.kick_fd,
            "call_fd": self.guest.call_fd,
            "on_event": print,
        }
        fd = self.ours.fileno()
        if self.incoming:
            self.flow = self.pump.host_to_guest(self.queue, read_fd=fd, **options)
        else:
            self.flow = self.pump.guest_to_host(
                self.queue, write_fd=fd, residue=self.residue, **options
            )
        return self.flow

    def detach(self) -> None:
        self.residue = self.flow.detach()
        assert self.queue.in_flight == 0
        self.moved += self.flow.counters.bytes

    def close(self) -> None:
        self.disconnect()
        self.guest.stop()


def reattach(port: Port) -> None:
    """The port was closed and opened: nothing else changes."""


def new_peer(port: Port) -> None:
    port.disconnect()
    port.connect()


def new_memory(port: Port) -> None:
    """The memory map changed: the same bytes, in other regions."""
    data, start = port.guest.data, 0x10_0000
    cut = len(data) - SIZE * SLOT + random.randrange(SIZE * SLOT)
    port.queue.memory = GuestMemory([Region(start, data[:cut]), Region(start + cut, data[cut:])])


def new_queue(port: Port) -> None:
    """The rings stopped, and started at the index where they had stopped (GET_VRING_BASE)."""
    rings = port.guest.guest
    assert port.queue.used_index == port.queue.avail_index
    port.queue = rings.device_queue(index=port.queue.avail_index)


def reset(port: Port) -> None:
    """The driver resets the device and sends again what was not taken, from new memory."""
    port.guest.stop()
    if port.incoming:
        port.guest.collect_all()
        position = port.guest.position
        assert position == port.moved
    else:
        position = port.moved + len(port.residue)
    port.guest = Guest(writable=port.incoming, event_idx=port.guest.event_idx, position=position)
    port.queue = port.guest.guest.device_queue()
    port.guest.start()


@pytest.mark.parametrize("incoming", [False, True], ids=["guest_to_host", "host_to_guest"])
@pytest.mark.parametrize("change", [reattach, new_peer, new_memory, new_queue, reset])
def test_change_under_traffic(change: Callable[[Port], None], incoming: bool) -> None:
    rng = random.Random(9)
    with Pump(busy_poll_us=20 if change is new_memory else 0) as pump:
        port = Port(pump, incoming=incoming, event_idx=change is not new_queue)
        bystander = Port(pump, incoming=not incoming, event_idx=True)
        bystander.attach()
        try:
            for _ in range(ROUNDS):
                port.attach()
                if rng.random() < 0.5:
                    time.sleep(rng.random() * 0.0005)  # so that it ends at any moment
                port.detach()
                change(port)
            assert port.moved > 10 * SIZE * SLOT
            bystander.detach()
            assert bystander.moved
        finally:
            port.close()
            bystander.close()


def test_ports_come_and_go_from_several_threads() -> None:
    """Two threads attach and detach ports of one pump, as two devices in one process would."""
    with Pump() as pump:
        ports = [Port(pump, incoming=i % 2 == 1, event_idx=True) for i in range(4)]
        failures: list[BaseException] = []

        def work(mine: list[Port]) -> None:
            try:
                for _ in range(ROUNDS // 4):
                    for port in mine:
                        port.attach()
                    for port in mine:
                        port.detach()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(ports[i::2],)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for port in ports:
            port.close()
        assert failures == []
        assert all(port.moved for port in ports)
