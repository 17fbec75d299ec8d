"""A small guest with a console's driver, behind a VMM that speaks vfio-user."""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import socket
import sys
import termios
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from tests.support.waiting import DEADLINE, until
from vring import drain, notify
from vring_serial import unix_fds
from vring_serial.device.pci.layout import VIRTIO_BAR
from vring_serial.device.testing import PciDriver
from vring_serial.guest.driver import ConsoleDriver
from vring_serial.guest.memory import GuestRam
from vring_serial.guest.port import GuestPort
from vring_serial.guest.queue import DriverQueue
from vring_serial.proto.console import ConsoleConfig, ConsoleFeature, queue_count
from vring_serial.proto.framing import Payload
from vring_serial.proto.vfio_user import Message, VfioUserParser, reply, request
from vring_serial.proto.vfio_user_dma import DmaAccess, DmaFlag, DmaMap
from vring_serial.proto.vfio_user_features import (
    DeviceFeature,
    FeatureIndex,
    FeatureMethod,
    MigrationData,
    MigrationPhase,
    MigrationState,
)
from vring_serial.proto.vfio_user_regions import (
    RegionAccess,
    RegionIndex,
    RegionIoFds,
    RegionRead,
    RegionWrite,
)
from vring_serial.proto.vfio_user_version import Capabilities, Version
from vring_serial.proto.vfio_user_wire import Command, IrqIndex, IrqSet, IrqSetFlag
from vring_serial.proto.virtio import Feature, Status

T = TypeVar("T", bound=Payload)

QUEUE_SIZE = 256
_FEATURES = Feature.VERSION_1 | Feature.EVENT_IDX | Feature.INDIRECT_DESC | ConsoleFeature.MULTIPORT
_TELL = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER
_UNMASK = IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_UNMASK


