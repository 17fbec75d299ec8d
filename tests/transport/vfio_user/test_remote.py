"""Rings and buffers in memory that the client does not share."""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from vring_serial.proto.vfio_user import VfioUserParser, reply, request
from vring_serial.proto.vfio_user_dma import DmaAccess, DmaMap, DmaUnmap
from vring_serial.proto.vfio_user_version import Capabilities
from vring_serial.proto.vfio_user_wire import Command
from vring_serial.proto.virtio import Status

SIZE = 1 << 20
HALF = SIZE // 2
BUFFERS = 0x80000


@pytest.fixture
def remote(client: Any) -> Any:
    """A client that keeps all of its memory to itself."""
    client.negotiate()
    client.do(Command.DMA_MAP, DmaMap(3, 0, 0, SIZE))
    return client


def echo(client: Any, driver: Any, data: bytes, slot: int = 0, index: int = 0) -> None:
    if client.put(index, data, slot):
        driver.notify(index)
    client.wait_irq_serving(index + 1)
    client.drivers[index].get_used()
    assert client.echoed(data, slot)


def test_there_and_back(remote: Any, device: Any) -> None:
    driver = remote.start_driver(0, 1)
    remote.serve_dma()
    for turn in range(140):  # each ring has 64
        echo(remote, driver, b"turn %d" % turn, slot=turn % 8, index=turn % 2)
    assert device.echoed == [b"turn %d" % turn for turn in range(140)]


def test_the_index_comes_after_what_it_makes_visible(remote: Any) -> None:
    driver = remote.start_driver(0)
    remote.serve_dma()
    remote.dma_asked.clear()
    echo(remote, driver, b"in order")
    writes = [(at, count) for name, at, count in remote.dma_asked if name == "DMA_WRITE"]
    data = next(nr for nr, (at, _) in enumerate(writes) if at >= BUFFERS)
    entry = next(nr for nr, (at, count) in enumerate(writes) if at < BUFFERS and count == 8)
    assert data < entry < len(writes) - 1
    assert writes[-1] == (writes[entry][0] - 2, 2)


def test_an_index_is_not_believed_with_entries_that_may_be_older(remote: Any, device: Any) -> None:
    """A client's copy of index and entries at once may have the index alone of a new chain."""
    driver = remote.start_driver(0)
    available = 0x10000 + 16 * 64
    for turn in range(64):
        echo(remote, driver, b"round 1", slot=turn % 8)
    honest = remote.dma
    before = remote.memory.read(available, 4 + 2 * 64)

    def torn(message: Any) -> bytes:
        asked = message.decode()
        start, end = asked.address, asked.address + asked.count
        if message.name != "DMA_READ" or start > available + 2 or end <= available + 4:
            return honest(message)
        data = bytearray(before)
        data[2:4] = remote.memory.read(available + 2, 2)
        part = bytes(data[start - available : end - available])
        answer = DmaAccess(asked.address, asked.count, part)
        return reply(message.command, message.message_id, answer)

    remote.dma = torn
    # In the first round slot 0 of the ring had the first buffers; now it has others.
    remote.drivers[0].add([(BUFFERS + 0x9000, 7)], [(BUFFERS + 0x9800, 7)])
    echo(remote, driver, b"round 2", slot=10)
    assert device.echoed[-1] == b"round 2"


def test_buffers_that_are_shared_are_not_copied(client: Any, device: Any) -> None:
    """The rings are the client's alone; the second half, where buffers are, is shared."""
    client.negotiate()
    client.do(Command.DMA_MAP, DmaMap(3, 0, 0, HALF))
    client.do(Command.DMA_MAP, DmaMap(3, HALF, HALF, HALF), (client.memfd,))
    driver = client.start_driver(0)
    echo(client, driver, b"by hand")
    assert all(address < HALF for _, address, _ in client.dma_asked)


