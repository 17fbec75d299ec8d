"""The pump over every kind of descriptor a chardev or a transport may hand it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import socket
import stat
import tty
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.waiting import wait_until
from vring import FlowEvent, GuestMemory, Pump, Region, notify
from vring.testing import GuestQueue

STREAM = random.Random(7).randbytes(1_000_000)


def test_pipes(make_rig: Callable, descriptors: Callable) -> None:
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    descriptors(read_end, write_end)
    out, into = make_rig(writable=False, size=256), make_rig(writable=True, size=256)
    into.offer()
    out.write_to(write_end)
    into.read_from(read_end)
    out.send(STREAM, [4096] * 244 + [len(STREAM) - 244 * 4096])  # much more than a pipe holds
    assert into.receive(len(STREAM)) == STREAM


@pytest.mark.parametrize("idle", [False, True])
def test_pipe_whose_reader_left(make_rig: Callable, descriptors: Callable, idle: bool) -> None:
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    descriptors(write_end)
    rig = make_rig(writable=False)
    rig.write_to(write_end)
    os.close(read_end)
    if not idle:
        rig.send(b"x")
    assert rig.wait_event() == (FlowEvent.PEER_ERROR, errno.EPIPE)


@pytest.mark.parametrize("buffers", [0, 10])
def test_pipe_whose_writer_left(
    make_rig: Callable, descriptors: Callable, buffers: int, pump_turn: Callable
) -> None:
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    descriptors(read_end)
    rig = make_rig(writable=True)
    rig.offer(buffers)
    rig.read_from(read_end)
    os.write(write_end, b"left")
    os.close(write_end)
    if not buffers:
        pump_turn()
        rig.pump.dispatch()
        assert rig.events == []
        rig.offer(1)
    assert rig.receive(4) == b"left"
    assert rig.wait_event() == (FlowEvent.PEER_EOF, None)


def test_fifo_open_both_ways_never_ends(make_rig: Callable, descriptors, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    fd = descriptors(os.open(tmp_path / "fifo", os.O_RDWR | os.O_NONBLOCK))
    rig = make_rig(writable=True)
    rig.offer()
    rig.read_from(fd)
    for word in (b"one", b"two"):
        with open(tmp_path / "fifo", "wb") as fifo:
            fifo.write(word)
        assert rig.receive(3) == word
    rig.pump.dispatch()
    assert rig.events == []


def test_terminal_both_ways(
    make_rig: Callable, assert_asleep: Callable, pump_turn: Callable
) -> None:
    master, slave = os.openpty()
    tty.setraw(slave)
    os.set_blocking(master, False)
    out, into = make_rig(writable=False, size=256), make_rig(writable=True)
    into.offer()
    out.write_to(master)
    into.read_from(master)
    out.send(STREAM[:900_000], [4096] * 219 + [900_000 - 219 * 4096])
    received = b""
    while len(received) < 900_000:
        received += os.read(slave, 65536)
    assert received == STREAM[:900_000]
    os.write(slave, b"typed")
    assert into.receive(5) == b"typed"
    os.write(slave, b"last")
    os.close(slave)
    assert into.receive(4) == b"last"
    assert into.wait_event() == (FlowEvent.PEER_EOF, None)
    out.send(b"nobody there")  # a terminal takes that for whoever opens it next
    pump_turn()
    assert_asleep()
    out.flow.detach()
    into.flow.detach()
    os.close(master)


def test_terminal_closed_with_bytes_left_and_no_buffer(
    make_rig: Callable, descriptors, pump_turn: Callable
) -> None:
    master, slave = os.openpty()
    descriptors(master)
    tty.setraw(slave)
    os.set_blocking(master, False)
    rig = make_rig(writable=True)
    rig.read_from(master)
    os.write(slave, b"last")
    os.close(slave)
    pump_turn()
    rig.pump.dispatch()
    assert rig.events == []
    rig.offer()
    assert rig.receive(4) == b"last"
    assert rig.wait_event() == (FlowEvent.PEER_EOF, None)


def test_regular_files(make_rig: Callable, descriptors: Callable, tmp_path: Path) -> None:
    path = tmp_path / "file"
    rig = make_rig(writable=False, size=256)
    rig.write_to(descriptors(os.open(path, os.O_WRONLY | os.O_CREAT)))
    rig.send(STREAM, [4096] * 244 + [len(STREAM) - 244 * 4096])
    rig.wait_used(245)
    assert path.read_bytes() == STREAM

    rig = make_rig(writable=True)
    rig.offer()
    rig.read_from(descriptors(os.open(path, os.O_RDONLY)))
    assert rig.receive(len(STREAM)) == STREAM
    assert rig.wait_event() == (FlowEvent.PEER_EOF, None)


def test_null_and_nowhere(make_rig: Callable, descriptors: Callable) -> None:
    null = descriptors(os.open("/dev/null", os.O_RDWR))
    for fd in (null, -1):
        rig = make_rig(writable=False, size=256)
        rig.write_to(fd)
        rig.send(STREAM, [4096] * 244 + [len(STREAM) - 244 * 4096])
        assert rig.wait_used(245) == [0] * 245
        assert rig.flow.counters.bytes == len(STREAM)
    rig = make_rig(writable=True)
    rig.offer()
    rig.read_from(null)
    assert rig.wait_event() == (FlowEvent.PEER_EOF, None)


def test_full_disk(make_rig: Callable, descriptors: Callable) -> None:
    full = descriptors(os.open("/dev/full", os.O_WRONLY))
    rig = make_rig(writable=False)
    rig.write_to(full)
    rig.send(b"too much")
    assert rig.wait_event() == (FlowEvent.PEER_ERROR, errno.ENOSPC)
    rig.flow.detach()
    rig.write_to(-1)
    rig.wait_used(1)

    console = make_rig(writable=False)
    console.write_to(full, lossy=True)
    for _ in range(2):
        console.send(b"too much")
        console.wait_used(1)
    assert console.wait_event() == (FlowEvent.PEER_ERROR, errno.ENOSPC)
    assert console.flow.counters.dropped == 16


def test_descriptors_stay_open(make_rig: Callable, sockets) -> None:
    rig = make_rig(writable=False)
    rig.write_to(sockets[0].fileno()).detach()
    rig.send(b"x")
    for fd in (sockets[0].fileno(), rig.kick_fd, rig.call_fd):
        assert os.fstat(fd)


# --- notifiers


def test_call_over_a_socket_is_eight_bytes(make_rig: Callable, sockets) -> None:
    """User-Mode Linux reads its interrupts from a socket."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ours, theirs:
        rig = make_rig(writable=False, size=4)
        flow = rig.write_to(-1, call_fd=ours.fileno())
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        rig.send(b"x")
        wait_until(lambda: flow.counters.calls)
        assert theirs.recv(100) == (1).to_bytes(8, "little")
        rig.guest.collect()
        for i in range(300):  # a guest that does not read its interrupts, on a blocking socket
            rig.send(b"x")
            wait_until(lambda i=i: flow.counters.calls == i + 2)
            rig.guest.collect()
        assert 8 <= len(theirs.recv(1 << 16)) < 300 * 8
        theirs.close()  # nor does a guest that left harm anything
        rig.send(b"x")
        wait_until(lambda: flow.counters.calls == 302)
        assert flow.detach() == b""


