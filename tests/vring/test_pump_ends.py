"""How the pump's flows end: peers that leave, bytes that are left over, rings that break."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Callable

import pytest

from tests.support.waiting import wait_until
from vring import FlowEvent, Pump
from vring.errors import ChainError

ALL = socket.MSG_WAITALL


# --- the end of a peer


def test_end_of_file_comes_after_the_last_byte(
    make_rig: Callable, sockets, pump: Pump, assert_asleep: Callable, pump_turn: Callable
) -> None:
    rig = make_rig(writable=True)
    rig.read_from(sockets[0].fileno())
    sockets[1].sendall(b"last words")
    sockets[1].close()
    pump_turn()
    assert_asleep()
    pump.dispatch()
    assert not rig.events  # unread bytes: not the end
    rig.offer(1, 4)
    assert rig.wait_used(1) == [4]
    pump.dispatch()
    assert not rig.events
    rig.offer(1)
    assert rig.wait_used(1) == [6]
    assert rig.wait_event() == (FlowEvent.PEER_EOF, None)


@pytest.mark.parametrize("half", [False, True])
def test_end_of_file_without_any_buffer(make_rig: Callable, sockets, half: bool) -> None:
    rig = make_rig(writable=True)
    rig.read_from(sockets[0].fileno())
    if half:
        sockets[1].shutdown(socket.SHUT_WR)
    else:
        sockets[1].close()
    assert rig.wait_event() == (FlowEvent.PEER_EOF, None)
    assert rig.queue.in_flight == 0


def test_error_leaves_the_chains_to_the_next_peer(make_rig: Callable, sockets) -> None:
    rig = make_rig(writable=False)
    rig.write_to(sockets[0].fileno())
    sockets[1].close()
    rig.send(b"for the next one", [4, 12])
    assert rig.wait_event() == (FlowEvent.PEER_ERROR, errno.EPIPE)
    assert len(rig.guest.collect()) == 0
    assert rig.flow.detach() == b""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        rig.write_to(ours.fileno())
        assert theirs.recv(100) == b"for the next one"
        rig.flow.detach()


def test_reset_connection(make_rig: Callable) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        peer = socket.create_connection(server.getsockname())
        end, _ = server.accept()
    end.setblocking(False)
    rig = make_rig(writable=True)
    with end:
        rig.read_from(end.fileno())
        rig.offer()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.close()
        assert rig.wait_event() == (FlowEvent.PEER_ERROR, errno.ECONNRESET)
        rig.flow.detach()


def left_with_last_words(make_rig: Callable, sockets):
    """Both directions of a socket whose peer said goodbye and left, and heard nothing any more."""
    out, into = make_rig(writable=False), make_rig(writable=True)
    out.write_to(sockets[0].fileno())
    into.read_from(sockets[0].fileno())
    sockets[1].sendall(b"goodbye")
    sockets[1].close()
    out.send(b"too late")
    return out, into


def test_an_error_of_the_writer_is_told_although_nobody_reads(make_rig: Callable, sockets) -> None:
    """Its owner decides for how long the reader goes on: an end of file may never come."""
    out, into = left_with_last_words(make_rig, sockets)
    assert out.wait_event() == (FlowEvent.PEER_ERROR, errno.EPIPE)
    assert into.events == []
    out.flow.detach()
    into.offer()
    assert into.receive(7) == b"goodbye"
    assert into.wait_event() == (FlowEvent.PEER_EOF, None)


# --- residue


def test_half_written_chain_becomes_residue(make_rig: Callable, sockets) -> None:
    rig = make_rig(writable=False, size=8, slot=1 << 20)
    flow = rig.write_to(sockets[0].fileno())
    stream = random.Random(2).randbytes(3 << 20)
    rig.send(stream, [1 << 20] * 3)
    wait_until(lambda: flow.counters.throttled_ns)
    residue = flow.detach()
    assert flow.detach() == b""
    assert not flow.attached
    taken = flow.counters.bytes
    assert 0 < taken < 1 << 20
    assert residue == stream[taken : 1 << 20]
    assert rig.queue.in_flight == 0
    assert len(rig.guest.collect()) == 1
    assert rig.queue.available() == 2

    first = sockets[1].recv(taken, ALL)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        flow = rig.write_to(ours.fileno(), residue=residue)
        wait_until(lambda: flow.counters.throttled_ns)
        rest = flow.detach()  # of the residue itself
        second = theirs.recv(flow.counters.bytes, ALL)
        flow = rig.write_to(ours.fileno(), residue=rest)
        third = theirs.recv(len(stream) - len(first) - len(second), ALL)
        assert first + second + third == stream
        rig.wait_used(2)
        assert flow.detach() == b""


def test_close_keeps_the_residue(make_rig: Callable, sockets) -> None:
    with Pump() as pump:
        rig = make_rig(pump=pump, writable=False, size=8, slot=1 << 20)
        flow = rig.write_to(sockets[0].fileno())
        rig.send(bytes(1 << 20))
        wait_until(lambda: flow.counters.throttled_ns)
    assert not flow.attached
    assert len(flow.detach()) == (1 << 20) - flow.counters.bytes
    assert flow.detach() == b""
    assert rig.queue.in_flight == 0


# --- consoles


def test_console_is_never_throttled(make_rig: Callable, sockets, pump: Pump) -> None:
    rig = make_rig(writable=False, size=64)
    sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    flow = rig.write_to(sockets[0].fileno(), lossy=True, backlog=100_000)
    stream = random.Random(3).randbytes(64 * 4096)
    rig.send(stream, [4096] * 64)
    assert rig.wait_used(64) == [0] * 64
    assert rig.wait_event()[0] == FlowEvent.OVERFLOW
    dropped = flow.counters.dropped
    assert flow.counters.bytes + 100_000 + dropped == len(stream)
    rig.send(b"away with this")
    rig.wait_used(1)
    pump.dispatch()
    assert rig.events == []  # told once, until there is room again
    assert flow.counters.dropped == dropped + 14
    kept = len(stream) - dropped
    assert sockets[1].recv(kept, ALL) == stream[:kept]
    rig.send(b"and on")
    assert sockets[1].recv(6, ALL) == b"and on"
    assert flow.detach() == b""


def test_console_backlog_is_residue(make_rig: Callable, sockets) -> None:
    rig = make_rig(writable=False, size=64)
    sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    flow = rig.write_to(sockets[0].fileno(), lossy=True)
    stream = random.Random(4).randbytes(64 * 4096)
    rig.send(stream, [4096] * 64)
    rig.wait_used(64)
    residue = flow.detach()
    assert residue == stream[flow.counters.bytes :]


def test_console_goes_on_when_its_peer_is_gone(make_rig: Callable, sockets) -> None:
    rig = make_rig(writable=False)
    rig.write_to(sockets[0].fileno(), lossy=True)
    sockets[1].close()
    for _ in range(3):
        rig.send(b"hello?")
        assert rig.wait_used(1) == [0]
    assert rig.wait_event() == (FlowEvent.PEER_ERROR, errno.EPIPE)
    assert rig.flow.counters.dropped == 18
    rig.pump.dispatch()
    assert rig.events == []


# --- broken rings


def test_broken_ring_stops_that_flow_only(make_rig: Callable, sockets) -> None:
    good, bad = make_rig(writable=False), make_rig(writable=False)
    for rig in (good, bad):
        rig.write_to(sockets[0].fileno())
    at = bad.guest.addresses[0]
    bad.guest.memory.write(int(at) - 0, b"fine")
    bad.driver.add([(int(at), 4)], [])
    bad.guest.memory.write(0x10_0000 + 16 + 12, b"\1\0\1\0")  # descriptor 1 points at itself
    bad.guest.memory.write(0x10_0000 + 64 * 16 + 4 + 2, b"\1\0")
    bad.driver.publish()
    bad.guest.memory.write(0x10_0000 + 64 * 16 + 2, b"\2\0")
    bad.kick()
    event, error = bad.wait_event()
    assert event == FlowEvent.RING_BROKEN
    assert isinstance(error, ChainError)
    assert error.queue == "port 1"
    assert sockets[1].recv(100) == b"fine"  # what came before is good
    bad.kick()
    good.send(b"goes on")
    assert sockets[1].recv(100) == b"goes on"
    assert bad.flow.detach() == b""
    with pytest.raises(ChainError):
        bad.queue.pop_many()
