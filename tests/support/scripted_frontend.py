"""A vhost-user frontend that follows a script, with RAM in a memfd and real rings in it."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

from tests.support.echo_device import FEATURES
from tests.support.waiting import DEADLINE, turns, until
from vring import (
    Driver,
    GuestMemory,
    PackedDriver,
    Region,
    SplitDriver,
)
from vring_serial import unix_fds
from vring_serial.proto.vhost_user import (
    U64,
    BackendRequest,
    Empty,
    MemoryRegion,
    MemoryTable,
    Message,
    Payload,
    Request,
    VhostUserParser,
    VringAddress,
    VringDescriptor,
    VringState,
    reply,
    request,
)

PROTOCOL_BIT = 1 << 30
#: First user address of the frontend's memory; guest address 0 is there.
USER = 0x7F12_3456_0000
MEMORY_SIZE = 1 << 20
QUEUE_SIZE = 64
BUFFERS = 0x80000


class ScriptedFrontend:
    """Sends what it is told to over a real socket, with RAM in a memfd and real rings in it.

    Attributes:
        packed: its rings are.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self.packed = False
        self.parser = VhostUserParser(Request, replies=True)
        self.memfd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.memfd, MEMORY_SIZE + 4096)
        # As User-Mode Linux has it: the region does not begin where its file does.
        self.region = MemoryRegion(0, MEMORY_SIZE, USER, 4096)
        self.memory = GuestMemory([Region.map(self.memfd, MEMORY_SIZE, offset=4096, guest_addr=0)])
        self.drivers: dict[int, Driver] = {}
        self.places: dict[int, VringAddress] = {}
        self.kicks: dict[int, int] = {}
        self.calls: dict[int, int] = {}
        self.channel: socket.socket | None = None
        self.channel_parser = VhostUserParser(BackendRequest)

    def close(self) -> None:
        self.sock.close()
        if self.channel is not None:
            self.channel.close()
        unix_fds.close_all([self.memfd, *self.kicks.values(), *self.calls.values()])
        self.memfd = -1
        self.kicks.clear()
        self.calls.clear()

    # --- messages

    def send_bytes(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        assert unix_fds.send(self.sock, data, fds) == len(data)

    def send(
        self,
        kind: Request,
        payload: Payload | None = None,
        fds: tuple[int, ...] = (),
        need_reply: bool = False,
    ) -> None:
        self.send_bytes(request(kind, payload, need_reply=need_reply), fds)

    async def receive_bytes(self, count: int) -> bytes:
        """Exactly so many, with no other behind them."""
        loop = asyncio.get_running_loop()
        data = b""
        async with asyncio.timeout(DEADLINE):
            while len(data) < count:
                more = await loop.sock_recv(self.sock, 4096)
                assert more, "the backend closed the connection"
                data += more
        assert len(data) == count
        return data

    async def receive(self) -> Message:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DEADLINE):
            while (message := self.parser.next_message()) is None:
                data = await loop.sock_recv(self.sock, 4096)
                assert data, "the backend closed the connection"
                self.parser.receive_data(data)
        return message

    async def acked(
        self, kind: Request, payload: Payload | None = None, fds: tuple[int, ...] = ()
    ) -> int:
        """Send with NEED_REPLY; what the acknowledgement says."""
        self.send(kind, payload, fds, need_reply=True)
        answer = await self.receive()
        assert answer.kind == kind
        return answer.decode_reply(U64).value

    async def ask(self, kind: Request, payload: Payload | None = None) -> Message:
        self.send(kind, payload)
        answer = await self.receive()
        assert answer.kind == kind
        return answer

    async def number(self, kind: Request) -> int:
        return (await self.ask(kind)).decode_reply(U64).value

    async def base(self, index: int) -> int:
        """GET_VRING_BASE."""
        state = (await self.ask(Request.GET_VRING_BASE, VringState(index))).decode_reply(VringState)
        assert state.index == index
        return state.num

    async def is_sent_away(self) -> bool:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DEADLINE):
            try:
                return await loop.sock_recv(self.sock, 100) == b""
            except ConnectionError:
                return True

    # --- usual sequences

    async def negotiate(self, protocol_features: int, features: int = FEATURES) -> None:
        """With memory; ``protocol_features`` has REPLY_ACK."""
        assert await self.acked(Request.SET_PROTOCOL_FEATURES, U64(protocol_features)) == 0
        assert await self.acked(Request.SET_FEATURES, U64(features | PROTOCOL_BIT)) == 0
        table = MemoryTable((self.region,))
        assert await self.acked(Request.SET_MEM_TABLE, table, (self.memfd,)) == 0

    def ring(self, index: int, size: int = QUEUE_SIZE, *, base: int = 0) -> VringAddress:
        """A place for the ring in guest memory, and a driver for it that begins at ``base``."""
        kind = PackedDriver if self.packed else SplitDriver
        descriptors, available, used = kind.layout(size)
        start = 0x10000 * (index + 1)
        parts = start, start + descriptors, (start + descriptors + available + 3) & ~3
        if base == 0 or self.packed:
            self.memory.write(start, bytes(parts[2] + used - start))
        # Drivers of packed rings begin where fresh rings do.
        first = None if self.packed else base
        self.drivers[index] = kind(self.memory, size, *parts, event_idx=True, index=first)
        self.places[index] = VringAddress(
            index, 0, USER + parts[0], USER + parts[2], USER + parts[1]
        )
        return self.places[index]

    def eventfds(self, index: int) -> tuple[int, int]:
        """Kick and call."""
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self.kicks[index] = os.eventfd(0, flags)
        self.calls[index] = os.eventfd(0, flags)
        return self.kicks[index], self.calls[index]

    async def set_up(self, index: int, *, enable: bool = True, base: int = 0) -> None:
        """As QEMU does it for one queue; needs REPLY_ACK."""
        self.ring(index, base=base)
        await self.configure(index, base)
        if enable:
            await self.enable(index)

    async def resume(self, index: int, base: int) -> None:
        """As :meth:`set_up`, for a ring that there is."""
        unix_fds.close_all([fds.pop(index) for fds in (self.kicks, self.calls) if index in fds])
        await self.configure(index, base)
        await self.enable(index)

    async def configure(self, index: int, base: int) -> None:
        """All but enabling it."""
        kick, call = self.eventfds(index)
        for kind, payload, fds in (
            (Request.SET_VRING_NUM, VringState(index, QUEUE_SIZE), ()),
            (Request.SET_VRING_BASE, VringState(index, base), ()),
            (Request.SET_VRING_ADDR, self.places[index], ()),
            (Request.SET_VRING_KICK, VringDescriptor(index), (kick,)),
            (Request.SET_VRING_CALL, VringDescriptor(index), (call,)),
        ):
            assert await self.acked(kind, payload, fds) == 0

    async def enable(self, index: int, num: int = 1) -> None:
        assert await self.acked(Request.SET_VRING_ENABLE, VringState(index, num)) == 0

    # --- the driver

    def put(self, index: int, data: bytes, slot: int = 0) -> bool:
        """Make one chain available; True if the device is to be kicked."""
        at = BUFFERS + 0x1000 * slot
        self.memory.write(at, data)
        self.drivers[index].enable_notifications()
        self.drivers[index].add([(at, len(data))], [(at + 0x800, len(data))])
        return self.drivers[index].publish()

    def kick(self, index: int) -> None:
        os.eventfd_write(self.kicks[index], 1)

    async def used(self, index: int, count: int = 1) -> list[int]:
        """Wait for used chains; their written lengths."""
        lengths: list[int] = []

        def come() -> bool:
            lengths.extend(self.drivers[index].get_used()[1].tolist())
            return len(lengths) >= count

        await turns(8)  # which is enough as a rule, and quicker
        await until(come, lambda: f"{len(lengths)} of {count} chains are used")
        return lengths

    def echoed(self, data: bytes, slot: int = 0) -> bool:
        return self.memory.read(BUFFERS + 0x1000 * slot + 0x800, len(data)) == data

    async def echo(self, index: int, data: bytes, slot: int = 0) -> bool:
        """Through the ring and back, with a kick if the device wants one."""
        if self.put(index, data, slot):
            self.kick(index)
        return await self.used(index) == [len(data)] and self.echoed(data, slot)

    # --- the backend channel

    async def open_channel(self) -> None:
        self.channel, theirs = socket.socketpair()
        self.channel.setblocking(False)
        with theirs:
            assert await self.acked(Request.SET_BACKEND_REQ_FD, Empty(), (theirs.fileno(),)) == 0

    async def asked(self) -> Message:
        """The backend's next request, not acknowledged yet."""
        assert self.channel is not None
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DEADLINE):
            while (message := self.channel_parser.next_message()) is None:
                data = await loop.sock_recv(self.channel, 4096)
                assert data, "the backend closed its channel"
                self.channel_parser.receive_data(data)
        return message

    def acknowledge(self, kind: BackendRequest, status: int = 0) -> None:
        assert self.channel is not None
        self.channel.send(reply(kind, U64(status)))


def connect_to(path: Path) -> ScriptedFrontend:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))
    return ScriptedFrontend(sock)
