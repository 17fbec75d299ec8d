"""A backend that follows a script, for what a well-behaved one never does."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.support.waiting import until
from vring import Chain, GuestMemory, Region, SplitQueue
from vring_serial.guest.channel import Channel
from vring_serial.proto import vhost_user as vu
from vring_serial.proto.console import (
    CONTROL_RECEIVEQ,
    CONTROL_TRANSMITQ,
    ControlEvent,
    ControlMessage,
)
from vring_serial.proto.virtio import Feature

DEFAULT_FEATURES = 1 << 32 | 1 << 30 | 1 << 29 | 0b11
DEFAULT_PROTOCOL = (
    vu.ProtocolFeature.MQ
    | vu.ProtocolFeature.REPLY_ACK
    | vu.ProtocolFeature.CONFIG
    | vu.ProtocolFeature.BACKEND_REQ
)


class ScriptedBackend:
    """Answers one frontend as told, and keeps what it was asked.

    Attributes:
        requests: names of the requests, in order.
        payloads: their decoded payloads, in the same order.
        fds: descriptors received, per request name; closed at the end.
        script: raw bytes to send instead of the usual answer, or None for silence.
        refuse: requests to acknowledge with an error.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.features = DEFAULT_FEATURES
        self.protocol_features = DEFAULT_PROTOCOL
        self.config = bytes(4) + (4).to_bytes(4, "little") + bytes(4)
        self.queues = 64
        self.slots = 8
        self.status = 0
        self.requests: list[str] = []
        self.payloads: list[vu.Payload] = []
        self.fds: dict[str, list[int]] = {}
        self.script: dict[vu.Request, bytes | None] = {}
        self.refuse: set[vu.Request] = set()
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.channel = Channel(sock, vu.VhostUserParser(vu.Request), self._message, self._lose)

    def _lose(self, error: Exception | None) -> None:
        self.lost.set_result(error)

    def _message(self, message: vu.Message) -> None:
        assert isinstance(message.kind, vu.Request)
        payload = message.decode()
        self.requests.append(message.name)
        self.payloads.append(payload)
        self.fds.setdefault(message.name, []).extend(message.fds)
        if message.kind in self.script:
            raw = self.script[message.kind]
            if raw is not None:
                self.channel.send_now(raw)
            return
        answer = self._answer(message.kind, payload)
        if answer is None and message.need_reply:
            answer = vu.U64(int(message.kind in self.refuse))
        if answer is not None:
            self.channel.send_now(vu.reply(message.kind, answer))

    def _answer(self, kind: vu.Request, payload: vu.Payload) -> vu.Payload | None:
        match kind:
            case vu.Request.GET_FEATURES:
                return vu.U64(self.features)
            case vu.Request.GET_PROTOCOL_FEATURES:
                return vu.U64(self.protocol_features)
            case vu.Request.GET_QUEUE_NUM:
                return vu.U64(self.queues)
            case vu.Request.GET_MAX_MEM_SLOTS:
                return vu.U64(self.slots)
            case vu.Request.GET_CONFIG:
                assert isinstance(payload, vu.ConfigAccess)
                data = self.config[payload.offset : payload.offset + len(payload.data)]
                return vu.ConfigAccess(payload.offset, data)
            case vu.Request.GET_VRING_BASE:
                assert isinstance(payload, vu.VringState)
                return vu.VringState(payload.index, 0)
            case vu.Request.SET_STATUS:
                assert isinstance(payload, vu.U64)
                self.status = payload.value
            case vu.Request.GET_STATUS:
                return vu.U64(self.status)
        return None

    def close(self) -> None:
        self.channel.close()
        for fd in (fd for fds in self.fds.values() for fd in fds):
            os.close(fd)
        self.fds.clear()


class RingAddress(NamedTuple):
    """Guest addresses of a ring's parts."""

    desc: int
    avail: int
    used: int


