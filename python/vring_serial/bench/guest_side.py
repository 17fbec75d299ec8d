"""The guest's process: the embedded guest's driver, which works on the rings in batches.

Messages are prepared in guest RAM and received bytes are counted but not read, so the guest adds
little to the measured time. The plain socket used for comparison sends from the same memory.
"""

from __future__ import annotations

import array
import asyncio
import os
import select
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vring_serial.bench.plain import PlainEnd
from vring_serial.guest.guest import EmbeddedGuest
from vring_serial.guest.port import GuestPort
from vring_serial.guest.queue import Buffers
from vring_serial.proto.virtio import Feature

#: Alignment of messages in guest RAM: a cache line.
ALIGNMENT = 64


class Ring:
    """One ring of a port. The device, ours, uses buffers in the order of their arrival.

    Args:
        buffers: the guest's buffers of this ring; none of a transmit queue's is in flight.
        lengths: lengths of the chains in bytes, repeated; 0 for a whole buffer.
    """

    def __init__(self, buffers: Buffers, lengths: Sequence[int] = (0,)) -> None:
        self.driver = buffers.queue.ring
        self.kick_fd = buffers.queue.kick_fd
        self.call_fd = buffers.queue.call_fd
        self.size = self.driver.size
        self._writable = lengths == (0,)
        longest = max(lengths) or buffers.size
        stride = buffers.size if self._writable else -(-longest // ALIGNMENT) * ALIGNMENT
        self._slots = min(buffers.count * buffers.size // stride, 4 * self.size)
        if self._writable:
            lengths = (buffers.size,)
        self._pieces = len(lengths)
        slots = np.arange(self._slots + self.size, dtype=np.uint64) % np.uint64(self._slots)
        self._addresses = np.uint64(buffers.address) + slots * np.uint64(stride)
        self._lengths: npt.NDArray[np.uint32] = np.resize(
            np.array(lengths, np.uint32), self._pieces + self.size
        )
        self._slot = self._piece = 0

    def add(self, most: int) -> int:
        """Make up to ``most`` chains available; return the number for which there was room."""
        n = min(self.driver.num_free, most)
        if n:
            slot, piece = self._slot, self._piece
            self.driver.add_many(
                self._addresses[slot : slot + n], self._lengths[piece : piece + n], self._writable
            )
            self._slot = (slot + n) % self._slots
            self._piece = (piece + n) % self._pieces
            if self.driver.publish():
                os.eventfd_write(self.kick_fd, 1)
        return n


def wait_any(rings: Sequence[Ring]) -> None:
    """Sleep until the device notifies the driver of one of the rings."""
    if len(rings) == 1:
        os.eventfd_read(rings[0].call_fd)
        return
    poll = select.poll()
    for ring in rings:
        poll.register(ring.call_fd, select.POLLIN)
    for fd, _ in poll.poll():
        os.eventfd_read(fd)


class Flow:
    """The transfer of a number of chains through one ring."""

    def __init__(self, ring: Ring, count: int) -> None:
        self.ring = ring
        self.to_add = self.to_use = count

    def advance(self) -> bool:
        """Do what can be done now; return whether anything was done."""
        used = len(self.ring.driver.get_used()[0])
        self.to_use -= used
        added = self.ring.add(self.to_add) if self.to_add else 0
        self.to_add -= added
        return bool(used or added)

    def want_call(self) -> bool:
        """Ask for a call when half of the chains in flight are used; True: they are already."""
        return self.ring.driver.enable_notifications(max(1, self.ring.driver.in_flight // 2))


class GuestSide:
    """The guest's process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._guest: EmbeddedGuest | None = None
        self._ports: dict[int, GuestPort] = {}
        self._rings: dict[int, tuple[Buffers, Buffers]] = {}
        self._receiving: dict[int, Ring] = {}
        self.plain = PlainEnd()

    def boot(
        self, path: str, ports: Sequence[int], queue_size: int, receive_size: int, packed: bool
    ) -> None:
        """Start the guest and open these ports, whose host ends are connected."""
        guest = EmbeddedGuest(
            path,
            queue_size=queue_size,
            receive_size=receive_size,
            packed=packed,
            max_ports=max(ports) + 1,
            memory=(32 << 20) + len(ports) * (queue_size * receive_size + (4 << 20)),
        )
        self._guest = guest

        async def start() -> None:
            await guest.start()
            assert packed == (Feature.RING_PACKED in guest.features)
            for nr in ports:
                port = await guest.wait_port(nr=nr)
                await port.wait_host()
                self._rings[nr] = await port.take_rings()

        self._loop.run_until_complete(start())
        for nr, (receive, transmit) in self._rings.items():
            # The device writes to the same open files, but never so much that it could block.
            os.set_blocking(receive.queue.call_fd, True)
            os.set_blocking(transmit.queue.call_fd, True)
            self._receiving[nr] = Ring(receive)

    def connect_plain(self, path: str) -> None:
        """Connect the yardstick, a socket to the peer's process."""
        self.plain.connect(path)

    # --- transfer

    def send(self, ports: Sequence[int], length: int, count: int) -> None:
        """Send messages, ``count`` on each port, and wait until the device has used them all.

        A message longer than a buffer takes several chains, as in Linux.
        """
        flows = []
        for nr in ports:
            transmit = self._rings[nr][1]
            pieces = [transmit.size] * (length // transmit.size)
            if length % transmit.size:
                pieces.append(length % transmit.size)
            flows.append(Flow(Ring(transmit, tuple(pieces)), count * len(pieces)))
        while flows:
            # A sum, not any(): every flow must be asked.
            if not sum(flow.advance() for flow in flows) and not sum(
                flow.want_call() for flow in flows
            ):
                wait_any([flow.ring for flow in flows])
            flows = [flow for flow in flows if flow.to_use]

    def receive(self, ports: Sequence[int], total: int) -> None:
        """Receive ``total`` bytes on these ports together, and offer the buffers again at once.

        The driver asks for a call when half of a ring is used, or as many buffers as the remaining
        bytes need at least.
        """
        rings = [self._receiving[nr] for nr in ports]
        buffer = self._rings[ports[0]][0].size * len(rings)
        while total > 0:
            for ring in rings:
                _, lengths = ring.driver.get_used()
                if len(lengths):
                    total -= int(lengths.sum())
                    ring.add(len(lengths))
            after = max(1, min(rings[0].size // 2, total // buffer))
            # A sum, not any(): every ring must be asked.
            if total > 0 and not sum(ring.driver.enable_notifications(after) for ring in rings):
                wait_any(rings)

    # --- latency

    def ping(self, nr: int, size: int, count: int, busy: bool) -> array.array[float]:
        """Send messages that are sent back; return the seconds of each round trip."""
        receive, transmit = self._rings[nr]
        out, into, back = transmit.queue.ring, receive.queue.ring, self._receiving[nr]
        kick_fd, call_fd = transmit.queue.kick_fd, receive.queue.call_fd
        message = ((transmit.address, size),)
        clock = time.perf_counter
        times = array.array("d")
        out.disable_notifications()
        into.disable_notifications()
        for _ in range(count):
            start = clock()
            out.add(message, ())
            if out.publish():
                os.eventfd_write(kick_fd, 1)
            missing = size
            used = 0
            while missing > 0:
                if not busy and not into.enable_notifications():
                    os.eventfd_read(call_fd)
                for length in into.get_used()[1]:
                    missing -= int(length)
                    used += 1
            times.append(clock() - start)
            back.add(used)
            out.get_used()
        return times

    def ping_eventfd(self, count: int) -> array.array[float]:
        """Measure round trips of the yardstick: an eventfd to the peer's process and one back."""
        there, back = os.eventfd(0), os.eventfd(0)
        self.plain.send_fds([there, back])
        times = array.array("d")
        clock = time.perf_counter
        for _ in range(count):
            start = clock()
            os.eventfd_write(there, 1)
            os.eventfd_read(back)
            times.append(clock() - start)
        os.close(there)
        os.close(back)
        return times

    def plain_send(self, length: int, count: int) -> None:
        """Send ``count`` messages of ``length`` bytes on the yardstick."""
        self.plain.send(length, count)

    def plain_receive(self, total: int) -> None:
        """Receive ``total`` bytes on the yardstick."""
        self.plain.receive(total)

    def close(self) -> None:
        """Stop the guest."""
        self.plain.close()
        if self._guest is not None:
            self._loop.run_until_complete(self._guest.aclose())
        self._loop.close()
