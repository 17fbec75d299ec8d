"""A port over rings alone: whatever happens in whatever order, the bytes are right."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.waiting import DEADLINE, turns
from vring import SplitQueue
from vring_serial.guest.memory import GuestRam
from vring_serial.guest.port import GuestPort
from vring_serial.guest.queue import DriverQueue, ReceiveBuffers, TransmitBuffers

QUEUE_SIZE = 8
RECEIVE_SIZE = 32
TRANSMIT_SIZE = 64


class Harness:
    """A port of a driver that has no control queues, and the device's side of its rings."""

    def __init__(self, *, event_idx: bool) -> None:
        self.ram = GuestRam(1 << 20)
        self.rx = DriverQueue(0, self.ram, QUEUE_SIZE, event_idx=event_idx)
        self.tx = DriverQueue(1, self.ram, QUEUE_SIZE, event_idx=event_idx)
        receive = ReceiveBuffers(self.rx, self.ram, QUEUE_SIZE, RECEIVE_SIZE)
        receive.fill()
        self.opened: list[bool] = []
        self.port = GuestPort(1, self, receive)
        self.rx.listen(self.port.receive)
        self.tx.listen(self.port.notified_transmit)
        self.device_rx = self._device(self.rx, event_idx)
        self.device_tx = self._device(self.tx, event_idx)

    def _device(self, queue: DriverQueue, event_idx: bool) -> SplitQueue:
        parts = (queue.desc, queue.avail, queue.used)
        return SplitQueue(self.ram.memory, queue.size, *parts, event_idx=event_idx)

    def port_opened(self, port: GuestPort, is_open: bool) -> bool:
        self.opened.append(is_open)
        return True

    def transmit_buffers(self, port: GuestPort) -> TransmitBuffers:
        return TransmitBuffers(self.tx, self.ram, QUEUE_SIZE, TRANSMIT_SIZE)

    def take(self, chains: int) -> bytes:
        """The device uses what the guest wrote."""
        batch = self.device_tx.pop_many(chains)
        data = batch.gather()
        if len(batch) and self.device_tx.push_many(batch):
            self._call(self.tx)
        return data

    def send(self, data: bytes) -> int:
        """The device fills receive buffers; how many bytes it had room for."""
        batch = self.device_rx.pop_many()
        used, written = batch.scatter(data)
        if used and self.device_rx.push_many(batch, written, used):
            self._call(self.rx)
        if len(batch):
            self.device_rx.unpop(batch)
        return int(written.sum())

    @staticmethod
    def _call(queue: DriverQueue) -> None:

        os.eventfd_write(queue.call_fd, 1)

    def close(self) -> None:
        self.rx.close()
        self.tx.close()
        self.ram.close()


@asynccontextmanager
async def harness(*, event_idx: bool = True) -> AsyncIterator[Harness]:
    harness = Harness(event_idx=event_idx)
    try:
        async with asyncio.timeout(DEADLINE):
            yield harness
    finally:
        harness.port.remove(ConnectionError("the test is over"))
        await turns(1)
        harness.close()


class Reader:
    """Reads a port through all ends of file; ``segments`` are what came between them."""

    def __init__(self, port: GuestPort) -> None:
        self.segments = [b""]
        self._port = port
        self.writer: asyncio.StreamWriter

    async def run(self) -> None:
        while True:
            reader, self.writer = await self._port.open(limit=48)
            while data := await reader.read(40):
                self.segments[-1] += data
                await turns(1)
            self.segments.append(b"")


steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 300)),
        st.tuples(st.just("take"), st.integers(1, 4)),
        st.tuples(st.just("host"), st.just(0)),
        st.tuples(st.just("send"), st.integers(1, 200)),
        st.tuples(st.just("turns"), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=100)
@given(steps=steps, event_idx=st.booleans())
def test_no_byte_is_lost_or_moved(steps: list[tuple[str, int]], event_idx: bool) -> None:
    asyncio.run(play(steps, event_idx))


