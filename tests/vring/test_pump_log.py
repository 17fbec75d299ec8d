"""A flow's log: the guest's bytes once each, and nobody waits for it."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable

import pytest

from tests.support.waiting import wait_until
from vring import FlowEvent, LocalMisuseError, Pump

PAGE = 4096


@pytest.fixture
def log(descriptors: Callable[..., int]) -> tuple[int, int]:
    """Both ends of a pipe, to read from and to write to."""
    ends = os.pipe2(os.O_NONBLOCK)
    descriptors(*ends)
    return ends


def read_all(fd: int) -> bytes:
    found = b""
    try:
        while piece := os.read(fd, 1 << 20):
            found += piece
    except BlockingIOError:
        pass
    return found


@pytest.mark.parametrize("index", [0, 65530])
def test_what_the_descriptor_takes_is_logged(make_rig: Callable, sockets, log, index: int) -> None:
    rig = make_rig(writable=False, index=index)
    rig.write_to(sockets[0].fileno(), log_fd=log[1])
    for i in range(40):
        message = os.urandom(2 + 150 * i)
        rig.send(message, [len(message) // 2, len(message) - len(message) // 2])
        rig.wait_used(2)
        assert sockets[1].recv(len(message), socket.MSG_WAITALL) == message
        assert read_all(log[0]) == message
    assert rig.flow.counters.unlogged == 0


def test_bytes_that_are_taken_in_pieces_are_logged_once(
    make_rig: Callable, sockets, log, pump: Pump
) -> None:
    """Of a chain that the descriptor takes in part, the rest is logged when the flow ends."""
    fcntl.fcntl(log[1], fcntl.F_SETPIPE_SZ, 1 << 20)
    sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * PAGE)
    rig = make_rig(writable=False, size=4, slot=200_000)
    flow = rig.write_to(sockets[0].fileno(), log_fd=log[1])
    message = os.urandom(200_000)
    rig.send(message)
    wait_until(lambda: flow.counters.bytes)
    received = sockets[1].recv(1000)
    wait_until(lambda: flow.counters.throttled_ns)
    residue = flow.detach()
    assert residue
    assert rig.wait_used(1) == [0]
    assert read_all(log[0]) == message
    flow = rig.write_to(sockets[0].fileno(), log_fd=log[1], residue=residue)
    while len(received) < len(message):
        received += sockets[1].recv(1 << 20)
    rig.send(b"more")
    received += sockets[1].recv(4, socket.MSG_WAITALL)
    assert received == message + b"more"
    rig.wait_used(1)
    assert read_all(log[0]) == b"more"


def test_a_consoles_log_has_what_its_reader_misses(
    make_rig: Callable, sockets, log, pump: Pump
) -> None:
    fcntl.fcntl(log[1], fcntl.F_SETPIPE_SZ, 1 << 20)
    sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * PAGE)
    rig = make_rig(writable=False)
    flow = rig.write_to(sockets[0].fileno(), log_fd=log[1], lossy=True, backlog=100)
    message = os.urandom(60 * PAGE)
    rig.send(message, [PAGE] * 60)
    assert len(rig.wait_used(60)) == 60
    assert rig.wait_event()[0] is FlowEvent.OVERFLOW
    assert flow.counters.dropped
    assert read_all(log[0]) == message
    flow.detach()
    assert read_all(log[0]) == b""


def test_nobody_waits_for_a_log_that_is_full(make_rig: Callable, sockets, log, pump: Pump) -> None:
    fcntl.fcntl(log[1], fcntl.F_SETPIPE_SZ, PAGE)
    rig = make_rig(writable=False)
    flow = rig.write_to(sockets[0].fileno(), log_fd=log[1])
    first, second, third = (os.urandom(length) for length in (3000, 3000, 500))
    for message in (first, second):
        rig.send(message)
        assert sockets[1].recv(3000, socket.MSG_WAITALL) == message
        rig.wait_used(1)
    lost = 3000  # a pipe takes so few bytes whole, or not at all
    assert rig.wait_event() == (FlowEvent.UNLOGGED, lost)
    assert read_all(log[0]) == first
    rig.send(third)
    rig.wait_used(1)
    assert read_all(log[0]) == third
    assert flow.counters.unlogged == lost
    assert not rig.events


def test_a_log_without_a_descriptor(make_rig: Callable, log) -> None:
    rig = make_rig(writable=False)
    rig.write_to(-1, log_fd=log[1], lossy=True)
    rig.send(b"for the log alone", [3, 14])
    rig.wait_used(2)
    assert read_all(log[0]) == b"for the log alone"


def test_a_log_is_a_pipe_that_does_not_block(make_rig: Callable, sockets, log) -> None:
    rig = make_rig(writable=False)
    with pytest.raises(LocalMisuseError, match="log_fd"):
        rig.write_to(sockets[0].fileno(), log_fd=sockets[1].fileno())
    os.set_blocking(log[1], True)
    with pytest.raises(LocalMisuseError, match="log_fd"):
        rig.write_to(sockets[0].fileno(), log_fd=log[1])
