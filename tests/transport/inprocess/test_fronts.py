"""Devices inside an emulator: without a loop of its own, beside one, and from another thread."""

from __future__ import annotations

import asyncio
import os
import pydoc
import select
import threading
import time

import pytest

from tests.support.waiting import until, wait_until
from vring import GuestMemory
from vring.testing import GuestQueue
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.chardev.pty import PtyChardev, PtyOptions
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.device.testing import ANY_FEATURE, LegacyPciDriver, MmioDriver, PciDriver
from vring_serial.errors import LocalProtocolError
from vring_serial.proto.console import ConsoleFeature
from vring_serial.proto.virtio import Feature, Status
from vring_serial.transport.inprocess.fronts import (
    InProcessMmio,
    InProcessPci,
    LoopHost,
    PolledHost,
    Window,
)

#: A single port, so that two queues are the whole driver.
FEATURES = Feature.VERSION_1 | Feature.EVENT_IDX | ConsoleFeature.EMERG_WRITE
RECEIVEQ, TRANSMITQ = 0, 1


class Upper(asyncio.Protocol):
    """Answers in capitals."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data.upper())


class Emulator:
    """RAM, two queues in it, and what interrupts came."""

    def __init__(self) -> None:
        self.levels: list[bool] = []
        self.messages: list[tuple[int, int]] = []
        need = GuestQueue.bytes_needed(16, 4096)
        self.receive = GuestQueue(
            bytearray(need), 16, 4096, writable=True, event_idx=True, guest_addr=0x10_0000
        )
        self.transmit = GuestQueue(
            bytearray(need), 16, 4096, writable=False, event_idx=True, guest_addr=0x80_0000
        )
        self.memory = GuestMemory([*self.receive.memory.regions, *self.transmit.memory.regions])
        self.driver = None

    def msi(self, address: int, data: int) -> None:
        self.messages.append((address, data))

    def pci(self, host, device, **options) -> InProcessPci:
        pci = InProcessPci(
            host, device, self.memory, msi=self.msi, intx=self.levels.append, **options
        )
        if options.get("transitional"):
            io = pci.bars[0]
            self.driver = LegacyPciDriver(pci.config.write, io.read, io.write)
        else:
            self.driver = PciDriver(
                pci.config.read,
                pci.config.write,
                lambda bar: (pci.bars[bar].read, pci.bars[bar].write),
            )
        return pci

    def mmio(self, host, device, **options) -> InProcessMmio:
        mmio = InProcessMmio(host, device, self.memory, interrupt=self.levels.append, **options)
        self.driver = MmioDriver(mmio.read, mmio.write)
        return mmio

    def boot(self, features: int = ANY_FEATURE) -> None:
        """A driver for the one port."""
        self.driver.accept(features)
        for index, queue in ((RECEIVEQ, self.receive), (TRANSMITQ, self.transmit)):
            self.driver.start_queue(index, queue.size, queue.rings, vector=index)
        self.driver.status = self.driver.status | Status.DRIVER_OK
        self.receive.offer()
        self.receive.driver.enable_notifications()
        self.driver.notify(RECEIVEQ)

    def send(self, data: bytes) -> None:
        self.transmit.collect()
        if self.transmit.send(data, [len(data)]):
            self.driver.notify(TRANSMITQ)

    def take(self) -> bytes:
        data = self.receive.receive()
        while self.receive.driver.enable_notifications():
            data += self.receive.receive()
        if data:
            self.receive.offer()
        return data


def upper_device() -> Controller:
    device = Controller(features=FEATURES, queue_size_max=16)
    device.add_port(Port(0, "", ProtocolChardev("upper", Upper)))
    return device


@pytest.fixture
def emulator() -> Emulator:
    return Emulator()


@pytest.fixture
def host():
    host = PolledHost()
    yield host
    host.close()


@pytest.mark.parametrize("kind", ["pci", "mmio"])
def test_an_access_serves_the_queue_before_it_returns(emulator, host, kind):
    device = upper_device()
    host.complete(device.start())
    front = getattr(emulator, kind)(host, device)
    emulator.boot()
    for word in (b"one", b"two", b"three"):
        emulator.send(word)
        assert emulator.take() == word.upper()
        assert emulator.levels == [True]
        assert emulator.driver.take_events() == 1
        assert emulator.levels == [True, False]
        emulator.levels.clear()
    front.close()
    host.complete(device.aclose())


@pytest.mark.parametrize("kind", ["pci", "mmio"])
def test_a_notification_carries_data(emulator, host, kind):
    device = upper_device()
    host.complete(device.start())
    front = getattr(emulator, kind)(host, device)
    emulator.boot(ANY_FEATURE | int(Feature.NOTIFICATION_DATA))
    emulator.transmit.send(b"with data", [9])
    driver = emulator.transmit.driver
    emulator.driver.notify(TRANSMITQ, driver.notification_data(TRANSMITQ))
    assert emulator.take() == b"WITH DATA"
    assert front.notification_data(TRANSMITQ) == (TRANSMITQ, driver.avail_index, False)
    front.close()
    host.complete(device.aclose())


def test_without_synchronous_service_only_poll_serves(emulator):
    host = PolledHost(synchronous=False)
    device = upper_device()
    host.complete(device.start())
    pci = emulator.pci(host, device)
    emulator.boot()
    host.poll()
    emulator.send(b"word")
    assert emulator.take() == b""
    ready, _, _ = select.select([host], [], [], 5)
    assert ready == [host]
    assert host.poll() is None
    assert emulator.take() == b"WORD"
    pci.close()
    host.complete(device.aclose())
    host.close()
    pci.close()
    host.close()


def test_a_foreign_loop_learns_of_timers(host):
    fired = []

    def start() -> None:
        asyncio.get_running_loop().call_later(0.05, fired.append, True)

    host.run(start)
    wait = host.poll()
    assert 0 < wait <= 0.05
    assert not fired
    time.sleep(wait)  # as a foreign loop does, which was told to come back then
    assert host.poll() is None
    assert fired


def test_one_poll_is_bounded(host):
    turns = []

    def again() -> None:
        turns.append(1)
        asyncio.get_running_loop().call_soon(again)

    host.run(again)
    first = len(turns)
    assert 1 < first < 1000
    assert host.poll() == 0, "there is more to do"
    assert len(turns) > first


def test_errors_come_out_of_the_access_that_caused_them(host):
    def fail() -> None:
        raise OSError("no more descriptors")

    with pytest.raises(OSError, match="no more"):
        host.run(fail)


def test_poll_does_not_nest(host):
    def nest() -> None:
        host.run(lambda: None)  # which an interrupt's handler may
        host.notified()
        host.poll()

    with pytest.raises(LocalProtocolError, match="within"):
        host.run(nest)


def test_a_descriptor_end_works_without_anybody_else_s_loop(emulator, host):
    device = Controller(features=FEATURES, queue_size_max=16)
    chardev = PtyChardev("terminal", PtyOptions())
    device.add_port(Port(0, "", chardev))
    host.complete(device.start())
    pci = emulator.pci(host, device)
    terminal = os.open(chardev.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        emulator.boot()
        wait_until(lambda: (host.poll(), device.ports[0].host_open)[1])
        os.write(terminal, b"typed\n")
        got = bytearray()

        def arrived():
            host.poll()
            got.extend(emulator.take())
            return got == b"typed\n" and emulator.levels

        wait_until(arrived)
        assert emulator.levels[:1] == [True]
    finally:
        os.close(terminal)
    pci.close()
    host.complete(device.aclose())


def test_msi_x_messages_are_what_the_guest_wrote(emulator, host):
    device = upper_device()
    host.complete(device.start())
    pci = emulator.pci(host, device)
    pci.config.write(emulator.driver.msix_capability + 2, 0x8000, 2)
    for vector in (RECEIVEQ, TRANSMITQ):
        for offset, value in ((0, 0xFEE0_0000), (4, 0), (8, 0x40 + vector), (12, 0)):
            pci.bars[1].write(16 * vector + offset, value, 4)
    emulator.boot()
    emulator.send(b"word")
    assert (0xFEE0_0000, 0x40) in emulator.messages
    assert emulator.levels == []
    pci.close()
    host.complete(device.aclose())


def test_a_function_is_found_where_the_guest_has_mapped_it(emulator, host):
    device = upper_device()
    host.complete(device.start())
    pci = emulator.pci(host, device, transitional=True)
    pci.config.write(0x10, 0xC000, 4)
    pci.config.write(0x14, 0xE000_0000, 4)
    pci.config.write(0x20, 0xE010_0000, 4)
    pci.config.write(4, 3, 2)
    assert pci.find(0xC012, io=True) == (pci.bars[0], 0x12)
    assert pci.find(0xE010_3004) == (pci.bars[4], 0x3004)
    assert pci.find(0xE000_0000) == (pci.bars[1], 0)
    assert pci.find(0xC012) is None
    assert pci.find(0xE010_3004, io=True) is None
    assert pci.find(0xE010_0000 + pci.bars[4].size) is None
    pci.close()
    host.complete(device.aclose())


def test_the_machine_is_reset(emulator, host):
    device = upper_device()
    host.complete(device.start())
    pci = emulator.pci(host, device)
    emulator.boot()
    emulator.send(b"word")
    pci.reset()
    assert emulator.driver.status == 0
    assert pci.config.read(4, 2) == 0
    assert not pci.intx_level
    emulator.send(b"into the void")
    assert emulator.take() == b"WORD", "what came before"
    assert emulator.take() == b""
    pci.close()
    host.complete(device.aclose())


async def test_beside_a_loop(emulator):
    device = upper_device()
    await device.start()
    pci = emulator.pci(LoopHost(), device)
    emulator.boot()
    emulator.send(b"word")
    await until(lambda: emulator.levels)
    assert emulator.take() == b"WORD"
    pci.close()
    await device.aclose()


async def test_from_another_thread(emulator):
    device = upper_device()
    await device.start()
    pci = emulator.pci(LoopHost(), device)
    raised = threading.Event()
    levels: list[bool] = emulator.levels
    words: list[bytes] = []

    def level_changed(level: bool) -> None:
        levels.append(level)
        if level:
            raised.set()

    pci.close()
    pci = InProcessPci(LoopHost(), device, emulator.memory, msi=emulator.msi, intx=level_changed)
    bar = pci.bars[4]
    emulator.driver = PciDriver(pci.config.read, pci.config.write, lambda _: (bar.read, bar.write))

    def vcpu() -> None:
        emulator.boot()
        for word in (b"one", b"two", b"three"):
            emulator.send(word)
            answer = b""
            while not answer:
                assert raised.wait(5)
                raised.clear()
                assert emulator.driver.take_events()
                answer = emulator.take()
            words.append(answer)
        emulator.driver.status = 0

    async with asyncio.timeout(20):
        await asyncio.to_thread(vcpu)
    assert words == [b"ONE", b"TWO", b"THREE"]
    assert levels[-1] is False
    pci.close()
    await device.aclose()


def test_misuse_of_fronts_and_hosts_is_a_named_error(emulator, host):
    device = upper_device()
    with pytest.raises(LocalProtocolError, match="was not started"):
        emulator.pci(host, device)
    host.complete(device.start())
    pci = emulator.pci(host, device)
    with pytest.raises(LocalProtocolError, match="has this device already"):
        emulator.pci(host, device)
    pci.close()
    emulator.pci(host, device).close()  # it may have another one afterwards
    host.complete(device.aclose())

    closed = PolledHost()
    closed.close()
    work = device.start()
    calls = (closed.poll, closed.fileno, lambda: closed.run(int), lambda: closed.complete(work))
    for call in calls:
        with pytest.raises(LocalProtocolError, match="was closed"):
            call()


def test_help_explains_what_a_window_has():
    for front in (InProcessMmio, Window):
        text = pydoc.plain(pydoc.render_doc(front))
        for word in ("read(offset, size) -> value", "write(offset, value, size)", "size"):
            assert word in text


def test_a_driver_that_nothing_can_be_done_for_is_told_of(emulator, host, caplog):
    """Such a driver was restored with its guest: the device knows nothing of its queues."""
    device = upper_device()
    host.complete(device.start())
    mmio = InProcessMmio(host, device, None, interrupt=lambda level: None)
    mmio.write(0x50, 1, 4)
    assert "notified queue 1, which it never set up: was this guest restored" in caplog.text
    mmio.write(0x24, 1, 4)
    mmio.write(0x20, 1, 4)  # VERSION_1
    for status in (Status.ACKNOWLEDGE | Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK):
        mmio.write(0x70, mmio.read(0x70, 4) | status, 4)
    assert "the driver is ready, but no guest memory is mapped" in caplog.text
    mmio.close()
    host.complete(device.aclose())
