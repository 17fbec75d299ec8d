"""Throw messages at the vfio-user server, right ones and wrong ones, over a socket pair.

Whatever comes, the server raises nothing, leaves no descriptor open, and serves the next client.

    python fuzz/vfio_user.py --seconds 60

tests/transport/vfio_user/test_fuzz.py plays the same with Hypothesis.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import struct
import sys
from contextlib import suppress
from typing import Any

from vring import MemoryWatch
from vring_serial import unix_fds
from vring_serial.chardev.null import NullChardev
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.device.pci import PciDevice
from vring_serial.proto.framing import Payload
from vring_serial.proto.vfio_user import VfioUserParser, reply, request
from vring_serial.proto.vfio_user_dma import DmaAccess, DmaMap, DmaUnmap
from vring_serial.proto.vfio_user_regions import (
    RegionAccess,
    RegionInfo,
    RegionIoFds,
    RegionRead,
    RegionWrite,
    WriteMulti,
)
from vring_serial.proto.vfio_user_version import Version
from vring_serial.proto.vfio_user_wire import Command, DeviceInfo, IrqInfo, IrqSet
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.transport.closer import Closer
from vring_serial.transport.session import SessionContext
from vring_serial.transport.vfio_user.rings import RemoteRings
from vring_serial.transport.vfio_user.session import VfioUserSession

_SAID = RateLimitedLog(logging.getLogger(__name__))
MEMORY = 1 << 20
#: Messages of one input.
MESSAGES = 60
#: Offsets that mean something in the virtio BAR, and in the configuration space.
PLACES = (0, 4, 8, 12, 16, 20, 22, 24, 26, 28, 30, 32, 40, 48, 58, 0x1000, 0x2000, 0x3000, 0x3004)
#: What the ring's parts hold: descriptor tables, indices, and numbers that are too large.
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 15, 16, 64, 0x80, 0xFF, 0x1000, 0x8000, 0x10000, 0xFFFF, 1 << 31)


class Choices:
    """Numbers out of an input; when it is used up, zeros."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def below(self, limit: int) -> int:
        taken = self._data[self._at : self._at + 2]
        self._at += 2
        return int.from_bytes(taken, "little") % limit

    def of(self, options: Any) -> Any:
        return options[self.below(len(options))]

    def number(self) -> int:
        """A small one, an interesting one, or anything."""
        kind = self.below(4)
        if kind < 2:
            return int(self.of(NUMBERS))
        return self.below(1 << 16) << (48 * (kind - 2)) & (1 << 64) - 1

    def word(self) -> int:
        return self.number() & 0xFFFFFFFF

    @property
    def left(self) -> bool:
        return self._at < len(self._data)


def payload_of(choose: Choices, command: Command) -> Payload | None:
    """One that may be right."""
    page = 4096 * choose.below(256)
    match command:
        case Command.VERSION:
            return Version(choose.below(2), choose.below(2))
        case Command.DMA_MAP:
            size = choose.of((4096, MEMORY, 4096 * choose.below(300)))
            return DmaMap(choose.of((3, 3, 3, 1, 0, 4)), choose.of((page, 0)), page, size)
        case Command.DMA_UNMAP:
            size = choose.of((4096, MEMORY, page))
            return DmaUnmap(page * choose.below(2), size, choose.of((0, 0, 2, 1)))
        case Command.DEVICE_GET_INFO:
            return DeviceInfo(argsz=choose.of((16, 32, 0)))
        case Command.DEVICE_GET_REGION_INFO:
            return RegionInfo(choose.below(11), argsz=choose.of((32, 64, 0)))
        case Command.DEVICE_GET_REGION_IO_FDS:
            return RegionIoFds(choose.below(10), argsz=choose.of((16, 4096)))
        case Command.DEVICE_GET_IRQ_INFO:
            return IrqInfo(choose.below(7))
        case Command.DEVICE_SET_IRQS:
            count = choose.of((1, 1, 2, choose.below(20)))
            return IrqSet(choose.of((33, 34, 36, 36, 9, 17, 20)), choose.of((0, 2, 2, 5)), 0, count)
        case Command.REGION_READ:
            return RegionRead(
                choose.of(PLACES), choose.of((4, 7, 1, 9)), choose.of((1, 2, 4, 8, 256))
            )
        case Command.REGION_WRITE:
            return write_of(choose)
        case Command.REGION_WRITE_MULTI:
            return WriteMulti(tuple(write_of(choose) for _ in range(choose.below(4))))
        case Command.DMA_READ | Command.DMA_WRITE:
            return DmaAccess(choose.number(), choose.below(64))
    return None