def not_empty(segments: list[bytes]) -> list[bytes]:
    return [segment for segment in segments if segment]


async def play(steps: list[tuple[str, int]], event_idx: bool) -> None:
    written, taken, sent = bytearray(), bytearray(), [b""]
    async with harness(event_idx=event_idx) as h:
        reader = Reader(h.port)
        reading = asyncio.create_task(reader.run())
        await turns()
        for step, number in steps:
            if step == "write":
                data = bytes((len(written) + i) % 251 for i in range(number))
                written += data
                reader.writer.write(data)
            elif step == "take" and h.port.host_connected:
                taken += h.take(number)
            elif step == "host":
                if h.port.host_connected:
                    sent.append(b"")
                h.port.set_host_connected(not h.port.host_connected)
            elif step == "send" and h.port.host_connected:
                data = bytes((sum(map(len, sent)) + i) % 241 for i in range(number))
                sent[-1] += data[: h.send(data)]
            else:
                await turns()
        h.port.set_host_connected(True)
        for _ in range(300):
            taken += h.take(0)
            await turns(1)
        assert not_empty(reader.segments) == not_empty(sent)
        assert h.device_rx.available() == QUEUE_SIZE
        assert taken == written
        assert h.opened == [True]
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def test_write_buffer_limits_are_asyncios() -> None:
    async with harness() as h:
        _, writer = await h.port.open()
        h.port.set_host_connected(True)
        transport = writer.transport
        assert transport.get_write_buffer_limits() == (0, 0)
        transport.set_write_buffer_limits(high=1000)
        assert transport.get_write_buffer_limits() == (250, 1000)
        with pytest.raises(ValueError, match="must be >= low"):
            transport.set_write_buffer_limits(high=1, low=2)
        writer.write(bytes(QUEUE_SIZE * TRANSMIT_SIZE + 1000))
        assert transport.get_write_buffer_size() == 1000
        await asyncio.wait_for(writer.drain(), 1)
        writer.write(b"1")
        draining = asyncio.ensure_future(writer.drain())
        await turns()
        assert not draining.done()
        while not draining.done():
            assert h.take(1)
            await turns()
        assert transport.get_write_buffer_size() <= 250
        assert not transport.can_write_eof()
        transport.abort()
        assert transport.get_write_buffer_size() == 0


async def test_written_memory_may_be_changed_at_once() -> None:
    async with harness() as h:
        _, writer = await h.port.open()
        h.port.set_host_connected(True)
        data = bytearray(b"a" * 1000)
        writer.write(data)
        writer.writelines([memoryview(data)[:5], b"c"])
        data[:] = b"b" * 1000
        got = b""
        while len(got) < 1006:
            got += h.take(0)
            await turns()
        assert got == b"a" * 1005 + b"c"
        with pytest.raises(TypeError, match="not str"):
            writer.write("text")  # type: ignore[arg-type]
        writer.transport.abort()


async def test_a_protocol_that_does_not_keep_a_half_open_port() -> None:
    lost: list[Exception | None] = []

    class Once(asyncio.Protocol):
        def connection_lost(self, error: Exception | None) -> None:
            lost.append(error)

    async with harness() as h:
        h.port.set_host_connected(True)
        transport, _ = h.port.connect(Once)
        h.port.set_host_connected(False)
        await turns()
        assert transport.is_closing()
        assert lost == [None]
        assert h.opened == [True, False]


async def test_wait_host_ends_with_the_port() -> None:
    async with harness() as h:
        waiting = asyncio.ensure_future(h.port.wait_host())
        await turns()
        h.port.remove(ConnectionError("gone"))
        with pytest.raises(ConnectionError, match="gone"):
            await waiting


async def test_a_port_is_closed_where_its_block_is_left() -> None:
    async with harness() as h:
        with h.port:  # not open: there is nothing to close
            pass
        for _ in range(2):
            with h.port as port:
                port.connect(asyncio.Protocol)
                assert h.opened.pop()
            await turns()
            assert h.opened == [False]
            h.opened.clear()
