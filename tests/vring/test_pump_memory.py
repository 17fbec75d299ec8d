"""Memory that is mapped and unmapped while a pump's flows use it, as behind an IOMMU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest

from tests.support.port_rig import PortRig
from tests.support.waiting import wait_until
from vring import GuestMemory, Region, move_queues

#: Where buffers are mapped: far from the rings, and never twice at one address.
FAR = 1 << 40
TURNS = 400


class Buffers:
    """Maps a buffer of its own for each chain, and unmaps it when the chain is used."""

    def __init__(self, rig: PortRig) -> None:
        self.rig = rig
        self.table = rig.guest.memory
        self.next = FAR

    def map(self, buffer: bytearray) -> int:
        """Return the address."""
        at = self.next
        self.next += 1 << 16
        self.table = self.table.with_region(Region(at, buffer))
        assert move_queues([self.rig.queue], self.table) == []
        return at

    def unmap(self, at: int, buffer: bytearray) -> None:
        """Nobody holds the buffer after it."""
        self.table = self.table.without_region(at, len(buffer))
        assert move_queues([self.rig.queue], self.table) == []
        buffer.append(0)  # impossible while anybody has it exported
        assert self.rig.queue.memory is self.table

    def give(self, at: int, length: int) -> None:
        lengths = np.array([length], np.uint32)
        self.rig.driver.add_many(np.array([at], np.uint64), lengths, self.rig.guest.writable)
        self.rig.publish()


def wait_used(rig: PortRig) -> None:
    wait_until(lambda: len(rig.driver.get_used()[0]))


def test_buffers_of_the_guest_are_mapped_one_by_one(make_rig: Callable, sockets) -> None:
    buffers = Buffers(make_rig(writable=False))
    buffers.rig.write_to(sockets[0].fileno())
    for turn in range(TURNS):
        data = bytearray(os.urandom(1 + 37 * turn % 4096))
        at = buffers.map(data)
        buffers.give(at, len(data))
        wait_used(buffers.rig)
        assert sockets[1].recv(len(data)) == data
        buffers.unmap(at, data)


def test_room_for_the_guest_is_mapped_one_by_one(make_rig: Callable, sockets) -> None:
    buffers = Buffers(make_rig(writable=True))
    buffers.rig.read_from(sockets[0].fileno())
    for turn in range(TURNS):
        data, room = os.urandom(1 + 37 * turn % 4096), bytearray(4096)
        at = buffers.map(room)
        buffers.give(at, len(room))
        sockets[1].sendall(data)
        wait_used(buffers.rig)
        assert room.startswith(data)
        buffers.unmap(at, room)


def test_tables_change_under_a_stream(make_rig: Callable, sockets) -> None:
    """What is mapped beside the ring and its buffers comes and goes; no byte is lost."""
    rig = make_rig(writable=False, size=64, slot=1024)
    rig.write_to(sockets[0].fileno())
    data = os.urandom(1 << 20)
    received = bytearray()

    def read() -> None:
        while len(received) < len(data):
            received.extend(sockets[1].recv(1 << 16))

    reader = threading.Thread(target=read)
    reader.start()
    for change, at in enumerate(range(0, len(data), 1024)):
        wait_until(lambda: rig.guest.collect() is not None and rig.driver.num_free)
        rig.send(data[at : at + 1024])
        table = rig.guest.memory
        if change % 3:
            table = table.with_region(Region(FAR + change * 4096, bytearray(4096)))
        assert move_queues([rig.queue], table) == []
    reader.join()
    assert received == data


def test_a_ring_that_is_not_there_stays_where_it_is(make_rig: Callable, sockets) -> None:
    there, elsewhere = make_rig(writable=False), make_rig(writable=False)
    there.write_to(sockets[0].fileno())
    table = GuestMemory([Region(FAR, bytearray(4096))])
    for rig in (there, elsewhere):  # one that a flow has, and one that nobody has
        assert move_queues([rig.queue], table) == [rig.queue]
        assert rig.queue.memory is rig.guest.memory
    there.send(b"still here")
    assert sockets[1].recv(64) == b"still here"


def test_a_buffer_that_is_not_mapped_any_more_breaks_the_ring_alone(
    make_rig: Callable, sockets
) -> None:
    buffers = Buffers(make_rig(writable=False))
    buffers.rig.write_to(sockets[0].fileno())
    data = bytearray(64)
    at = buffers.map(data)
    buffers.unmap(at, data)
    buffers.give(at, 64)
    event, error = buffers.rig.wait_event()
    assert event.name == "RING_BROKEN"
    assert f"{at:#x}" in str(error)


def test_a_pump_that_is_halted_has_its_queues_moved_all_the_same(
    make_rig: Callable, sockets, pump
) -> None:
    rig = make_rig(writable=False)
    rig.write_to(sockets[0].fileno())
    pump.halt()
    table = rig.guest.memory.with_region(Region(FAR, bytearray(64)))
    assert move_queues([rig.queue], table) == []
    assert rig.queue.memory is table


def test_what_cannot_be_moved() -> None:
    with pytest.raises(TypeError):
        move_queues([object()], GuestMemory())  # type: ignore[list-item]
    with pytest.raises(TypeError):
        move_queues([], None)  # type: ignore[arg-type]


def test_a_child_of_fork_does_not_move_queues_of_its_parents_flows() -> None:
    program = """
import os, socket
from tests.support.port_rig import PortRig
from vring import LocalMisuseError, Pump, move_queues
with Pump() as pump:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    rig = PortRig(pump, writable=False)
    rig.write_to(ours.fileno())
    if (pid := os.fork()) == 0:
        try:
            move_queues([rig.queue], rig.guest.memory)
        except LocalMisuseError as error:
            os._exit("another process" not in str(error))
        os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    rig.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
