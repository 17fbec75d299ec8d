"""Ports for the pump: a guest's queue, the device's queue and their notifiers, in one process."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.support.pump import pump_turn as through_the_pump
from tests.support.waiting import DEADLINE, wait_until
from vring import Flow, FlowEvent, Pump
from vring.testing import GuestQueue


class PortRig:
    """One direction of a port, with the guest's side in the caller's hands."""

    def __init__(
        self, pump: Pump, *, size: int = 64, slot: int = 4096, index: int = 0, **options: bool
    ) -> None:
        self.pump = pump
        data = np.zeros(GuestQueue.bytes_needed(size, slot), np.uint8)
        self.guest = GuestQueue(data, size, slot, index=index, **options)
        self.driver = self.guest.driver
        self.queue = self.guest.device_queue("port 1")
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.events: list[tuple[FlowEvent, object]] = []
        self.flow: Flow | None = None

    def notifiers(self) -> dict:
        return {
            "kick_fd": self.kick_fd,
            "call_fd": self.call_fd,
            "on_event": lambda event, detail: self.events.append((event, detail)),
        }

    def write_to(self, fd: int, **options: object) -> Flow:
        self.flow = self.pump.guest_to_host(
            self.queue, write_fd=fd, **{**self.notifiers(), **options}
        )
        return self.flow

    def read_from(self, fd: int, **options: object) -> Flow:
        self.flow = self.pump.host_to_guest(
            self.queue, read_fd=fd, **{**self.notifiers(), **options}
        )
        return self.flow

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    def send(self, data: bytes, lengths: list[int] | None = None) -> None:
        """All of `data`, as Linux would: buffers, then a kick if the device wants one."""
        if self.guest.send(data, lengths or [len(data)]):
            self.kick()

    def offer(self, count: int | None = None, length: int | None = None) -> None:
        if self.guest.offer(count, length):
            self.kick()

    def publish(self) -> None:
        """For chains added to the driver itself."""
        if self.driver.publish():
            self.kick()

    def wait_call(self, timeout: float = DEADLINE) -> None:
        assert select.select([self.call_fd], [], [], timeout)[0], "no call"
        os.eventfd_read(self.call_fd)

    def wait_used(self, chains: int, timeout: float = DEADLINE) -> list[int]:
        """Written lengths of the next chains used; sleeps on the call descriptor, as a guest."""
        lengths = list(self.guest.collect())
        while len(lengths) < chains:
            if not self.driver.enable_notifications():
                self.wait_call(timeout)
            lengths += list(self.guest.collect())
        assert len(lengths) == chains
        return lengths

    def receive(self, length: int, timeout: float = DEADLINE) -> bytes:
        """The next bytes; buffers go back to the device at once."""
        received = b""
        while len(received) < length:
            piece = self.guest.receive()
            if piece:
                received += piece
                self.offer()
            elif not self.driver.enable_notifications():
                self.wait_call(timeout)
        assert len(received) == length
        return received

    def wait_event(self, timeout: float = DEADLINE) -> tuple[FlowEvent, object]:
        """The next event."""
        if not self.events:
            assert select.select([self.pump.event_fd], [], [], timeout)[0], "no event"
            self.pump.dispatch()
        return self.events.pop(0)

    def close(self) -> None:
        if self.flow is not None:
            self.flow.detach()
        os.close(self.kick_fd)
        os.close(self.call_fd)


@pytest.fixture(scope="session")
def port_rig() -> type[PortRig]:
    """For tests that make their own pump."""
    return PortRig


@pytest.fixture
def pump() -> Iterator[Pump]:
    with Pump() as pump:
        yield pump


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The pump's end, non-blocking, and the peer's."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 5, 0))
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def descriptors() -> Iterator[Callable[..., int]]:
    """Keeps descriptors and closes them in the end."""
    held: list[int] = []

    def hold(*fds: int) -> int:
        held.extend(fds)
        return fds[0]

    yield hold
    for fd in held:
        os.close(fd)


@pytest.fixture
def make_rig(pump: Pump, sockets: object, descriptors: object) -> Iterator[Callable[..., PortRig]]:
    """Makes rigs, which are detached before those descriptors are closed."""
    rigs: list[PortRig] = []

    def make(**options: object) -> PortRig:
        rigs.append(PortRig(options.pop("pump", pump), **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def pump_turn(pump: Pump) -> Callable[..., None]:
    """See tests/support/pump.py; with no argument it is the test's own pump that is meant."""
    return lambda other=pump: through_the_pump(other)


@pytest.fixture
def assert_asleep() -> Callable[[], None]:
    """Asserts that the pumps' threads come to rest and stay there: idle means no wake-ups."""

    def count() -> int:
        total = 0
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/status") as status:
                lines = dict(line.split(":\t") for line in status if ":\t" in line)
            if lines["Name"].strip() == "vring-pump":
                total += int(lines["voluntary_ctxt_switches"])
                total += int(lines["nonvoluntary_ctxt_switches"])
        return total

    def rests() -> bool:
        before = count()
        time.sleep(0.1)  # that a thread sleeps, and goes on sleeping, only time can show
        return count() == before

    return lambda: wait_until(rests)