def test_rings_that_are_shared_are_served_directly(client: Any, device: Any) -> None:
    """And a buffer in memory that is not shared breaks the ring, instead of being read as zeros."""
    client.negotiate()
    client.do(Command.DMA_MAP, DmaMap(3, 0, 0, HALF), (client.memfd,))
    client.do(Command.DMA_MAP, DmaMap(3, HALF, HALF, HALF))
    driver = client.start_driver(0)
    assert client.put(0, b"elsewhere")
    driver.notify(0)
    for _ in range(100):
        if driver.status & Status.DEVICE_NEEDS_RESET:
            break
    assert driver.status & Status.DEVICE_NEEDS_RESET
    assert client.dma_asked == []
    assert device.echoed == []


def test_maps_change_under_traffic(remote: Any, device: Any) -> None:
    driver = remote.start_driver(0)
    for turn in range(6):
        assert remote.put(0, b"turn %d" % turn, slot=turn)
        driver.notify(0)
        # Another region, while the chain is on its way, or has not left.
        remote.do(Command.DMA_MAP, DmaMap(1, 0, SIZE, 4096))
        remote.ask(Command.DMA_UNMAP, DmaUnmap(SIZE, 4096), DmaUnmap)
        for _ in range(100):
            if remote.drivers[0].get_used()[1].tolist():
                break
            remote.serve_dma()
        assert remote.echoed(b"turn %d" % turn, slot=turn)
    assert device.echoed == [b"turn %d" % turn for turn in range(6)]


def test_an_interrupt_that_is_owed_when_maps_change_comes_later(remote: Any) -> None:
    """The queue stops between what the device used and the interrupt that tells of it."""
    driver = remote.start_driver(0)
    remote.serve_dma()
    echo(remote, driver, b"before")
    used_index = 0x10000 + 16 * 64 + 6 + 2 * 64 + 2 + 2  # with two bytes of padding
    honest = remote.dma
    held: list[Any] = []

    def hold_from_there_on(message: Any) -> bytes:
        asked = message.decode()
        if held or (message.name == "DMA_WRITE" and asked.address == used_index):
            held.append(message)
            return b""
        return honest(message)

    remote.dma = hold_from_there_on
    if remote.put(0, b"owed"):
        driver.notify(0)
    while not held:
        remote.serve_dma()
    remote.do(Command.DMA_MAP, DmaMap(1, 0, SIZE, 4096))
    remote.dma = honest
    for message in held:
        remote.send_bytes(honest(message))
    remote.wait_irq_serving(1)
    assert remote.drivers[0].get_used()[1].tolist() == [4]
    assert remote.echoed(b"owed")


def test_rings_that_fail_in_a_loop_fill_no_log(remote: Any, log: Callable[[], list[str]]) -> None:
    for _ in range(15):
        remote.dma_error = 0
        driver = remote.start_driver(0)
        remote.serve_dma()
        remote.dma_error = errno.EFAULT
        remote.put(0, b"nobody hears this")
        driver.notify(0)
        remote.serve_dma()
        assert driver.status & Status.DEVICE_NEEDS_RESET
    # They share one limit with what is said of drivers that come.
    assert 0 < sum("refused with error 14" in line for line in log()) <= 10


def test_memory_that_the_client_refuses_breaks_the_device(
    remote: Any, device: Any, log: Callable[[], list[str]]
) -> None:
    driver = remote.start_driver(0)
    remote.serve_dma()
    remote.dma_error = errno.EFAULT
    assert remote.put(0, b"nobody hears this")
    driver.notify(0)
    remote.serve_dma()
    assert driver.status & Status.DEVICE_NEEDS_RESET
    assert device.echoed == []
    assert any("queue 0: DMA_READ: refused with error 14" in line for line in log())
    # A driver that starts anew finds a device that works.
    remote.dma_error = 0
    driver = remote.start_driver(0)
    echo(remote, driver, b"anew")


