"""A served PCI function in a thread of its own, and a client that does one thing after another."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.support.waiting import DEADLINE, LoopClock, turns, until
from vring import GuestMemory, Region, SplitDriver
from vring_serial import unix_fds
from vring_serial.device.base import VirtioDevice
from vring_serial.device.testing import ANY_FEATURE, PciDriver
from vring_serial.proto.framing import Payload
from vring_serial.proto.vfio_user import Message, VfioUserParser, error_reply, reply, request
from vring_serial.proto.vfio_user_dma import DmaAccess, DmaFlag, DmaMap
from vring_serial.proto.vfio_user_regions import RegionAccess, RegionIndex, RegionRead, RegionWrite
from vring_serial.proto.vfio_user_version import Capabilities, Version
from vring_serial.proto.vfio_user_wire import (
    Command,
    DeviceInfo,
    Header,
    IrqIndex,
    IrqSet,
    IrqSetFlag,
)
from vring_serial.proto.virtio import Status
from vring_serial.transport.vfio_user.server import VfioUserServer

T = TypeVar("T", bound=Payload)

MEMORY_SIZE = 1 << 20
QUEUE_SIZE = 64
BUFFERS = 0x80000
#: What QEMU says of itself.
QEMU = Capabilities(
    max_msg_fds=16,
    max_data_xfer_size=1 << 20,
    max_dma_maps=65535,
    pgsizes=4096,
    write_multiple=True,
    named=frozenset(
        {"max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes", "write_multiple"}
    ),
)


class Server:
    """A server on an event loop in its own thread; its client may then wait like any program."""

    def __init__(self, device: VirtioDevice, path: Path, **options: Any) -> None:
        self.path = path
        self.clients: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.server = VfioUserServer(device, str(path), **options)
        self.server.on_peer = self.clients.append
        self._patches = pytest.MonkeyPatch()
        self._clock: LoopClock = self.run(self._make_clock())
        self.run(self.server.start())

    async def _make_clock(self) -> LoopClock:
        return LoopClock(self._patches)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run it in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE)

    def settle(self) -> None:
        """Let the server see what was sent before, and finish with it."""
        self.run(turns())

    def pass_time(self, seconds: float) -> None:
        """Have the server's loop do what is due then."""
        self.settle()
        self.run(self._clock.forward(seconds))

    def wait_for(self, *states: str) -> None:
        """Until ``on_peer`` has told these."""

        async def wait() -> None:
            await until(lambda: tuple(self.clients) == states)

        self.run(wait())

    def close(self) -> None:
        self.run(self.server.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._patches.undo()
        self._loop.close()


class Client:
    """A VMM without a machine: sends, and waits for the answer."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(DEADLINE)
        self.sock.connect(str(path))
        self.parser = VfioUserParser()
        self.memfd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.memfd, MEMORY_SIZE)
        self.memory = GuestMemory([Region.map(self.memfd, MEMORY_SIZE, guest_addr=0)])
        self.drivers: dict[int, SplitDriver] = {}
        self.irqs: dict[int, int] = {}
        self.received_fds: list[int] = []
        self.dma_asked: list[tuple[str, int, int]] = []
        self.dma_error = 0
        self._last_id = 0

    def close(self) -> None:
        self.sock.close()
        unix_fds.close_all([self.memfd, *self.irqs.values(), *self.received_fds])
        self.memfd = -1
        self.irqs.clear()
        self.received_fds.clear()

    # --- messages

    def send_bytes(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        while data:
            data = data[unix_fds.send(self.sock, data, fds) :]
            fds = ()

    def send(
        self,
        command: Command,
        payload: Payload | None = None,
        fds: tuple[int, ...] = (),
        *,
        no_reply: bool = False,
    ) -> int:
        self._last_id = self._last_id + 1 & 0xFFFF
        self.send_bytes(request(command, self._last_id, payload, no_reply=no_reply), fds)
        return self._last_id

    def send_raw(self, command: int, data: bytes, fds: tuple[int, ...] = (), flags: int = 0) -> int:
        """A message whose payload is any bytes."""
        self._last_id = self._last_id + 1 & 0xFFFF
        header = Header(self._last_id, command, Header.SIZE + len(data), flags)
        self.send_bytes(header.pack() + data, fds)
        return self._last_id

    def receive(self) -> Message:
        """The next reply; what the server asks meanwhile is answered."""
        while True:
            message = self.next_message()
            self.received_fds += message.fds
            if message.is_reply:
                return message
            self.send_bytes(self.dma(message))

    def dma(self, message: Message) -> bytes:
        """The answer to what the server asks."""
        asked = message.decode()
        assert isinstance(asked, DmaAccess)
        self.dma_asked.append((message.name, asked.address, asked.count))
        if self.dma_error:
            return error_reply(message.command, message.message_id, self.dma_error)
        if message.command == Command.DMA_READ:
            data = self.memory.read(asked.address, asked.count)
            answer = DmaAccess(asked.address, asked.count, data)
        else:
            assert len(asked.data) == asked.count
            self.memory.write(asked.address, asked.data)
            answer = DmaAccess(asked.address, asked.count)
        return reply(message.command, message.message_id, answer)

    def until_silent(self, asked: Callable[[Message], object]) -> None:
        """Call ``asked`` for each request of the server, until 20 round trips bring none."""
        silent = 0
        while silent < 20:
            silent += 1
            sent = self.send(Command.DEVICE_GET_INFO, DeviceInfo())
            while not (message := self.next_message()).is_reply:
                silent = 0
                asked(message)
            assert message.message_id == sent, "a reply to nothing"

    def next_message(self) -> Message:
        while (message := self.parser.next_message()) is None:
            self.read_more()
        return message

    def serve_dma(self) -> None:
        """Answer what the server asks, until it asks nothing more."""
        self.until_silent(lambda message: self.send_bytes(self.dma(message)))

    def serve_waiting(self) -> None:
        """Answer what the server has asked by now."""
        while True:
            while (message := self.parser.next_message()) is not None:
                assert not message.is_reply, "a reply to nothing"
                self.send_bytes(self.dma(message))
            if not select.select([self.sock], [], [], 0)[0]:
                return
            self.read_more()

    def read_more(self) -> None:
        """Wait for bytes, and give them to the parser."""
        received = unix_fds.receive(self.sock, 65536, 64)
        if not received.data:
            raise ConnectionResetError("the server closed the connection")
        self.parser.receive_data(received.data, received.fds)

    def answer(self, message_id: int) -> Message:
        """The next message, which must be the reply to this one."""
        message = self.receive()
        assert message.is_reply
        assert message.message_id == message_id
        return message

    def ask(
        self, command: Command, payload: Payload, expected: type[T], fds: tuple[int, ...] = ()
    ) -> T:
        message = self.answer(self.send(command, payload, fds))
        assert message.command == command
        return message.decode_reply(expected)

    def do(
        self, command: Command, payload: Payload | None = None, fds: tuple[int, ...] = ()
    ) -> None:
        """Ask for what has an empty reply."""
        message = self.answer(self.send(command, payload, fds))
        assert not message.failed, f"error {message.error}"
        assert message.payload == b""

    def refused(self, command: Command, payload: Payload, fds: tuple[int, ...] = ()) -> int:
        """The error that the server answers."""
        return self.error_of(self.send(command, payload, fds))

    def error_of(self, message_id: int) -> int:
        message = self.answer(message_id)
        assert message.failed
        assert message.payload == b""
        return message.error

    def is_sent_away(self) -> bool:
        try:
            return self.sock.recv(65536) == b""
        except ConnectionError:
            return True

    # --- usual sequences

    def negotiate(self, capabilities: Capabilities | None = QEMU) -> Version:
        return self.ask(Command.VERSION, Version(0, 0, capabilities), Version)

    def map_memory(self) -> None:
        flags = DmaFlag.READ | DmaFlag.WRITE
        self.do(Command.DMA_MAP, DmaMap(flags, 0, 0, MEMORY_SIZE), (self.memfd,))

    def read(self, region: int, offset: int, size: int) -> int:
        asked = RegionRead(offset, region, size)
        answer = self.ask(Command.REGION_READ, asked, RegionWrite)
        assert (answer.offset, answer.region, answer.count) == (offset, region, size)
        return int.from_bytes(answer.data, "little")

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        data = value.to_bytes(size, "little")
        asked = RegionAccess(offset, region, size, data)
        answer = self.ask(Command.REGION_WRITE, asked, RegionRead)
        assert (answer.offset, answer.region, answer.count) == (offset, region, size)

    def post(self, region: int, offset: int, value: int, size: int) -> None:
        """A write that is not answered."""
        asked = RegionAccess(offset, region, size, value.to_bytes(size, "little"))
        self.send(Command.REGION_WRITE, asked, no_reply=True)

    def set_eventfd(self, index: int, start: int, count: int = 1) -> list[int]:
        """Give interrupts descriptors; the client's own are kept by vector."""
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        fds = [os.eventfd(0, flags) for _ in range(count)]
        for vector, fd in enumerate(fds, start):
            unix_fds.close_all([self.irqs.pop(vector, -1)])
            self.irqs[vector] = fd
        what = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER
        self.do(Command.DEVICE_SET_IRQS, IrqSet(what, index, start, count), tuple(fds))
        return fds

    def driver(self) -> PciDriver:
        """A driver of the virtio device, whose every access is a message."""

        def bar(index: int) -> tuple[Callable[..., int], Callable[..., None]]:
            return partial(self.read, index), partial(self.write, index)

        return PciDriver(*bar(RegionIndex.CONFIG), bar)

    def boot(self, *queues: int, vectors: bool = True) -> PciDriver:
        """Bring the device up as a driver does, with these queues."""
        self.negotiate()
        self.map_memory()
        return self.start_driver(*queues, vectors=vectors)

    def start_driver(self, *queues: int, vectors: bool = True) -> PciDriver:
        """As :meth:`boot`, for those who have said VERSION and mapped memory."""
        driver = self.driver()
        driver.accept(ANY_FEATURE)
        if vectors:
            self.write(RegionIndex.CONFIG, driver.msix_capability + 2, 0x8000, 2)
            self.set_eventfd(IrqIndex.MSIX, 0, max(queues) + 2)
        for index in queues:
            self.start_queue(driver, index)
        driver.status |= Status.DRIVER_OK
        return driver

    def start_queue(self, driver: PciDriver, index: int) -> None:
        """A ring in guest memory; vector ``index + 1``."""
        descriptors, available, used = SplitDriver.layout(QUEUE_SIZE)
        start = 0x10000 * (index + 1)
        parts = start, start + descriptors, (start + descriptors + available + 3) & ~3
        self.memory.write(start, bytes(parts[2] + used - start))
        self.drivers[index] = SplitDriver(self.memory, QUEUE_SIZE, *parts, event_idx=True)
        driver.start_queue(index, QUEUE_SIZE, parts, vector=index + 1)

    # --- the driver of the echo device

    def put(self, index: int, data: bytes, slot: int = 0, at: int = -1) -> bool:
        """Make one chain available; True if the device is to be notified.

        ``at``: where the device finds the slot; by default where it is in ``memory``.
        """
        self.memory.write(BUFFERS + 0x1000 * slot, data)
        at = BUFFERS + 0x1000 * slot if at < 0 else at
        self.drivers[index].enable_notifications()
        self.drivers[index].add([(at, len(data))], [(at + 0x800, len(data))])
        return self.drivers[index].publish()

    def echoed(self, data: bytes, slot: int = 0) -> bool:
        return self.memory.read(BUFFERS + 0x1000 * slot + 0x800, len(data)) == data

    def wait_irq_serving(self, vector: int) -> None:
        """As :meth:`wait_irq`, while the server asks for memory."""
        give_up = time.monotonic() + 2 * DEADLINE
        while not self.irq_count(vector):
            assert time.monotonic() < give_up, f"interrupt {vector} did not come"
            self.serve_waiting()  # what was read already, too
            select.select([self.sock.fileno(), self.irqs[vector]], [], [], DEADLINE)

    def wait_irq(self, vector: int) -> None:
        """Until the device has told this interrupt."""
        os.set_blocking(self.irqs[vector], True)
        done = threading.Timer(DEADLINE, os.eventfd_write, (self.irqs[vector], 1 << 32))
        done.start()
        assert os.eventfd_read(self.irqs[vector]) < 1 << 32, f"interrupt {vector} did not come"
        done.cancel()
        os.set_blocking(self.irqs[vector], False)

    def irq_count(self, vector: int) -> int:
        """How often it was told since the last look."""
        try:
            return os.eventfd_read(self.irqs[vector])
        except BlockingIOError:
            return 0

    def echo(self, driver: PciDriver, index: int, data: bytes, slot: int = 0) -> bool:
        """Through the ring and back, notified by message, told by interrupt."""
        if self.put(index, data, slot):
            driver.notify(index)
        self.wait_irq(index + 1)
        return self.drivers[index].get_used()[1].tolist() == [len(data)] and self.echoed(data, slot)