def test_full_call_eventfd_blocks_nothing(make_rig: Callable, descriptors) -> None:
    """The frontend chose the descriptor: it may be blocking, and full."""
    call = descriptors(os.eventfd(0))
    os.eventfd_write(call, 2**64 - 2)
    rig = make_rig(writable=False)
    flow = rig.write_to(-1, call_fd=call)
    rig.send(b"x")
    wait_until(lambda: flow.counters.calls == 1)
    assert flow.detach() == b""


def test_a_semaphore_as_kick_costs_nothing(
    make_rig: Callable, sockets, descriptors: Callable, assert_asleep: Callable
) -> None:
    """It stays readable for as long as its other owner likes."""
    kick = descriptors(os.eventfd(0, os.EFD_SEMAPHORE))
    rig = make_rig(writable=False)
    rig.write_to(sockets[0].fileno(), kick_fd=kick)
    for i in range(3):
        rig.guest.send(b"%d" % i, [1])
        os.eventfd_write(kick, 1 << 40)
        assert sockets[1].recv(1) == b"%d" % i
        rig.wait_used(1)
        assert_asleep()
    rig.flow.detach()


def test_kick_over_a_socket(make_rig: Callable, sockets) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        rig = make_rig(writable=False)
        rig.write_to(sockets[0].fileno(), kick_fd=ours.fileno())
        for i in range(1000):
            assert rig.guest.send(b"%4d" % i, [4]) in (True, False)
            theirs.send(bytes(8))
            assert sockets[1].recv(4, socket.MSG_WAITALL) == b"%4d" % i
            rig.wait_used(1)
        rig.flow.detach()
        theirs.close()


def test_kick_over_a_socket_that_somebody_filled(
    make_rig: Callable, sockets, assert_asleep: Callable
) -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ours, theirs:
        with contextlib.suppress(BlockingIOError):
            while True:
                theirs.send(bytes(4096))
        rig = make_rig(writable=False)
        rig.write_to(sockets[0].fileno(), kick_fd=ours.fileno())
        for i in range(3):
            assert_asleep()  # and asking for a kick
            rig.guest.send(b"%d" % i, [1])
            notify(theirs.fileno())
            assert sockets[1].recv(1) == b"%d" % i
            rig.wait_used(1)
        rig.flow.detach()


