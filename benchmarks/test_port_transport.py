"""Bytes a second between a driver in the same thread and Python code behind a port."""

from __future__ import annotations

import asyncio
import os

import pytest

from vring import GuestMemory, Region, SplitDriver, SplitQueue
from vring_serial.device.console.port_transport import PortTransport
from vring_serial.device.console.state import ChainState
from vring_serial.device.virtqueue import RunningQueue

SIZE = 256
CHUNK = 32768
ROUNDS = 64
BASE = 1 << 20


class Count(asyncio.Protocol):
    def __init__(self) -> None:
        self.received = 0

    def data_received(self, data: bytes) -> None:
        self.received += len(data)


class Rig:
    """One ring of 32 KiB buffers, and the transport over it."""

    def __init__(self) -> None:
        rings = SplitDriver.layout(SIZE)
        parts = [BASE, BASE + 8192, BASE + 16384]
        assert max(rings) <= 8192
        memory = GuestMemory([Region(BASE, bytearray(32768 + SIZE * CHUNK))])
        self.driver = SplitDriver(memory, SIZE, *parts, event_idx=True)
        self.fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        queue = SplitQueue(memory, SIZE, *parts, event_idx=True)
        self.running = RunningQueue(queue, *self.fds)
        self.addresses = [BASE + 32768 + n * CHUNK for n in range(SIZE)]
        self.protocol = Count()

    def connect(self) -> PortTransport:
        return PortTransport(
            self.protocol,
            lossy=False,
            extra={},
            on_lost=lambda by_protocol: None,
            on_broken=lambda is_transmit, error: None,
            on_dropped=lambda count: None,
        )

    def give(self, length: int, *, writable: bool) -> None:
        self.driver.add_many(self.addresses, [length] * SIZE, writable)
        if self.driver.publish():
            os.eventfd_write(self.fds[0], 1)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


@pytest.mark.parametrize("length", [64, CHUNK])
def test_guest_to_protocol(benchmark, length):
    rig = Rig()

    async def transfer() -> None:
        transport = rig.connect()
        transport.start_transmitq(rig.running, ChainState())
        wanted = rig.protocol.received + ROUNDS * SIZE * length
        while rig.protocol.received < wanted:
            rig.driver.get_used()
            rig.give(length, writable=False)
            await asyncio.sleep(0)
        transport.stop_transmitq()
        rig.driver.get_used()

    benchmark(lambda: asyncio.run(transfer()))
    note(benchmark, ROUNDS * SIZE * length)
    rig.close()


@pytest.mark.parametrize("length", [64, CHUNK])
def test_protocol_to_guest(benchmark, length):
    rig = Rig()
    data = bytes(length)

    async def transfer() -> None:
        transport = rig.connect()
        await asyncio.sleep(0)
        transport.start_receiveq(rig.running)
        written = 0
        received = 0
        while received < ROUNDS * SIZE * length:
            received += int(rig.driver.get_used()[1].sum())
            rig.give(CHUNK, writable=True)
            while written < ROUNDS * SIZE * length and (transport.get_write_buffer_size() < 65536):
                transport.write(data)
                written += length
            await asyncio.sleep(0)
        transport.stop_receiveq()

    benchmark.pedantic(lambda: asyncio.run(transfer()), rounds=3)
    note(benchmark, ROUNDS * SIZE * length)
    rig.close()


def note(benchmark, size):
    benchmark.extra_info["GB/s"] = round(size / benchmark.stats["min"] / 1e9, 3)