class VfioGuest:
    """One guest; ``async with`` brings its driver up and takes it down.

    Args:
        path: of the server's socket.
        ports: how many it has queues for, besides port 0.
        packed: take packed rings.
        messages: notify queues by messages, not by the server's eventfds.
        intx: have the interrupt line, not MSI-X.
        shared: give a descriptor of the memory to the server.
        twin: have the server ask over a socket of its own.
        before: called before each message.
        memory: bytes of RAM.
        pieces: in how many it is mapped.
    """

    def __init__(
        self,
        path: str,
        ports: int,
        *,
        packed: bool = False,
        messages: bool = False,
        intx: bool = False,
        shared: bool = True,
        twin: bool = False,
        before: Callable[[Command], object] = lambda command: None,
        memory: int = 64 << 20,
        pieces: int = 1,
    ) -> None:
        self._path = path
        self._queue_numbers = range(queue_count(ports + 1, True))
        self._features = _FEATURES | (Feature.RING_PACKED if packed else 0)
        self._messages = messages
        self._intx = intx
        self._shared = shared
        self._twin_wanted = twin
        self._pieces = pieces
        self._before = before
        self._parser = VfioUserParser()
        self._sock = socket.socket(socket.AF_UNIX)
        self._twin: socket.socket | None = None
        self._twin_parser = VfioUserParser()
        self._fds: list[int] = []  # of ours, and such as came with answers
        self._number = 0
        self._ram = GuestRam(memory)
        self._queues: dict[int, DriverQueue] = {}
        self._console: ConsoleDriver | None = None
        self._line = -1
        self._loop = asyncio.get_running_loop()

    async def __aenter__(self) -> VfioGuest:
        try:
            self._connect(self._path)
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    @property
    def ram(self) -> GuestRam:
        """Its memory."""
        return self._ram

    @property
    def queues(self) -> dict[int, DriverQueue]:
        """Its queues, by index."""
        return self._queues

    def _connect(self, path: str) -> None:
        self._sock.settimeout(DEADLINE)
        self._sock.connect(path)

    def _begin(self) -> None:
        """Agree on capabilities, and map memory."""
        proposed = Capabilities(
            max_msg_fds=253,
            twin_socket=self._twin_wanted,
            named=frozenset({"max_msg_fds", "twin_socket"}),
        )
        answer = self._ask(Command.VERSION, Version(0, 0, proposed), Version)
        if self._twin_wanted:
            assert answer.capabilities is not None
            assert answer.capabilities.twin_socket
            self._twin = socket.socket(fileno=self._fds.pop())
            self._twin.settimeout(DEADLINE)
        each = self._ram.size // self._pieces
        for at in range(0, self._ram.size, each):
            where = DmaMap(DmaFlag.READ | DmaFlag.WRITE, at, self._ram.guest_addr + at, each)
            self._do(Command.DMA_MAP, where, (self._ram.fd,) if self._shared else ())

    def start(self) -> None:
        """Do what a VMM and a driver do until the device runs."""
        self._begin()
        driver = self._pci = PciDriver(
            partial(self._read, RegionIndex.CONFIG),
            partial(self._write, RegionIndex.CONFIG),
            lambda bar: (partial(self._read, bar), partial(self._write, bar)),
        )
        features_taken = driver.accept(self._features)
        self._make_queues(bool(features_taken & Feature.RING_PACKED))
        self._set_interrupts(driver)
        self._set_kicks(driver)
        for index, queue in self._queues.items():
            areas = (queue.desc, queue.avail, queue.used)
            driver.start_queue(index, QUEUE_SIZE, areas, vector=index + 1)
        config = driver.read_config(0, ConsoleConfig.SIZE).to_bytes(ConsoleConfig.SIZE, "little")
        self._console = ConsoleDriver(
            self._ram,
            self._queues,
            multiport=True,
            max_ports=ConsoleConfig.unpack(config).max_nr_ports,
            receive_size=4096,
            timeout=DEADLINE,
            on_event=lambda event: None,
            on_failure=self._failed,
        )
        driver.status |= Status.DRIVER_OK
        self.read_again()
        if self._twin is not None:
            self._loop.add_reader(self._twin, self._asked, self._twin, self._twin_parser)
        self._console.start()

    async def wait_port(self, *, name: str) -> GuestPort:
        """Return the port of this name as soon as it is there."""
        assert self._console is not None
        ports = self._console.ports

        def found() -> GuestPort | None:
            return next((port for port in ports.values() if port.name == name), None)

        await until(found, f"port {name}")
        port = found()
        assert port is not None
        return port

    def close(self) -> None:
        """Leave as a VMM that is killed."""
        if self._console is not None:
            self._console.stop(ConnectionError("the guest has ended"))
        for sock in (self._sock, self._twin):
            if sock is not None:
                self._loop.remove_reader(sock)
                sock.close()
        if self._line >= 0:
            self._loop.remove_reader(self._line)
        for queue in self._queues.values():
            self._loop.remove_reader(queue.kick_fd)
            queue.close()
        unix_fds.close_all(self._fds)
        self._fds.clear()
        self._ram.close()

    def leave_unread(self) -> None:
        """Do nothing that the server asks for, until :meth:`read_again`."""
        self._loop.remove_reader(self._sock)

    @property
    def unread(self) -> int:
        """Bytes that the server has sent and nobody has read."""
        size = fcntl.ioctl(self._sock, termios.FIONREAD, bytes(4))
        return int.from_bytes(size, sys.byteorder)

    def read_again(self) -> None:
        """Do what the server asks for."""
        self._loop.add_reader(self._sock, self._asked, self._sock, self._parser)

    def is_sent_away(self) -> bool:
        """Whether the server has closed the connection."""
        ready, _, _ = select.select([self._sock], [], [], 0)
        return bool(ready) and self._sock.recv(1, socket.MSG_PEEK) == b""

    # --- migration

    def feature(self, method: FeatureMethod, index: FeatureIndex, data: bytes = b"") -> bytes:
        """Ask for a feature; return the data of the reply."""
        asked = DeviceFeature(method | index, data, argsz=1 << 20)
        return self._ask(Command.DEVICE_FEATURE, asked, DeviceFeature).data

    def set_state(self, state: MigrationState) -> None:
        """Take the device to another state."""
        packed = MigrationPhase(state).pack()
        assert self.feature(FeatureMethod.SET, FeatureIndex.MIG_DEVICE_STATE, packed) == packed

    def read_state(self, piece: int = 1000) -> bytes:
        """Read the device's state, in pieces, to its end."""
        found = b""
        while True:
            asked = MigrationData(piece, argsz=MigrationData.SIZE + piece)
            part = self._ask(Command.MIG_DATA_READ, asked, MigrationData).data
            found += part
            if len(part) < piece:
                return found

    def write_state(self, state: bytes, piece: int = 700) -> None:
        """Write a device's state, in pieces."""
        for start in range(0, len(state), piece):
            part = state[start : start + piece]
            self._do(Command.MIG_DATA_WRITE, MigrationData(len(part), part))

    def attach(self, path: str) -> None:
        """Leave the server, and have the device of another one, which does not run yet."""
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self._sock = socket.socket(socket.AF_UNIX)
        self._parser = VfioUserParser()
        self._connect(path)
        self._begin()
        calls = tuple(queue.call_fd for queue in self._queues.values())
        self._do(Command.DEVICE_SET_IRQS, IrqSet(_TELL, IrqIndex.MSIX, 1, len(calls)), calls)
        self._set_kicks(self._pci)
        self.read_again()

    # --- the device

    def _make_queues(self, packed: bool) -> None:
        for index in self._queue_numbers:
            self._queues[index] = DriverQueue(
                index, self._ram, QUEUE_SIZE, event_idx=True, packed=packed
            )

    def _set_interrupts(self, driver: PciDriver) -> None:
        if self._intx:
            self._line = unix_fds.make_eventfd()
            self._fds.append(self._line)
            self._do(Command.DEVICE_SET_IRQS, IrqSet(_TELL, IrqIndex.INTX, 0, 1), (self._line,))
            self._loop.add_reader(self._line, self._interrupted)
            return
        self._write(RegionIndex.CONFIG, driver.msix_capability + 2, 0x8000, 2)
        calls = tuple(queue.call_fd for queue in self._queues.values())
        self._do(Command.DEVICE_SET_IRQS, IrqSet(_TELL, IrqIndex.MSIX, 1, len(calls)), calls)

    def _interrupted(self) -> None:
        drain(self._line)
        if self._pci.take_events():
            for queue in self._queues.values():
                notify(queue.call_fd)
        self._do(Command.DEVICE_SET_IRQS, IrqSet(_UNMASK, IrqIndex.INTX, 0, 1))

    def _set_kicks(self, driver: PciDriver) -> None:
        if self._messages:
            for index, queue in self._queues.items():
                self._loop.add_reader(queue.kick_fd, self._kicked, index)
            return
        before = len(self._fds)
        asked = RegionIoFds(VIRTIO_BAR, (), RegionIoFds.needed(1 << 10))
        places = self._ask(Command.DEVICE_GET_REGION_IO_FDS, asked, RegionIoFds).sub_regions
        kicks = self._fds[before:]
        assert len(kicks) == len(places)
        del self._fds[before:]
        for queue, kick in zip(self._queues.values(), kicks, strict=False):
            os.close(queue.kick_fd)
            queue.kick_fd = kick
        unix_fds.close_all(kicks[len(self._queues) :])

    def _kicked(self, index: int) -> None:
        drain(self._queues[index].kick_fd)
        self._pci.notify(index)

    def _failed(self, error: Exception) -> None:
        if not self.is_sent_away():
            raise AssertionError("the device failed") from error

    # --- messages

    def _read(self, region: int, offset: int, size: int) -> int:
        asked = RegionRead(offset, region, size)
        return int.from_bytes(self._ask(Command.REGION_READ, asked, RegionWrite).data, "little")

    def _write(self, region: int, offset: int, value: int, size: int) -> None:
        data = value.to_bytes(size, "little")
        self._ask(Command.REGION_WRITE, RegionAccess(offset, region, size, data), RegionRead)

    def _do(self, command: Command, payload: Payload, fds: tuple[int, ...] = ()) -> None:
        self._exchange(command, payload, fds).check_success()

    def _ask(self, command: Command, payload: Payload, expected: type[T]) -> T:
        return self._exchange(command, payload, ()).decode_reply(expected)

    def _exchange(self, command: Command, payload: Payload, fds: tuple[int, ...]) -> Message:
        self._before(command)
        self._number = self._number + 1 & 0xFFFF
        data = request(command, self._number, payload)
        self._sock.sendall(data[unix_fds.send(self._sock, data, fds) :])
        while True:
            while (message := self._parser.next_message()) is None:
                self._receive(self._sock, self._parser)
            if not message.is_reply:
                self._serve(self._sock, message)
            else:
                assert message.message_id == self._number, "an answer to something else"
                self._fds += message.fds
                self._loop.call_soon(self._serve_all, self._sock, self._parser)  # what came with it
                return message

    def _receive(self, sock: socket.socket, parser: VfioUserParser) -> None:
        received = unix_fds.receive(sock, 1 << 16, 253)
        if not received.data:
            raise ConnectionError("the server has closed the connection")
        parser.receive_data(received.data, received.fds)

    def _asked(self, sock: socket.socket, parser: VfioUserParser) -> None:
        """Do what the server asks for."""
        try:
            self._receive(sock, parser)
        except ConnectionError:
            self._loop.remove_reader(sock)
        else:
            self._serve_all(sock, parser)

    def _serve_all(self, sock: socket.socket, parser: VfioUserParser) -> None:
        while sock.fileno() >= 0 and (message := parser.next_message()) is not None:
            assert not message.is_reply, "an answer to nothing"
            self._serve(sock, message)

    def _serve(self, sock: socket.socket, message: Message) -> None:
        asked = message.decode()
        assert isinstance(asked, DmaAccess)
        if message.command == Command.DMA_READ:
            data = self._ram.memory.read(asked.address, asked.count)
            answer = DmaAccess(asked.address, asked.count, data)
        else:
            self._ram.memory.write(asked.address, asked.data)
            answer = DmaAccess(asked.address, asked.count)
        sock.sendall(reply(message.command, message.message_id, answer))
