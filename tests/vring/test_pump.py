"""The pump over sockets: what goes in comes out, and only then is a buffer used."""

from __future__ import annotations

import gc
import os
import random
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.port_rig import PortRig
from tests.support.waiting import DEADLINE, wait_until
from vring import FlowEvent, LocalMisuseError, Pump

ALL = socket.MSG_WAITALL


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("index", [0, 65530])
def test_guest_to_host(make_rig: Callable, sockets, event_idx: bool, index: int) -> None:
    rig = make_rig(writable=False, event_idx=event_idx, index=index)
    flow = rig.write_to(sockets[0].fileno())
    for i in range(20):
        message = os.urandom(1 + 300 * i)
        rig.send(message, [len(message) // 2, len(message) - len(message) // 2])
        assert sockets[1].recv(len(message), ALL) == message
        assert rig.wait_used(2) == [0, 0]
    counters = flow.counters
    assert counters.chains == 40
    assert counters.bytes == sum(1 + 300 * i for i in range(20))
    assert 1 <= counters.kicks <= 20
    # In a stream the last call comes a little after the last byte.
    wait_until(lambda: sum(flow.counters[4:6]) == counters.batches)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("index", [0, 65530])
def test_host_to_guest(make_rig: Callable, sockets, event_idx: bool, index: int) -> None:
    rig = make_rig(writable=True, event_idx=event_idx, index=index, size=16)
    flow = rig.read_from(sockets[0].fileno())
    rig.offer()
    for i in range(20):
        message = os.urandom(1 + 5000 * i)
        sockets[1].sendall(message)
        assert rig.receive(len(message)) == message
    assert flow.counters.bytes == sum(1 + 5000 * i for i in range(20))


def test_calls_and_kicks_are_few_in_a_stream(make_rig: Callable, sockets) -> None:
    """A driver that goes on is neither called nor made to kick for each of its chains; the last of
    them is announced all the same."""
    rig = make_rig(writable=False, event_idx=True, size=256, slot=64)
    flow = rig.write_to(sockets[0].fileno())
    count, used = 4000, 0
    for sent in range(1, count + 1):
        rig.send(bytes(64), [64])
        used += len(rig.guest.collect())
        if sent - used == 200:
            more: list[int] = []
            wait_until(lambda more=more: more.extend(rig.guest.collect()) or more)
            used += len(more)
        if sent % 100 == 0:
            assert len(sockets[1].recv(6400, ALL)) == 6400
    rig.wait_used(count - used)
    wait_until(lambda: sum(flow.counters[4:6]) == flow.counters.batches)
    assert flow.counters.chains == count
    assert flow.counters.kicks < count // 2
    assert flow.counters.calls < count // 2


def test_reader_that_is_behind_kicks_for_several_buffers_at_once(
    make_rig: Callable, sockets
) -> None:
    rig = make_rig(writable=True, event_idx=True, size=64, slot=1024, index=65_500)
    flow = rig.read_from(sockets[0].fileno())
    stream = os.urandom(160 * 1024)
    sockets[1].sendall(stream)
    rig.offer()
    wait_until(lambda: flow.counters.bytes == 64 * 1024)
    received = b""
    while len(received) < len(stream):
        data = rig.guest.receive()
        received += data
        for _ in range(len(data) // 1024):
            rig.offer(1)  # as Linux: each on its own, when the reader is done with it
        if not data and not rig.driver.enable_notifications():
            rig.wait_call()
    assert received == stream
    assert flow.counters.kicks <= 160 // 16


def test_buffers_made_available_before_the_flow_need_no_kick(make_rig: Callable, sockets) -> None:
    rig = make_rig(writable=False)
    rig.guest.send(b"early", [5])
    rig.write_to(sockets[0].fileno())
    assert sockets[1].recv(10) == b"early"


def test_written_lengths_are_exact_and_nothing_else_is_touched(make_rig: Callable, sockets) -> None:
    rig = make_rig(writable=True, slot=64)
    rig.guest.slots[:] = 0xEE
    heads = [
        rig.driver.add([], [(rig.guest.addresses[0], 10), (rig.guest.addresses[1], 7)]),
        rig.driver.add([], [(rig.guest.addresses[2], 5)]),
        rig.driver.add([], [(rig.guest.addresses[3], 5)]),
    ]
    rig.publish()
    rig.read_from(sockets[0].fileno())
    sockets[1].sendall(bytes(range(19)))
    rig.wait_call()
    used, lengths = rig.driver.get_used()
    assert (list(used), list(lengths)) == (heads[:2], [17, 2])
    slots = rig.guest.slots
    assert bytes(slots[0]) == bytes(range(10)) + b"\xee" * 54
    assert bytes(slots[1]) == bytes(range(10, 17)) + b"\xee" * 57
    assert bytes(slots[2]) == bytes(range(17, 19)) + b"\xee" * 62
    assert (slots[3:] == 0xEE).all()
    rig.flow.detach()
    assert rig.queue.in_flight == 0
    assert rig.queue.available() == 1


def test_chains_of_the_wrong_kind_are_bounded(make_rig: Callable, sockets) -> None:
    out = make_rig(writable=False)
    at = [int(a) for a in out.guest.addresses]
    out.guest.slots[:8, :3] = [[ord("a") + i] * 3 for i in range(8)]
    out.driver.add([(at[0], 3), (at[1], 3)], [(at[2], 3)])
    out.driver.add([], [(at[3], 3)])  # nothing to read
    out.driver.add([(at[4], 0)], [])  # no byte
    out.driver.add([(at[5], 3)], [(at[6], 3)])
    out.driver.add([(at[7], 3)], [])
    out.publish()
    out.write_to(sockets[0].fileno())
    assert sockets[1].recv(100) == b"aaabbbfffhhh"
    assert out.wait_used(5) == [0] * 5

    into = make_rig(writable=True)
    at = [int(a) for a in into.guest.addresses]
    into.driver.add([(at[0], 3)], [])  # no room at all
    into.driver.add([(at[1], 3)], [(at[2], 4), (at[3], 4)])
    into.driver.add([(at[4], 3)], [])
    into.driver.add([], [(at[5], 4)])
    into.publish()
    into.read_from(sockets[0].fileno())
    sockets[1].sendall(b"0123456789")
    assert into.wait_used(4) == [0, 8, 0, 2]
    assert bytes(into.guest.slots[2, :4]) + bytes(into.guest.slots[3, :4]) == b"01234567"
    assert bytes(into.guest.slots[5, :2]) == b"89"

    empty = make_rig(writable=True)
    empty.driver.add([(int(empty.guest.addresses[0]), 3)], [])
    empty.publish()
    empty.read_from(sockets[0].fileno())  # no room is not the end of file
    assert empty.wait_used(1) == [0]
    assert not empty.events


def test_slow_reader_stops_its_own_queue_only(
    make_rig: Callable, sockets, assert_asleep: Callable
) -> None:
    rig = make_rig(writable=False, size=256)
    flow = rig.write_to(sockets[0].fileno())
    stream = random.Random(1).randbytes(256 * 4096)
    rig.send(stream, [4096] * 256)
    wait_until(lambda: flow.counters.bytes)
    wait_until(lambda: flow.counters.throttled_ns)
    taken, chains = flow.counters.bytes, flow.counters.chains
    assert 0 < taken < len(stream)
    assert chains == taken // 4096  # what is used is what the socket took

    other = make_rig(writable=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        peer = socket.create_connection(server.getsockname())
        end, _ = server.accept()
    with end, peer:
        end.setblocking(False)
        other.write_to(end.fileno())
        other.send(b"not disturbed")
        assert peer.recv(100) == b"not disturbed"
        assert_asleep()
        assert flow.counters.bytes == taken
        other.flow.detach()

    received = b""
    while len(received) < len(stream):
        received += sockets[1].recv(1 << 20)
    assert received == stream
    assert rig.wait_used(256) == [0] * 256
    assert flow.counters.throttled_ns >= 100_000_000


@settings(max_examples=25)
@given(data=st.data())
def test_any_chunking_keeps_the_stream(data: st.DataObject) -> None:
    """Random chain shapes into a small socket, read in random pieces; and the same way back."""
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, data.draw(st.sampled_from([4608, 65536])))
    ours.setblocking(False)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 5, 0))
    with ours, theirs, Pump(busy_poll_us=data.draw(st.sampled_from([0, 50]))) as pump:
        out = PortRig(pump, writable=False, event_idx=data.draw(st.booleans()), index=65500)
        into = PortRig(pump, writable=True, event_idx=data.draw(st.booleans()), index=65500)
        out.write_to(ours.fileno())
        into.read_from(ours.fileno())
        for _ in range(data.draw(st.integers(1, 5))):
            lengths = data.draw(st.lists(st.integers(1, 4096), min_size=1, max_size=64))
            stream = rng.randbytes(sum(lengths))
            out.send(stream, lengths)
            received = b""
            while len(received) < len(stream):
                received += theirs.recv(rng.randint(1, 10_000))
            assert received == stream
            out.wait_used(len(lengths))
            into.offer(into.driver.num_free, rng.randint(1, 4096))
            back = rng.randbytes(rng.randint(1, 20_000))
            received = b""
            for start in range(0, len(back), 3000):
                theirs.sendall(back[start : start + 3000])
                received += into.receive(len(back[start : start + 3000]))
            assert received == back
        for rig in (out, into):
            assert rig.flow.detach() == b""
            assert rig.queue.in_flight == 0
            rig.close()


def test_throttled_time_never_goes_backwards(make_rig: Callable, sockets) -> None:
    """However often the peer makes room and the pump fills it while somebody looks."""
    rig = make_rig(writable=False, size=64, slot=1 << 20)
    ours, theirs = sockets
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    reader = subprocess.Popen(
        [sys.executable, "-c", "import os\nwhile os.read(0, 4096): pass"], stdin=theirs
    )
    try:
        flow = rig.write_to(ours.fileno())
        total = 0
        for _ in range(4):
            rig.offer()
            total += 64 << 20
            before = 0
            while flow.counters.bytes < total:
                now = flow.counters.throttled_ns
                assert now >= before
                before = now
            rig.wait_used(64)
        assert before > 0
    finally:
        reader.kill()
        reader.wait()


def test_driver_that_waits_for_several_chains(make_rig: Callable, sockets) -> None:
    rig = make_rig(writable=False, event_idx=True)
    flow = rig.write_to(sockets[0].fileno())
    assert not rig.driver.enable_notifications(after=4)
    for i in range(3):
        rig.send(b"x")
        wait_until(lambda i=i: flow.counters.chains == i + 1)
    assert flow.counters.calls == 0
    rig.send(b"x")
    rig.wait_call()
    assert flow.counters.calls == 1
    assert flow.counters.calls_saved == 3
    assert rig.driver.enable_notifications(after=4)
    assert not rig.driver.enable_notifications(after=5)


# --- events and life


def test_no_event_after_detach(
    make_rig: Callable, sockets, pump: Pump, pump_turn: Callable
) -> None:
    rig, other = make_rig(writable=True), make_rig(writable=True)
    rig.read_from(sockets[0].fileno())
    other.read_from(sockets[0].fileno())
    sockets[1].close()
    pump_turn()
    rig.flow.detach()
    rig.flow = None  # nothing may point to it any more
    gc.collect()
    pump.dispatch()
    assert rig.events == []
    assert other.events == [(FlowEvent.PEER_EOF, None)]


def test_detach_in_the_callback(
    make_rig: Callable, sockets, pump: Pump, pump_turn: Callable
) -> None:
    rigs = [make_rig(writable=True) for _ in range(3)]
    told = []

    def on_event(event: FlowEvent, detail: object) -> None:
        told.append(event)
        for rig in rigs:
            rig.flow.detach()

    for rig in rigs:
        rig.read_from(sockets[0].fileno(), on_event=on_event)
    sockets[1].close()
    pump_turn()
    pump.dispatch()
    assert told == [FlowEvent.PEER_EOF]


def test_close_in_the_callback(make_rig: Callable, sockets, pump_turn: Callable) -> None:
    with Pump() as pump:
        rigs = [make_rig(writable=True, pump=pump) for _ in range(2)]
        told = []

        def on_event(event: FlowEvent, detail: object) -> None:
            told.append(event)
            pump.close()

        for rig in rigs:
            rig.read_from(sockets[0].fileno(), on_event=on_event)
        sockets[1].close()
        pump_turn(pump)
        pump.dispatch()
        assert told == [FlowEvent.PEER_EOF]
        assert not any(rig.flow.attached for rig in rigs)


def test_exception_in_the_callback_delays_nothing_else(
    make_rig: Callable, sockets, pump, pump_turn: Callable
) -> None:
    rigs = [make_rig(writable=True) for _ in range(2)]
    told = []

    def on_event(event: FlowEvent, detail: object) -> None:
        told.append(event)
        raise KeyError(event)

    for rig in rigs:
        rig.read_from(sockets[0].fileno(), on_event=on_event)
    sockets[1].close()
    pump_turn()
    for _ in rigs:
        with pytest.raises(KeyError):
            pump.dispatch()
    pump.dispatch()
    assert len(told) == 2


def test_exception_in_the_callback_delays_the_flows_other_news(
    make_rig: Callable, sockets, pump
) -> None:
    """One flow with three things to tell, each of which raises."""
    rig = make_rig(writable=False)
    told = []

    def on_event(event: FlowEvent, detail: object) -> None:
        told.append(event)
        raise KeyError(event)

    flow = rig.write_to(sockets[0].fileno(), on_event=on_event, lossy=True, backlog=0)
    while not flow.counters.dropped:
        rig.send(bytes(4096))
        rig.wait_used(1)
    sockets[1].close()
    rig.send(bytes(16))
    rig.wait_used(1)
    rig.guest.memory.write(rig.queue.rings[1] + 2, b"\xff\xff")  # more available than there is
    rig.kick()
    wait_until(lambda: rig.queue.broken)
    expected = [FlowEvent.OVERFLOW, FlowEvent.PEER_ERROR, FlowEvent.RING_BROKEN]
    while len(told) < len(expected):
        assert select.select([pump.event_fd], [], [], DEADLINE)[0], told
        with pytest.raises(KeyError):
            pump.dispatch()
    assert told == expected
    flow.detach()
    pump.dispatch()
    assert told == expected


def test_unclosed_pump_warns_and_ends(sockets) -> None:
    rig = PortRig(Pump(), writable=False)
    rig.write_to(sockets[0].fileno())
    rig.send(b"alive")
    assert sockets[1].recv(10) == b"alive"
    notifiers = (rig.kick_fd, rig.call_fd)
    del rig  # in a cycle, as its callback refers to it
    with pytest.warns(ResourceWarning, match="unclosed pump"):
        gc.collect()
    for fd in notifiers:
        os.close(fd)
    tasks = Path("/proc/self/task").iterdir()
    assert "vring-pump" not in {(task / "comm").read_text().strip() for task in tasks}


def test_idle_ports_sleep(
    make_rig: Callable, sockets, assert_asleep: Callable, pump_turn: Callable
) -> None:
    with Pump(busy_poll_us=100) as busy:
        for options in ({}, {"pump": busy}):
            out = make_rig(writable=False, **options)
            into = make_rig(writable=True, **options)
            out.write_to(sockets[0].fileno())
            into.read_from(sockets[0].fileno())
            into.offer()
            out.send(b"x")
            assert sockets[1].recv(1) == b"x"
        pump_turn()
        pump_turn(busy)
        assert_asleep()
        into.flow.detach()
        out.flow.detach()


def test_kick_descriptor_shared_by_queues(make_rig: Callable, sockets) -> None:
    """As with a register model that has one notification register for all."""
    one, two = make_rig(writable=False), make_rig(writable=False)
    one.write_to(sockets[0].fileno())
    two.write_to(sockets[0].fileno(), kick_fd=one.kick_fd)
    for i in range(3):
        two.guest.send(b"two", [3])
        one.kick()
        assert sockets[1].recv(10) == b"two"
        one.send(b"one")
        assert sockets[1].recv(10) == b"one", i
    one.flow.detach()
    two.guest.send(b"two", [3])
    one.kick()
    assert sockets[1].recv(10) == b"two"
    two.flow.detach()


def test_arguments(make_rig: Callable, sockets, tmp_path, pump: Pump) -> None:
    rig = make_rig(writable=False)
    good = {"write_fd": sockets[0].fileno(), **rig.notifiers()}
    (tmp_path / "file").write_bytes(b"")
    file = os.open(tmp_path / "file", os.O_RDWR)
    read_end, write_end = os.pipe()
    datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        for wrong, why in [
            ({"kick_fd": -1}, "kick_fd -1"),
            ({"kick_fd": file}, "neither an eventfd nor a socket"),
            ({"kick_fd": read_end}, "neither an eventfd nor a socket"),
            ({"call_fd": file}, "neither an eventfd nor a socket"),
            ({"call_fd": write_end}, "neither an eventfd nor a socket"),
            ({"call_fd": 999_999}, "call_fd 999999: Bad file descriptor"),
            ({"write_fd": 999_999}, "write_fd 999999: Bad file descriptor"),
            ({"write_fd": write_end}, "is blocking"),
            ({"write_fd": datagram.fileno()}, "not a stream"),
            ({"backlog": -1, "lossy": True}, "backlog -1"),
        ]:
            with pytest.raises(LocalMisuseError, match=why):
                pump.guest_to_host(rig.queue, **{**good, **wrong})
        with pytest.raises(LocalMisuseError, match="nothing to read from"):
            pump.host_to_guest(rig.queue, read_fd=-1, **rig.notifiers())
        with pytest.raises(TypeError):
            pump.guest_to_host(rig.queue, **{**good, "on_event": None})
        rig.guest.send(b"x", [1])
        batch = rig.queue.pop_many()
        with pytest.raises(LocalMisuseError, match="1 chains are in flight"):
            pump.guest_to_host(rig.queue, **good)
        rig.queue.unpop(batch)
        flow = pump.guest_to_host(rig.queue, **good)  # none of it did any harm
        assert sockets[1].recv(10) == b"x"
        flow.detach()
    finally:
        datagram.close()
        for fd in (file, read_end, write_end):
            os.close(fd)
    with pytest.raises(LocalMisuseError, match="busy_poll_us"):
        Pump(busy_poll_us=-1)
    closed = Pump()
    closed.close()
    closed.close()
    closed.dispatch()
    assert closed.event_fd == -1
    with pytest.raises(LocalMisuseError, match="closed"):
        closed.guest_to_host(rig.queue, **good)
