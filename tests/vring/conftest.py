"""Pumps, and what they move bytes between."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.port_rig import PortRig
from tests.support.pump import pump_turn as through_the_pump
from tests.support.waiting import wait_until
from vring import Pump


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