class ScriptedDevice:
    """The device's side of the rings that a guest has set up with a :class:`ScriptedBackend`."""

    def __init__(self, backend: ScriptedBackend) -> None:
        self._said = dict[str, list[vu.Payload]]()
        for name, payload in zip(backend.requests, backend.payloads, strict=True):
            self._said.setdefault(name, []).append(payload)
        (table,) = self._said["SET_MEM_TABLE"]
        assert isinstance(table, vu.MemoryTable)
        (region,) = table.regions
        self.memory = GuestMemory(
            [
                Region.map(
                    backend.fds["SET_MEM_TABLE"][0],
                    region.size,
                    offset=region.mmap_offset,
                    guest_addr=region.guest_address,
                    user_addr=region.user_address,
                )
            ]
        )
        (features,) = self._said["SET_FEATURES"]
        assert isinstance(features, vu.U64)
        event_idx = bool(features.value & Feature.EVENT_IDX)
        self.addresses: dict[int, RingAddress] = {}
        self.queues: dict[int, SplitQueue] = {}
        for number, address in enumerate(self._said["SET_VRING_ADDR"]):
            assert isinstance(address, vu.VringAddress)
            size = self._said["SET_VRING_NUM"][number]
            assert isinstance(size, vu.VringState)
            ring = RingAddress(
                self.memory.user_to_guest(address.descriptor),
                self.memory.user_to_guest(address.available),
                self.memory.user_to_guest(address.used),
            )
            self.addresses[address.index] = ring
            self.queues[address.index] = SplitQueue(
                self.memory, size.num, ring.desc, ring.avail, ring.used, event_idx=event_idx
            )
        self.kick_fds = self._descriptors("SET_VRING_KICK", backend)
        self.call_fds = self._descriptors("SET_VRING_CALL", backend)

    def _descriptors(self, name: str, backend: ScriptedBackend) -> dict[int, int]:
        said = [p.index for p in self._said[name] if isinstance(p, vu.VringDescriptor)]
        return dict(zip(said, backend.fds[name], strict=True))

    def call(self, index: int) -> None:
        os.eventfd_write(self.call_fds[index], 1)

    def send(self, index: int, data: bytes) -> None:
        """Fill the next receive buffer of a queue."""
        chain = self.queues[index].pop()
        assert chain is not None, f"queue {index} has no buffer"
        self.queues[index].push(chain, chain.write(data))
        self.call(index)

    async def receive(self, index: int) -> bytes:
        """The next chain of a queue of the driver's, used at once."""
        chain: Chain | None = None

        def popped() -> bool:
            nonlocal chain
            chain = self.queues[index].pop()
            return chain is not None

        await until(popped, f"a chain of queue {index}")
        assert chain is not None
        data = chain.read()
        self.queues[index].push(chain)
        self.call(index)
        return data

    def control(self, nr: int, event: ControlEvent, value: int = 1, payload: bytes = b"") -> None:
        self.send(CONTROL_RECEIVEQ, ControlMessage(nr, event, value, payload).pack())

    async def next_control(self) -> tuple[int, int, int]:
        """(id, event, value) of the driver's next control message."""
        message = ControlMessage.unpack(await self.receive(CONTROL_TRANSMITQ))
        assert message.payload == b""
        return message.id, message.event, message.value


class ScriptedServer:
    """Listens where a guest connects; ``backend`` is the connection, set up by ``prepare``."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.accepted: ScriptedBackend | None = None
        self.prepare: Callable[[ScriptedBackend], None] = lambda backend: None
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._sock.bind(self.path)
        self._sock.listen()
        asyncio.get_running_loop().add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        sock, _ = self._sock.accept()
        sock.setblocking(False)
        self.accepted = ScriptedBackend(sock)
        self.prepare(self.accepted)

    @property
    def backend(self) -> ScriptedBackend:
        assert self.accepted is not None, "nobody connected"
        return self.accepted

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()
        if self.accepted is not None:
            self.accepted.close()
