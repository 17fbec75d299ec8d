"""A port's transport without the port: its buffer, and memory that goes away."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from tests.support.console import Recorder
from tests.support.waiting import until
from vring import GuestMemory, Region, RingError, SplitDriver, SplitQueue
from vring_serial.device.console.port_transport import PortTransport
from vring_serial.device.console.state import ChainState
from vring_serial.device.virtqueue import RunningQueue


class Bare:
    """A transport without a port, over one ring in memory that can be cut off."""

    SIZE = 16
    BUFFERS = 0x10000
    LENGTH = 4 << 20

    def __init__(self) -> None:
        self.memfd = os.memfd_create("guest")
        os.ftruncate(self.memfd, self.LENGTH)
        self.memory = GuestMemory([Region.map(self.memfd, self.LENGTH, guest_addr=0)])
        parts = (0x1000, 0x2000, 0x3000)
        self.driver = SplitDriver(self.memory, self.SIZE, *parts, event_idx=True)
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        queue = SplitQueue(self.memory, self.SIZE, *parts, event_idx=True, name="queue 5")
        self.running = RunningQueue(queue, self.kick_fd, -1)
        self.broken: list[RingError] = []

    def connect(self, protocol: asyncio.Protocol) -> PortTransport:
        return PortTransport(
            protocol,
            lossy=False,
            extra={},
            on_lost=lambda by_protocol: None,
            on_broken=lambda is_transmit, error: self.broken.append(error),
            on_dropped=lambda count: None,
        )

    def publish(self) -> None:
        if self.driver.publish():
            os.eventfd_write(self.kick_fd, 1)

    def close(self) -> None:
        os.close(self.kick_fd)
        os.close(self.memfd)


@pytest.fixture
def bare() -> Iterator[Bare]:
    built = Bare()
    yield built
    built.close()


async def test_writing_resumes_once_the_buffer_is_at_its_low_mark(bare):
    protocol = Recorder()
    transport = bare.connect(protocol)
    transport.set_write_buffer_limits(20_000, 10_000)
    transport.start_receiveq(bare.running)
    transport.write(bytes(30_000))
    assert protocol.calls == ["pause"]
    left = [30_000]
    while "resume" not in protocol.calls:
        bare.driver.add([], [(bare.BUFFERS, 4000)])
        bare.publish()
        await until(lambda: transport.get_write_buffer_size() != left[-1])
        left.append(transport.get_write_buffer_size())
    assert left == [30_000, 26_000, 22_000, 18_000, 14_000, 10_000]
    transport.stop_receiveq()


async def test_nothing_of_a_large_chain_comes_from_memory_that_is_gone(bare):
    class Nibbler(Recorder):
        def data_received(self, data):
            super().data_received(data)
            self.transport.pause_reading()

    protocol = Nibbler()
    transport = bare.connect(protocol)
    transport.start_transmitq(bare.running, ChainState())
    bare.memory.write(bare.BUFFERS, b"x" * (2 << 20))
    bare.driver.add([(bare.BUFFERS, 2 << 20)], [])
    bare.publish()
    await until(lambda: protocol.data)
    begun = len(protocol.data)
    assert begun < 2 << 20
    # The rings stay: only what is copied next is not there.
    os.ftruncate(bare.memfd, bare.BUFFERS)
    protocol.transport.resume_reading()
    await until(lambda: bare.broken or protocol.data.count(0))
    assert protocol.data == b"x" * begun
    assert [error.queue for error in bare.broken] == ["queue 5"]
    assert "is gone" in str(bare.broken[0])


async def test_what_was_delivered_is_left_out_of_its_own_chain_alone(bare):
    protocol = Recorder()
    transport = bare.connect(protocol)
    for number, data in enumerate([b"delivered, rest", b" and more"]):
        address = bare.BUFFERS + 4096 * number
        bare.memory.write(address, data)
        bare.driver.add([(address, len(data))], [])
    bare.publish()
    chain = ChainState(delivered=len(b"delivered, "))
    transport.start_transmitq(bare.running, chain)
    used: list[int] = []
    await until(lambda: (used.extend(bare.driver.get_used()[0]), len(used) == 2)[1])
    assert protocol.data == b"rest and more"
    transport.stop_transmitq()
    assert chain.delivered == 0