def write_of(choose: Choices) -> RegionWrite:
    """A write of a register."""
    size = choose.of((1, 2, 4, 8))
    value = choose.of((choose.number(), choose.of((1, 3, 11, 15)))) & (1 << 8 * size) - 1
    region = choose.of((4, 4, 4, 7, 1, 0))
    offset = choose.of(PLACES) if region == 4 else choose.of((4, 0x42, 0x10, 0, 12, 0x50))
    return RegionWrite(offset, region, size, value.to_bytes(size, "little"))


def warm_up() -> list[bytes]:
    """What brings a driver to DRIVER_OK with two queues, so that the rest happens while it runs."""
    writes: list[tuple[int, int, bytes]] = [(7, 4, b"\6\0"), (4, 20, b"\0"), (4, 20, b"\3")]
    for word, bits in enumerate((0x30000002, 1)):
        writes += [(4, 8, struct.pack("<I", word)), (4, 12, struct.pack("<I", bits))]
    writes.append((4, 20, b"\x0b"))
    for queue in range(4):
        at = 0x10000 * (queue + 1)
        writes += [(4, 22, struct.pack("<H", queue)), (4, 24, struct.pack("<H", 16))]
        for offset, part in ((32, 0), (40, 0x100), (48, 0x1000)):
            writes.append((4, offset, struct.pack("<Q", at + part)))
        writes.append((4, 28, b"\1\0"))
    writes.append((4, 20, b"\x0f"))
    return [
        request(Command.REGION_WRITE, 1, RegionAccess(at, region, len(data), data), no_reply=True)
        for region, at, data in writes
    ]


