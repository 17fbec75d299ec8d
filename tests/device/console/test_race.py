"""The control plane against the data plane: a thousand changes of each kind under full traffic.

The pump's thread moves bytes both ways all the time. Every byte is checked where it arrives: each
block of either stream says which one it is. tests/vring/test_pump_race.py does the same to the pump
alone, from several threads.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from tests.support.waiting import turns, until
from vring import GuestMemory, Region
from vring_serial.chardev.base import Chardev, DescriptorEnd
from vring_serial.device.console.port import Port

CHANGES = 1000
BLOCK, SLOTS = 2048, 24
NR, RECEIVEQ, TRANSMITQ = 1, 4, 5


def stream(start: int, length: int) -> bytes:
    """Bytes of the endless stream in which each 8 bytes are their own position."""
    first = start // 8
    words = np.arange(first, (start + length) // 8 + 1, dtype="<u8").tobytes()
    return words[start - 8 * first :][:length]


class PairChardev(Chardev):
    """A socket pair as the host end, whose other end the test has."""

    def __init__(self) -> None:
        super().__init__("pair")
        self.ours: socket.socket | None = None
        self.peer: socket.socket | None = None

    async def start(self) -> None:
        self.connect()

    def connect(self) -> None:
        self.ours, self.peer = socket.socketpair()
        for end in (self.ours, self.peer):
            end.setblocking(False)
            # Small, so that both directions are full most of the time.
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
        self._open_end(DescriptorEnd(self.ours.fileno(), self.ours.fileno()))

    def disconnect(self) -> None:
        self._close_end()
        assert self.ours is not None
        self.ours.close()
        self.ours = None

    async def aclose(self) -> None:
        if self.ours is not None:
            self.disconnect()


class Traffic:
    """Both streams of a port, and how far they are."""

    def __init__(self, controller, guest, chardev: PairChardev) -> None:
        self.controller, self.guest, self.chardev = controller, guest, chardev
        self.slots = [guest.allocate(BLOCK) for _ in range(SLOTS)]
        self.free = list(self.slots)
        self.busy: list[int] = []
        self.sent = 0  # by the guest, into the ring
        self.completed = 0
        self.arrived = 0  # at the peer
        self.given = 0  # by the peer, into the socket
        self.received = 0  # by the guest

    def move(self) -> None:
        """Whatever guest and peer can do now."""
        self.guest.step()
        self.guest_sends()
        self.guest_receives()
        self.peer_receives()
        self.peer_sends()

    def reclaim(self) -> None:
        ring = self.guest.rings[TRANSMITQ]
        for _ in ring.driver.get_used()[0]:
            self.free.append(self.busy.pop(0))
            self.completed += BLOCK

    def guest_sends(self) -> None:
        self.reclaim()
        ring = self.guest.rings[TRANSMITQ]
        while self.free:
            address = self.free.pop()
            self.busy.append(address)
            self.guest.memory.write(address, stream(self.sent, BLOCK))
            ring.driver.add([(address, BLOCK)], [])
            self.sent += BLOCK
        self.guest.publish(TRANSMITQ)

    def guest_receives(self) -> None:
        pieces = self.guest.collect(RECEIVEQ)
        data = b"".join(pieces)
        assert data == stream(self.received, len(data)), f"guest, at {self.received}"
        self.received += len(data)
        if pieces:
            self.guest.give_buffers(RECEIVEQ, len(pieces))

    def peer_receives(self) -> None:
        try:
            while data := self.chardev.peer.recv(1 << 16):
                assert data == stream(self.arrived, len(data)), f"peer, at {self.arrived}"
                self.arrived += len(data)
        except (BlockingIOError, ConnectionResetError):
            pass  # nothing more, or nothing more ever: the device had not read everything

    def peer_sends(self) -> None:
        try:
            while True:
                self.given += self.chardev.peer.send(stream(self.given, 8192))
        except (BlockingIOError, BrokenPipeError):
            pass

    # --- changes

    async def rings_stop(self) -> None:
        self.guest.pause()
        if self.given % 3 == 0:
            await turns(1)
        self.guest.resume()

    async def device_is_reset(self) -> None:
        self.controller.reset()
        # What the device used before is the guest's; all else it takes back and sends anew.
        data = b"".join(self.guest.collect(RECEIVEQ))
        assert data == stream(self.received, len(data)), f"guest, at {self.received}"
        self.received += len(data)
        self.reclaim()
        self.sent, self.free = self.completed, list(self.slots)
        self.busy.clear()
        self.guest.forget()
        self.guest.boot()
        await self.guest.ready(NR)
        self.guest.open(NR)
        await self.guest.until(lambda: self.controller.ports[NR].guest_open)

    async def memory_map_changes(self) -> None:
        self.guest.pause()
        region = self.guest.memory.regions[0]
        self.guest.memory = GuestMemory([Region(region.guest_addr, self.guest.ram)])
        self.guest.resume()

    async def guest_closes(self) -> None:
        self.guest.close_port(NR)
        await turns(1)
        self.guest.open(NR)

    async def peer_leaves(self) -> None:
        self.chardev.disconnect()
        self.peer_receives()
        self.guest_receives()
        self.chardev.peer.close()
        # What the device did not read is lost with the socket: the next peer begins there.
        self.given = self.received
        self.chardev.connect()

    async def port_is_removed(self) -> None:
        await self.controller.remove_port(NR)
        self.peer_receives()
        self.guest_receives()
        self.reclaim()
        # A block is used when the peer's socket has all of it; of one more it may have a part,
        # which is used then, too.
        assert self.completed - BLOCK < self.arrived <= self.completed
        self.chardev.peer.close()
        self.chardev = PairChardev()
        await self.controller.plug_port(Port(NR, "org.test", self.chardev))
        await self.guest.ready(NR)
        # What is left in the ring was for the port that is gone: it is discarded.
        await self.guest.until(self.is_drained)
        self.sent = self.completed = self.arrived = 0
        self.given = self.received
        self.guest.open(NR)
        await self.guest.until(lambda: self.controller.ports[NR].guest_open)

    def is_drained(self) -> bool:
        self.reclaim()
        return not self.busy


CHANGE_NAMES = [
    "rings_stop",
    "device_is_reset",
    "memory_map_changes",
    "guest_closes",
    "peer_leaves",
    "port_is_removed",
]


@pytest.mark.parametrize("name", CHANGE_NAMES)
async def test_a_thousand_changes_lose_and_double_no_byte(
    make_controller, make_guest, name
) -> None:
    controller = make_controller(max_ports=2)
    chardev = PairChardev()
    controller.add_port(Port(NR, "org.test", chardev))
    await controller.start()
    guest = make_guest(controller, index=65_000, memory=32 << 20)
    guest.boot()
    await guest.ready(NR)
    guest.open(NR)
    await guest.until(lambda: controller.ports[NR].guest_open)
    traffic = Traffic(controller, guest, chardev)
    change: Callable[[], Awaitable[None]] = getattr(traffic, name)
    moved = 0
    for n in range(CHANGES):
        for _ in range(n % 3):
            traffic.move()
        before = traffic.arrived + traffic.received
        await change()
        traffic.move()
        await turns(1)
        moved += max(0, traffic.arrived + traffic.received - before)
    # All that was written arrives, and both directions still work.
    sent, given = traffic.sent, traffic.given
    await until(lambda: (traffic.move(), traffic.arrived >= sent and traffic.received >= given)[1])
    traffic.chardev.peer.close()
    assert moved > CHANGES * 100, "there was no traffic to speak of"