def test_a_client_that_goes_while_it_is_asked(
    remote: Any, device: Any, server: Any, connect: Callable[[], Any]
) -> None:
    driver = remote.start_driver(0)
    assert remote.put(0, b"lost")
    driver.notify(0)
    remote.close()
    server.wait_for("connected", "gone")
    assert not device.running
    again = connect()
    driver = again.boot(0)
    assert again.echo(driver, 0, b"the next one")


@pytest.mark.parametrize(
    "answer",
    [
        DmaAccess(0, 4, b"1234"),
        DmaAccess(1 << 16, 4, b"1234"),
        DmaAccess(0, 1 << 40, b""),
    ],
)
def test_a_reply_with_other_bytes_breaks_the_device(
    remote: Any, device: Any, answer: DmaAccess
) -> None:
    driver = remote.start_driver(0)
    remote.dma = lambda message: reply(message.command, message.message_id, answer)
    remote.serve_dma()
    assert driver.status & Status.DEVICE_NEEDS_RESET


def test_a_reply_that_nobody_asked_for_ends_the_connection(
    remote: Any, server: Any, log: Callable[[], list[str]]
) -> None:
    remote.send_raw(Command.DMA_READ, DmaAccess(0, 1, b"x").pack(), flags=1)
    assert remote.is_sent_away()
    assert "DMA_READ: a reply that nobody asked for" in log()[0]


def test_an_indirect_table_that_names_itself(remote: Any, device: Any) -> None:
    """The device finds what is wrong; fetching ends all the same."""
    driver = remote.start_driver(0)
    remote.serve_dma()
    table = 0x10000
    # Descriptor 0: an indirect table, which is the descriptor table itself.
    remote.memory.write(table, struct.pack("<QIHH", table, 16, 4, 0))
    available = table + 16 * 64
    remote.memory.write(available + 4, struct.pack("<H", 0))
    remote.memory.write(available + 2, struct.pack("<H", 1))
    driver.notify(0)
    remote.serve_dma()
    assert driver.status & Status.DEVICE_NEEDS_RESET


def test_an_available_index_that_jumps(remote: Any, device: Any) -> None:
    driver = remote.start_driver(0)
    remote.serve_dma()
    remote.memory.write(0x10000 + 16 * 64 + 2, struct.pack("<H", 65))
    driver.notify(0)
    remote.serve_dma()
    assert driver.status & Status.DEVICE_NEEDS_RESET


# --- a socket of its own for what the server asks


@pytest.fixture
def twin(client: Any) -> Iterator[Any]:
    """A client whose second socket is served by a thread."""
    agreed = client.negotiate(
        replace(Capabilities(), twin_socket=True, named=frozenset({"twin_socket"}))
    ).capabilities
    assert agreed.twin_socket
    assert agreed.twin_fd_index == 0
    sock = socket.socket(fileno=client.received_fds.pop())
    parser = VfioUserParser()

    def serve() -> None:
        while data := sock.recv(65536):
            parser.receive_data(data)
            while (message := parser.next_message()) is not None:
                sock.sendall(client.dma(message))

    thread = threading.Thread(target=serve)
    thread.start()
    client.do(Command.DMA_MAP, DmaMap(3, 0, 0, SIZE))
    client.twin = sock
    yield client
    client.close()
    thread.join()
    sock.close()


def test_over_a_twin_socket(twin: Any, device: Any) -> None:
    driver = twin.start_driver(0)
    for turn in range(20):
        data = b"turn %d" % turn
        if twin.put(0, data):
            driver.notify(0)
        twin.wait_irq(1)
        twin.drivers[0].get_used()
        assert twin.echoed(data)


def test_commands_do_not_come_over_the_twin_socket(twin: Any, server: Any) -> None:
    twin.twin.sendall(request(Command.DEVICE_RESET, 1))
    assert twin.is_sent_away()
    server.wait_for("connected", "gone")