class Client:
    """The other end of the pair."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.parser = VfioUserParser()
        self.memfd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
        os.ftruncate(self.memfd, MEMORY)
        for queue in range(4):
            # One chain in each of warm_up's rings, to be read by the device or written.
            descriptor = struct.pack("<QIHH", 0x90000 + 0x1000 * queue, 64, 2 * (not queue % 2), 0)
            os.pwrite(self.memfd, descriptor, 0x10000 * (queue + 1))
            os.pwrite(self.memfd, struct.pack("<HHH", 0, 1, 0), 0x10000 * (queue + 1) + 0x100)
        self.event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def close(self) -> None:
        self.sock.close()
        unix_fds.close_all([self.memfd, self.event])

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        with suppress(OSError):
            unix_fds.send(self.sock, data, fds)

    def answer_server(self, choose: Choices) -> None:
        """Read what came; DMA requests get an answer, of some kind."""
        with suppress(OSError):
            while True:
                received = unix_fds.receive(self.sock, 1 << 16, 32)
                unix_fds.close_all(received.fds)
                if not received.data:
                    return
                self.parser.receive_data(received.data)
                while (message := self.parser.next_message()) is not None:
                    if not message.is_reply and choose.below(8):
                        asked = message.decode()
                        assert isinstance(asked, DmaAccess)
                        data = os.pread(self.memfd, asked.count, asked.address & MEMORY - 1)
                        data = data.ljust(asked.count, b"\0")
                        answer = DmaAccess(asked.address, asked.count, data)
                        self.send(reply(message.command, message.message_id, answer))

    def step(self, choose: Choices) -> None:
        """One message, as it should be, or with something wrong about it."""
        command = choose.of(tuple(Command))
        payload = payload_of(choose, command)
        data = bytearray(request(command, choose.below(9), payload, no_reply=choose.below(3) == 0))
        if choose.below(12) == 0 and len(data) > 16:
            data[16 + choose.below(len(data) - 16)] = choose.below(256)
        if choose.below(40) == 0:
            data[choose.below(16)] = choose.below(256)
        fds: tuple[int, ...] = ()
        if command == Command.DMA_MAP and choose.below(3):
            fds = (self.memfd,)
        elif isinstance(payload, IrqSet):
            fds = (self.event,) * choose.of((payload.count, payload.count, 0, choose.below(18)))
        elif choose.below(20) == 0:
            fds = (self.memfd, self.event)[: choose.below(3)]
        cut = choose.below(len(data)) if choose.below(20) == 0 else 0
        if cut:
            self.send(bytes(data[:cut]), fds)
            fds = ()
        self.send(bytes(data[cut:]), fds[:64])
        if choose.below(4) == 0:
            word = struct.pack("<Q", choose.number())
            os.pwrite(self.memfd, word, 0x10000 + 2 * choose.below(0x1800))


def _context(name: str, closer: Closer) -> SessionContext:
    return SessionContext(
        name=name,
        log=_SAID,
        watch=MemoryWatch(),
        closer=closer,
        greeted=lambda: None,
        ending=lambda: None,
        ended=lambda: None,
    )


async def _next_client_works(pci: PciDevice, rings: RemoteRings) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    session = VfioUserSession(
        ours,
        pci,
        rings,
        _context("next", Closer()),
    )
    with theirs:
        theirs.sendall(request(Command.VERSION, 1, Version()))
        theirs.sendall(request(Command.REGION_READ, 2, RegionRead(0, 7, 4)))
        parser = VfioUserParser()
        found: list[bytes] = []
        async with asyncio.timeout(5):
            while len(found) < 2:
                data = await asyncio.get_running_loop().sock_recv(theirs, 4096)
                assert data, "the next client is sent away"
                parser.receive_data(data)
                while (message := parser.next_message()) is not None:
                    assert not message.failed
                    found.append(message.payload)
        assert found[1][16:] == bytes.fromhex("f41a4310")
    session.close()


async def run(data: bytes) -> None:
    """One input. Raises AssertionError if it breaks what is said at the top."""
    choose = Choices(data)
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    controller = Controller(max_ports=3)
    controller.add_port(Port(1, "fuzz", NullChardev("null")))
    await controller.start()
    rings = RemoteRings(controller)
    pci = PciDevice(rings)
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    client = Client(theirs)
    closer = Closer()
    session = VfioUserSession(
        ours,
        pci,
        rings,
        _context("fuzz", closer),
    )
    if choose.below(8):
        client.send(request(Command.VERSION, 1, Version()))
        shared = (client.memfd,) if choose.below(3) else ()
        client.send(request(Command.DMA_MAP, 1, DmaMap(3, 0, 0, MEMORY)), shared)
        if choose.below(3):
            client.send(b"".join(warm_up()))
    for _ in range(MESSAGES):
        if not choose.left:
            break
        client.step(choose)
        if choose.below(3) == 0:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            client.answer_server(choose)
    await asyncio.sleep(0.001)
    client.close()
    await asyncio.sleep(0.001)
    session.close()
    await _next_client_works(pci, rings)
    pci.close()
    for _ in range(1000):
        if not closer.waiting:
            break
        await asyncio.sleep(0.001)
    await asyncio.sleep(0)
    left = len(os.listdir("/proc/self/fd")) - before
    if left > 0:
        gc.collect()  # what waits for the collector is no leak
        left = len(os.listdir("/proc/self/fd")) - before
    assert left <= 0, f"{left} descriptors are left behind"
    await controller.aclose()
    assert not failures, failures[0]


def one_input(data: bytes) -> None:
    """Run one input on a loop of its own."""
    asyncio.run(run(data))


if __name__ == "__main__":
    from runner import run as fuzz

    logging.disable(logging.CRITICAL)
    sys.exit(fuzz(one_input, "vfio-user"))
