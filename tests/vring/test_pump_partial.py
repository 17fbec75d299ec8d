"""Descriptors that take part of a write: what is left never waits for the guest to say more."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import resource
import select
import socket
import termios
import tty
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.waiting import DEADLINE
from vring import FlowEvent

STREAM = random.Random(11).randbytes(100_000).replace(b"\n", b"-")
Hold = Callable[..., int]


def unix_socket(hold: Hold) -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    ours.setblocking(False)
    return hold(ours.detach()), hold(theirs.detach())


def tcp_socket(hold: Hold) -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.socket()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        theirs.connect(server.getsockname())
        ours, _ = server.accept()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    ours.setblocking(False)
    return hold(ours.detach()), hold(theirs.detach())


def small_pipe(flags: int, hold: Hold) -> tuple[int, int]:
    theirs, ours = os.pipe2(flags | os.O_NONBLOCK)
    hold(theirs, ours)
    fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, 8192)
    return ours, theirs


def terminal(hold: Hold) -> tuple[int, int]:
    """The master's and the slave's descriptor, both raw and non-blocking."""
    master, slave = os.openpty()
    hold(master, slave)
    tty.setraw(slave)
    os.set_blocking(master, False)
    os.set_blocking(slave, False)
    return master, slave


def cooked_terminal(hold: Hold) -> tuple[int, int]:
    """As a process's own standard output: the slave, whose output the kernel processes."""
    master, slave = terminal(hold)
    mode = termios.tcgetattr(slave)
    mode[1] |= termios.OPOST | termios.ONLCR
    termios.tcsetattr(slave, termios.TCSANOW, mode)
    return slave, master


KINDS: dict[str, Callable[[Hold], tuple[int, int]]] = {
    "unix": unix_socket,
    "tcp": tcp_socket,
    "pipe": lambda hold: small_pipe(0, hold),
    "pipe-of-packets": lambda hold: small_pipe(os.O_DIRECT, hold),
    "pty-master": terminal,
    "pty-slave": lambda hold: terminal(hold)[::-1],
    "pty-slave-cooked": cooked_terminal,
}


def read_slowly(
    pump_turn: Callable[[], None], fd: int, length: int, piece: int, every: int
) -> bytes:
    """`length` bytes in pieces of `piece`; each `every`-th read waits until nothing more comes."""
    received = bytearray()
    turn = 0
    while len(received) < length:
        ready = select.select([fd], [], [], DEADLINE)[0]
        assert ready, f"{len(received)} of {length} bytes, and no more"
        if every and turn % every == 0:
            pump_turn()
        turn += 1
        received += os.read(fd, min(piece, length - len(received)))
    return bytes(received)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lossy", [True, False])
@pytest.mark.parametrize(("piece", "every"), [(1 << 20, 0), (4096, 3), (4095, 1), (611, 0)])
def test_all_arrives_without_another_kick(
    make_rig: Callable,
    descriptors: Hold,
    pump_turn: Callable,
    kind: str,
    lossy: bool,
    piece: int,
    every: int,
) -> None:
    """As many bytes as fill the descriptor many times, and a guest that says nothing afterwards."""
    ours, theirs = KINDS[kind](descriptors)
    if kind == "pipe-of-packets":
        piece = max(piece, select.PIPE_BUF)  # a packet's rest is lost to whoever asks for less
    rig = make_rig(writable=False, size=256)
    rig.write_to(ours, lossy=lossy)
    rig.send(STREAM, [1000] * 100)
    assert read_slowly(pump_turn, theirs, len(STREAM), piece, every) == STREAM
    rig.wait_used(100)
    rig.send(b"and on")
    assert read_slowly(pump_turn, theirs, 6, piece, 0) == b"and on"
    assert rig.flow.detach() == b""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lossy", [True, False])
def test_residue_arrives_without_a_kick(
    make_rig: Callable, descriptors: Hold, pump_turn: Callable, kind: str, lossy: bool
) -> None:
    """What an earlier flow left goes out although the guest has nothing to say at all."""
    ours, theirs = KINDS[kind](descriptors)
    rig = make_rig(writable=False)
    rig.write_to(ours, lossy=lossy, residue=STREAM)
    assert read_slowly(pump_turn, theirs, len(STREAM), 4096, 3) == STREAM
    assert rig.flow.detach() == b""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lossy", [True, False])
def test_a_full_descriptor_costs_nothing(
    make_rig: Callable,
    descriptors: Hold,
    assert_asleep: Callable,
    pump_turn: Callable,
    kind: str,
    lossy: bool,
) -> None:
    """Trying until it is full does not mean trying on."""
    ours, theirs = KINDS[kind](descriptors)
    rig = make_rig(writable=False, size=256)
    rig.write_to(ours, lossy=lossy)
    rig.send(STREAM, [1000] * 100)
    assert_asleep()
    assert read_slowly(pump_turn, theirs, len(STREAM), 1 << 20, 0) == STREAM


@pytest.mark.parametrize("lossy", [True, False])
@pytest.mark.parametrize("left_over", [0, 8000])
def test_a_file_at_its_limit(
    make_rig: Callable, descriptors: Hold, tmp_path: Path, lossy: bool, left_over: int
) -> None:
    """A file that takes a part is always ready: what it says to the rest must be heard."""
    fd = descriptors(os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK))
    rig = make_rig(writable=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        rig.write_to(fd, lossy=lossy, residue=STREAM[:left_over])
        if not left_over:
            rig.send(STREAM[:8000], [4000, 4000])
        assert rig.wait_event() == (FlowEvent.PEER_ERROR, errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "file").read_bytes() == STREAM[:5000]
    residue = rig.flow.detach()
    assert (rig.flow.counters.dropped, residue) == (
        (3000, b"") if lossy else (0, STREAM[5000:8000])
    )
