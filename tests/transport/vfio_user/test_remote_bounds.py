"""What memory that the client does not share may cost, and clients that do not answer."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import turns, wait_until
from vring_serial.proto.vfio_user import reply
from vring_serial.proto.vfio_user_dma import DmaAccess, DmaMap
from vring_serial.proto.vfio_user_version import Capabilities, Version
from vring_serial.proto.vfio_user_wire import Command
from vring_serial.proto.virtio import Status
from vring_serial.transport.vfio_user import remote as vfio_remote
from vring_serial.transport.vfio_user.copies import (
    LARGE_BYTES,
    QUEUE_BYTES,
    Copy,
    Held,
    LargeChains,
    Room,
    make_file,
)

LOW = 1 << 20
#: Guest memory that the client answers for without having it.
FAR, FAR_SIZE = 1 << 32, 1 << 30


def limited(size: int) -> Capabilities:
    return Capabilities(
        max_data_xfer_size=size, named=frozenset({"max_data_xfer_size", "max_msg_fds"})
    )


@pytest.fixture
def far(client: Any) -> Any:
    """A client that keeps all of its memory to itself: 1 MiB that is there, and 1 GiB of zeros."""
    return make_far(client, None)


def make_far(client: Any, capabilities: Capabilities | None) -> Any:
    client.negotiate(capabilities)
    client.do(Command.DMA_MAP, DmaMap(3, 0, 0, LOW))
    client.do(Command.DMA_MAP, DmaMap(3, 0, FAR, FAR_SIZE))
    honest = client.dma

    def answer(message: Any) -> bytes:
        asked = message.decode()
        if asked.address < FAR:
            return honest(message)
        client.dma_asked.append((message.name, asked.address, asked.count))
        data = bytes(asked.count) if message.command == Command.DMA_READ else b""
        return reply(
            message.command, message.message_id, DmaAccess(asked.address, asked.count, data)
        )

    client.dma = answer
    return client


def resident() -> int:
    """Bytes of memory that this process has."""
    gc.collect()
    match = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def unanswered(client: Any) -> list[Any]:
    """What the server asks for until it asks for no more; nothing is answered."""
    found: list[Any] = []
    client.until_silent(found.append)
    return found


def until_status(driver: Any, bit: int) -> None:
    wait_until(lambda: driver.status & bit, lambda: f"status {driver.status:#x}")


# --- what is asked of the client


@pytest.mark.parametrize("size", [0, 1, 32, 4095])
def test_accesses_below_a_page_are_refused(
    client: Any, server: Any, log: Callable[[], list[str]], size: int
) -> None:
    client.send(Command.VERSION, Version(0, 0, limited(size)))
    assert client.is_sent_away()
    assert f"VERSION: max_data_xfer_size {size}, below 4096; connection closed" in log()[0]
    server.wait_for("connected", "gone")


def test_large_accesses_go_in_pieces(client: Any, device: Any) -> None:
    make_far(client, limited(4096))
    driver = client.start_driver(0)
    data = bytes(range(256)) * 70
    client.memory.write(0x80000, data)
    client.drivers[0].add([(0x80000, len(data))], [(0xA0000, len(data))])
    client.drivers[0].publish()
    driver.notify(0)
    client.wait_irq_serving(1)
    assert client.memory.read(0xA0000, len(data)) == data
    assert max(count for _, _, count in client.dma_asked) == 4096


@pytest.mark.parametrize("piece", [4096, 1 << 20])
def test_the_client_is_asked_for_a_window_at_a_time(client: Any, device: Any, piece: int) -> None:
    make_far(client, limited(piece))
    driver = client.start_driver(0)
    client.serve_dma()
    size = 4 << 20
    client.drivers[0].add([(FAR, size)], [(FAR + size, size)])
    client.drivers[0].publish()
    client.post(4, 0x3000, 0, 2)  # a notification
    asked: list[Any] = []
    while not any(message.decode().address >= FAR for message in asked):
        client.send_bytes(b"".join(map(client.dma, asked)))
        asked = unanswered(client)
    assert 0 < len(asked) <= vfio_remote.WINDOW_REQUESTS
    assert sum(message.decode().count for message in asked) <= vfio_remote.WINDOW_BYTES
    client.send_bytes(b"".join(map(client.dma, asked)))
    client.wait_irq_serving(1)
    assert [len(data) for data in device.echoed] == [size]
    writes = [count for name, at, count in client.dma_asked if name == "DMA_WRITE" and at >= FAR]
    assert sum(writes) == size
    assert not driver.status & Status.DEVICE_NEEDS_RESET


# --- what it does not answer, or refuses


def test_a_client_that_does_not_answer_breaks_the_device(
    far: Any, device: Any, log: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vfio_remote, "ANSWER_SECONDS", 0.3)
    driver = far.start_driver(0)
    far.serve_dma()
    honest = far.dma
    late: list[Any] = []
    far.dma = lambda message: late.append(message) or b""
    far.put(0, b"nobody answers")
    driver.notify(0)
    until_status(driver, Status.DEVICE_NEEDS_RESET)
    why = "echo: a ring is broken: queue 0: DMA_READ: the client has not answered for 0.3 seconds"
    assert log() == [why]
    assert device.echoed == []
    # Late answers are taken, and a driver that starts anew finds a device that works.
    monkeypatch.setattr(vfio_remote, "ANSWER_SECONDS", 30)
    far.dma = honest
    far.send_bytes(b"".join(map(honest, late)))
    driver = far.start_driver(0)
    assert far.put(0, b"anew")
    driver.notify(0)
    far.wait_irq_serving(1)
    assert far.echoed(b"anew")


def test_a_window_full_of_unanswered_requests_is_told_again(
    client: Any, log: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next driver waits for the same client, whose window has no room."""
    monkeypatch.setattr(vfio_remote, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(vfio_remote, "WINDOW_REQUESTS", 1)
    make_far(client, limited(4096))
    client.dma = lambda message: b""
    for _ in range(2):
        driver = client.start_driver(0)
        until_status(driver, Status.DEVICE_NEEDS_RESET)
    assert sum("has not answered" in line for line in log()) == 2


def test_a_client_that_answers_slowly_is_waited_for(
    far: Any, server: Any, log: Callable[[], list[str]]
) -> None:
    """Each answer begins the time anew."""
    driver = far.start_driver(0)
    far.serve_dma()
    honest = far.dma

    def slowly(message: Any) -> bytes:
        for _ in range(4):  # the time is counted in pieces
            server.pass_time(vfio_remote.ANSWER_SECONDS / 5)
        return honest(message)

    far.dma = slowly
    for slot in range(2):
        far.put(0, b"slowly", slot=slot)
        driver.notify(0)
        far.wait_irq_serving(1)
        far.drivers[0].get_used()
        assert far.echoed(b"slowly", slot=slot)
    assert not driver.status & Status.DEVICE_NEEDS_RESET
    assert log() == []


@pytest.mark.parametrize("place", ["buffer", "used ring"])
def test_a_write_that_the_client_refuses_breaks_the_device(
    far: Any, log: Callable[[], list[str]], place: str
) -> None:
    """Although all that is read after it can be read."""
    driver = far.start_driver(0)
    far.serve_dma()
    honest = far.dma

    def refuse(message: Any) -> bytes:
        in_buffer = message.decode().address >= 0x80000
        refused = message.name == "DMA_WRITE" and in_buffer == (place == "buffer")
        far.dma_error = 14 if refused else 0
        return honest(message)

    far.dma = refuse
    far.put(0, b"accepted by the device")
    driver.notify(0)
    until_status(driver, Status.DEVICE_NEEDS_RESET)
    assert any("queue 0: DMA_WRITE: refused with error 14" in line for line in log())


# --- what copies cost


def test_pages_are_given_back_when_chains_are_completed(far: Any, device: Any) -> None:
    """64 MiB of the guest's memory pass; less than 16 MiB of it are kept."""
    driver = far.start_driver(0)
    far.serve_dma()
    size, at = 128 << 10, FAR
    before = 0
    for turn in range(256):
        far.drivers[0].enable_notifications()
        far.drivers[0].add([(at, size)], [(at + size, size)])
        at += 2 * size
        if far.drivers[0].publish():
            driver.notify(0)
        far.wait_irq_serving(1)
        assert far.drivers[0].get_used()[1].tolist() == [size]
        device.echoed.clear()
        far.dma_asked.clear()
        if turn == 20:
            before = resident()
    assert resident() - before < 16 << 20


class Holding:
    """Makes an echo device keep its chains in the ring, until it is let go on."""

    def __init__(self, device: Any, server: Any) -> None:
        self._device, self._server = device, server
        device.holds = True

    def available(self, index: int) -> int:
        async def ask() -> int:
            return int(self._device.running[index].queue.available())

        return int(self._server.run(ask()))

    def go_on(self) -> None:
        self._device.holds = False

        async def serve() -> None:
            for index in self._device.running:
                self._device.serve(index)

        self._server.run(serve())


@pytest.mark.parametrize("direction", ["readable", "writable"])
def test_a_queue_has_so_much_on_its_way(far: Any, device: Any, server: Any, direction: str) -> None:
    holding = Holding(device, server)
    driver = far.start_driver(0)
    size, count = 16 << 10, 40
    for nr in range(count):
        buffers = [(FAR + nr * size, size)]
        readable, writable = (buffers, []) if direction == "readable" else ([], buffers)
        far.drivers[0].add(readable, writable)
    far.drivers[0].publish()
    driver.notify(0)
    far.serve_dma()
    assert holding.available(0) == QUEUE_BYTES // size
    holding.go_on()
    used: list[int] = []

    def all_used() -> bool:
        far.serve_dma()
        used.extend(far.drivers[0].get_used()[0].tolist())
        return len(used) == count

    wait_until(all_used, lambda: f"{len(used)} of {count}")
    assert not driver.status & Status.DEVICE_NEEDS_RESET


def test_a_chain_that_is_too_large_is_told(far: Any, log: Callable[[], list[str]]) -> None:
    driver = far.start_driver(0)
    far.drivers[0].add([(FAR, 32 << 20)], [(FAR + (64 << 20), 33 << 20)])
    far.drivers[0].publish()
    driver.notify(0)
    until_status(driver, Status.DEVICE_NEEDS_RESET)
    assert any("queue 0: a chain of 68157440 bytes, at most 67108864" in line for line in log())
    assert not any(name == "DMA_READ" and at >= FAR for name, at, _ in far.dma_asked)


def test_a_descriptor_that_is_made_available_twice(far: Any, log: Callable[[], list[str]]) -> None:
    driver = far.start_driver(0)
    far.serve_dma()
    far.drivers[0].add([(0x80000, 8)], [])
    far.drivers[0].publish()
    available = 0x10000 + 16 * 64
    far.memory.write(available + 4, bytes(4))  # descriptor 0, and again
    far.memory.store16(available + 2, 2)
    driver.notify(0)
    until_status(driver, Status.DEVICE_NEEDS_RESET)
    assert any("queue 0: descriptor 0 is available, and in use already" in line for line in log())


# --- where shared memory ends


@pytest.mark.parametrize("shared_first", [True, False])
def test_a_buffer_across_the_end_of_shared_memory(
    client: Any, device: Any, shared_first: bool
) -> None:
    """Each byte is taken from where it is; none is read as zero."""
    half = LOW // 2
    client.negotiate()
    parts = [(half, ()), (half + 0x10000, (client.memfd,)), (half + 0x20000, ())]
    if not shared_first:
        parts = [(half + 0x10000, ()), (half + 0x20000, (client.memfd,))]
    start = 0
    for end, fds in parts:
        client.do(Command.DMA_MAP, DmaMap(3, start, start, end - start), fds)
        start = end
    driver = client.start_driver(0)
    data = bytes(range(1, 256)) * 16
    at = half + 0x10000 - 1000
    client.memory.write(at, data)
    client.drivers[0].add([(at, len(data))], [(at + 0x2000 - 0x1000, len(data))])
    client.drivers[0].publish()
    driver.notify(0)
    client.wait_irq_serving(1)
    assert client.drivers[0].get_used()[1].tolist() == [len(data)]
    assert device.echoed == [data]
    assert client.memory.read(at + 0x1000, len(data)) == data


def test_what_is_written_goes_to_its_own_buffers(client: Any, device: Any) -> None:
    """A shared buffer, then one that is not: the second gets the rest, not the beginning."""
    half = LOW // 2
    client.negotiate()
    client.do(Command.DMA_MAP, DmaMap(3, 0, 0, half))
    client.do(Command.DMA_MAP, DmaMap(3, half, half, half), (client.memfd,))
    driver = client.start_driver(0)
    client.memory.write(half, b"0123456789")
    client.memory.write(0x70000, bytes(range(16)))
    client.drivers[0].add([(half, 10)], [(half + 64, 4), (0x70000, 64)])
    client.drivers[0].publish()
    driver.notify(0)
    client.wait_irq_serving(1)
    assert client.memory.read(half + 64, 5) == b"0123\0"
    assert client.memory.read(0x70000, 16) == b"456789" + bytes(range(6, 16))


def test_a_ring_that_is_shared_in_part_is_refused_and_left_alone(
    client: Any, log: Callable[[], list[str]]
) -> None:
    client.negotiate()
    table = 0x11000  # where the descriptors end
    client.do(Command.DMA_MAP, DmaMap(3, 0, 0, table))
    client.do(Command.DMA_MAP, DmaMap(3, table, table, LOW - table), (client.memfd,))
    driver = client.driver()
    driver.accept((1 << 64) - 1)
    parts = 0x10000, 0x11000, 0x12000
    client.memory.write(0x11000, b"\0\0\5\0")
    driver.start_queue(0, 64, parts, vector=1)
    driver.status |= Status.DRIVER_OK
    until_status(driver, Status.DEVICE_NEEDS_RESET)
    assert any("queue 0: a part of its ring is in memory that is shared" in line for line in log())
    assert client.memory.read(0x11000, 4) == b"\0\0\5\0"


# --- the parts


def test_pages_that_others_use_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    page = mmap.PAGESIZE
    copy = Copy(0x1000, 8 * page)
    view = memoryview(copy.region)
    held = [Held() for _ in range(3)]
    held[0].add(copy, 0x1000, 3 * page)  # 0 to 2
    held[1].add(copy, 0x1000 + 2 * page + 10, 2 * page)  # 2 to 4
    held[2].add(copy, 0x1000 + 7 * page + page - 1, 1)  # 7
    assert [each.cost for each in held] == [3 * page, 3 * page, page]
    for each in held:
        each.hold()
    for number in range(8):
        view[number * page] = 1
    held[0].release()
    held[0].release()
    assert [view[number * page] for number in range(8)] == [0, 0, 1, 1, 1, 1, 1, 1]
    held[2].release()
    held[1].release()
    assert [view[number * page] for number in range(8)] == [0, 0, 0, 0, 0, 1, 1, 0]


async def test_room_for_large_chains_is_shared() -> None:
    large = LargeChains()
    first, second = Room(large), Room(large)
    first.take(QUEUE_BYTES - 4096)
    assert first.has(4096)
    assert not first.has(8192)
    assert second.has(QUEUE_BYTES)
    assert first.has(LARGE_BYTES)
    first.take(LARGE_BYTES - 1)
    assert not first.has(QUEUE_BYTES + 1), "one at a time"
    assert not second.has(QUEUE_BYTES + 1)
    waiting = asyncio.ensure_future(second.wait_for(QUEUE_BYTES + 1))
    await turns(1)
    first.give(LARGE_BYTES - 1)
    await waiting
    second.take(QUEUE_BYTES + 1)
    second.close()
    second.give(QUEUE_BYTES + 1)  # an answer that comes late
    assert large.bytes == 0
    assert not large.waiting


def test_a_kept_copy_is_there_for_a_successor_as_far_as_it_is_used() -> None:
    page = mmap.PAGESIZE
    fd = make_file(8 * page)
    try:
        copy = Copy(0x10000, 8 * page, fd)
        copy.hold(range(1, 8))
        for at in range(8):
            memoryview(copy.region)[at * page] = 7
        copy.release(range(2, 4))
        copy.release(range(5, 6), free_them=False)
        successor = Copy(0x10000, 8 * page, fd)
        view = memoryview(successor.region)
        assert [view[at * page] for at in range(8)] == [7, 7, 0, 0, 7, 7, 7, 7]
        successor.hold(range(4, 6))
        successor.free_unused()
        assert [view[at * page] for at in range(8)] == [0, 0, 0, 0, 7, 7, 0, 0]
    finally:
        os.close(fd)