def test_driver_without_calls(make_rig: Callable, sockets) -> None:
    rig = make_rig(writable=False)
    flow = rig.write_to(sockets[0].fileno(), call_fd=-1)
    rig.send(b"x")
    assert sockets[1].recv(1) == b"x"
    wait_until(lambda: len(rig.guest.collect()))
    assert flow.counters.calls == 0


# --- memory


def test_chain_of_more_segments_than_a_call_takes(make_rig: Callable, sockets) -> None:
    rig = make_rig(writable=False, size=4096, slot=16)
    at = rig.guest.addresses
    rig.guest.slots[:] = np.frombuffer(STREAM, np.uint8, 4096 * 16).reshape(4096, 16)
    rig.driver.add([(int(at[i]), 16) for i in range(3000)], [])
    rig.driver.add([(int(at[i]), 16) for i in range(3000, 4096)], [])
    rig.publish()
    rig.write_to(sockets[0].fileno())
    assert sockets[1].recv(65536, socket.MSG_WAITALL) == STREAM[:65536]
    rig.wait_call()
    assert rig.queue.broken is None
    assert rig.flow.counters.chains == 2

    rig = make_rig(writable=True, size=4096, slot=16)
    rig.driver.add([], [(int(at[i]), 16) for i in range(4096)])
    rig.publish()
    rig.read_from(sockets[0].fileno())
    sockets[1].sendall(STREAM[:10_000])
    assert rig.wait_used(1) == [10_000]
    assert rig.guest.slots.tobytes()[:10_000] == STREAM[:10_000]


def test_buffers_across_region_borders(make_rig: Callable, sockets) -> None:
    rig = make_rig(writable=False, size=64)
    data = np.frombuffer(rig.guest.memory.regions[0].buffer, np.uint8)
    start, cut = 0x10_0000, GuestQueue.bytes_needed(64, 4096) - 64 * 4096
    borders = [0, *range(cut, len(data), 5000), len(data)]
    rig.queue = rig.guest.device_queue(
        memory=GuestMemory([Region(start + a, data[a:b]) for a, b in itertools.pairwise(borders)])
    )
    rig.write_to(sockets[0].fileno())
    for _ in range(3):
        rig.send(STREAM[: 64 * 4096], [4096] * 64)
        received = b""
        while len(received) < 64 * 4096:
            received += sockets[1].recv(1 << 20)
        assert received == STREAM[: 64 * 4096]
        rig.wait_used(64)


def test_many_ports_on_one_pump(make_rig: Callable, sockets, assert_asleep: Callable) -> None:
    """A device of 511 ports: all move, one after the other and at once, and idle ones sleep."""
    rigs = [make_rig(writable=i % 2 == 1, size=2, slot=64) for i in range(150)]
    for rig in rigs:
        if rig.guest.writable:
            rig.read_from(sockets[0].fileno())
        else:
            rig.write_to(sockets[0].fileno())
    for rig in rigs[::2]:
        rig.guest.send(b"x", [1])
    for rig in rigs[::2]:
        rig.kick()
    assert sockets[1].recv(75, socket.MSG_WAITALL) == b"x" * 75
    for rig in rigs[1::2]:
        rig.offer(1)
        sockets[1].send(b"y")
        assert rig.wait_used(1) == [1]
    assert_asleep()


def test_blocked_signals_reach_others(make_rig: Callable) -> None:
    """The thread takes no signal from the program: all are blocked in it."""
    masks = []
    for task in Path("/proc/self/task").iterdir():
        status = dict(
            line.split(":\t")
            for line in (task / "status").read_text().splitlines()
            if ":\t" in line
        )
        if status["Name"] == "vring-pump":
            masks.append(int(status["SigBlk"], 16))
    make_rig(writable=False)
    assert masks
    assert all(mask & 1 << 12 for mask in masks)  # SIGPIPE


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fork_leaves_the_pump_to_the_parent(make_rig: Callable, sockets) -> None:
    rig = make_rig(writable=False)
    rig.write_to(sockets[0].fileno())
    child = os.fork()
    if child == 0:
        rig.pump.close()
        os._exit(0)
    assert os.waitpid(child, 0) == (child, 0)
    rig.send(b"still here")
    assert sockets[1].recv(100) == b"still here"


def test_anonymous_inodes_have_no_file_type() -> None:
    """What the check of kick and call descriptors rests on."""
    fd = os.eventfd(0)
    try:
        assert stat.S_IFMT(os.fstat(fd).st_mode) == 0
    finally:
        os.close(fd)


def test_pumps_end_quickly() -> None:
    for _ in range(20):
        with Pump():
            pass
