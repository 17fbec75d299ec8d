"""A machine with a console device inside, and its guest: both can be taken apart and go on.

Run as a program, this is another process that goes on with such a machine for a while: see ``hop``.
"""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from vring import GuestMemory, PackedDriver, Region, SplitDriver
from vring_serial.chardev.base import Chardev
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.device.testing import ANY_FEATURE, LegacyPciDriver, MmioDriver, PciDriver
from vring_serial.proto.console import ControlEvent, ControlMessage
from vring_serial.proto.virtio import Feature, Status
from vring_serial.transport.inprocess.fronts import InProcessMmio, InProcessPci, PolledHost

#: Front and driver. ``transitional`` has a modern driver, ``legacy`` is the same for a legacy one.
KINDS = ("mmio", "pci", "transitional", "legacy")
NAME = "org.test.port"
NR = 1
CONTROL_IN, CONTROL_OUT, DATA_IN, DATA_OUT = 2, 3, 4, 5
SIZE = 16
RAM_AT, RAM_SIZE = 0x10_0000, 4 << 20
_RING, _BUFFER, _OUTPUT = 0x4000, 4096, 1 << 20
_ROOT = Path(__file__).parents[2]


class HostEnd:
    """The host's end of the port: takes one piece of data, and the next when it is told to.

    Attributes:
        got: bytes of the guest.
        transport: of the last connection.
    """

    def __init__(self) -> None:
        self.got = bytearray()
        self.transport: asyncio.Transport | None = None

    def connect(self) -> asyncio.Protocol:
        return _Connection(self)

    def resume(self) -> None:
        if self.transport is not None:
            self.transport.resume_reading()


class _Connection(asyncio.Protocol):
    def __init__(self, end: HostEnd) -> None:
        self._end = end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._end.transport = transport

    def data_received(self, data: bytes) -> None:
        self._end.got += data
        assert self._end.transport is not None
        self._end.transport.pause_reading()


class Machine:
    """The device in its emulator, without the guest.

    Args:
        kind: one of KINDS.
        packed: offer packed rings.
        ram: the guest's memory.
        saved: to go on from.
        chardev: the port's host end; by default ``end``.

    Attributes:
        asserted: an interrupt came that the guest has not taken.
        end: the port's host end.
    """

    def __init__(
        self,
        kind: str,
        packed: bool,
        ram: bytearray,
        saved: bytes | None = None,
        chardev: Chardev | None = None,
        **options: Any,
    ) -> None:
        self.kind = kind
        self.packed = packed
        self.asserted = False
        self._closed = False
        self.host = PolledHost(synchronous=False)
        self.end = HostEnd()
        self.device = Controller(**{"max_ports": 2, "queue_size_max": SIZE, **options})
        chardev = chardev or ProtocolChardev("end", self.end.connect)
        self.device.add_port(Port(NR, NAME, chardev))
        memory = GuestMemory([Region(RAM_AT, ram)])
        how: dict[str, Any] = {"packed": packed}
        front: Any = InProcessPci
        if kind == "mmio":
            front = InProcessMmio
            how["interrupt"] = self._interrupt
        else:
            how |= {"intx": self._interrupt, "msi": self._message}
            how["transitional"] = kind != "pci"
        try:
            if saved is None:
                self.host.complete(self.device.start())
                self.front = front(self.host, self.device, memory, **how)
            else:
                restoring = front.restore(saved, self.host, self.device, memory, **how)
                self.front = self.host.complete(restoring)
        except BaseException:
            self.host.complete(self.device.aclose())
            self.host.close()
            raise
        self.driver = self._make_driver()

    def _make_driver(self) -> Any:
        front = self.front
        if self.kind == "mmio":
            return MmioDriver(front.read, front.write)
        if self.kind == "legacy":
            return LegacyPciDriver(front.config.write, front.bars[0].read, front.bars[0].write)
        bar = front.bars[4]
        return PciDriver(front.config.read, front.config.write, lambda _: (bar.read, bar.write))

    def use_messages(self) -> None:
        """Enable MSI-X, with a message for each vector."""
        for vector in range(self.device.num_queues + 1):
            for offset, value in ((0, 0xFEE0_0000), (4, 0), (8, vector), (12, 0)):
                self.front.bars[1].write(16 * vector + offset, value, 4)
        self.front.config.write(self.driver.msix_capability + 2, 0x8000, 2)

    def _interrupt(self, level: bool) -> None:
        self.asserted |= level

    def _message(self, address: int, data: int) -> None:
        assert address == 0xFEE0_0000
        self.asserted = True

    def close(self) -> None:
        """End the device and its loop. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self.front.close()
        self.host.complete(self.device.aclose())
        self.host.close()


class Guest:
    """A driver with one port open, which sleeps until an interrupt comes.

    Attributes:
        ram, memory: its memory.
        got: bytes of the host.
        host_open: what it was told of the host end.
    """

    def __init__(self, packed: bool) -> None:
        self.packed = packed
        self.ram = bytearray(RAM_SIZE)
        self.got = bytearray()
        self.host_open = False
        self.is_open = False
        self.memory = GuestMemory([Region(RAM_AT, self.ram)])
        self._rings: dict[int, Any] = {}
        self._areas: dict[int, tuple[int, int, int]] = {}
        self._buffers: dict[int, dict[int, int]] = {}
        self._output = RAM_AT + (1 << 20)
        self._sending = 0
        kind = PackedDriver if packed else SplitDriver
        for index in range(CONTROL_OUT + 3):
            at = RAM_AT + _RING * index
            table, available, _ = kind.layout(SIZE)
            areas = (at, at + table, at + (table + available + 4095 & ~4095))
            self._areas[index] = areas
            self._rings[index] = kind(self.memory, SIZE, *areas, event_idx=True)

    def boot(self, machine: Machine) -> None:
        """Start the driver, and open the port."""
        features = ANY_FEATURE | (int(Feature.RING_PACKED) if self.packed else 0)
        machine.driver.accept(features)
        if machine.kind == "pci":
            machine.use_messages()
        for index, areas in self._areas.items():
            machine.driver.start_queue(index, SIZE, areas, vector=index)
        machine.driver.status = machine.driver.status | Status.DRIVER_OK
        for index in (CONTROL_IN, DATA_IN):
            self._buffers[index] = {}
            for number in range(SIZE):
                self._offer(index, RAM_AT + 0x4_0000 + 0x1_0000 * index + _BUFFER * number)
            self._publish(machine, index)
        self._control(machine, 0xFFFF_FFFF, ControlEvent.DEVICE_READY)
        for _ in range(1000):
            if self.is_open and machine.device.ports[NR].guest_open:
                return
            self.run(machine)
        raise AssertionError("the port does not come")

    def run(self, machine: Machine) -> None:
        """Let the device work, and take an interrupt if one came."""
        machine.host.poll()
        while machine.asserted:
            machine.asserted = False
            machine.driver.take_events()
            for index in (CONTROL_IN, DATA_IN, DATA_OUT, CONTROL_OUT):
                while True:
                    self._look(machine, index)
                    if not self._rings[index].enable_notifications():
                        break

    def used(self) -> bytes:
        """Return the part of the receiveq's ring that the device writes."""
        _, _, used = self._areas[DATA_IN]
        return bytes(self.memory.read(used, 4096))

    def can_send(self) -> bool:
        return self._sending == 0

    def send(self, machine: Machine, data: bytes, pieces: int) -> None:
        """Send one chain of so many buffers; the one before is completed."""
        assert self.can_send()
        self.memory.write(self._output, data)
        step = -(-len(data) // pieces)
        buffers = [
            (self._output + at, min(step, len(data) - at)) for at in range(0, len(data), step)
        ]
        self._rings[DATA_OUT].add(buffers, [])
        self._sending = 1
        self._publish(machine, DATA_OUT)

    def _offer(self, index: int, address: int) -> None:
        head = self._rings[index].add([], [(address, _BUFFER)])
        self._buffers[index][head] = address

    def _publish(self, machine: Machine, index: int) -> None:
        if self._rings[index].publish():
            machine.driver.notify(index)

    def _look(self, machine: Machine, index: int) -> None:
        heads, lengths = self._rings[index].get_used()
        if index == DATA_OUT:
            self._sending -= len(heads)
        if index in (CONTROL_OUT, DATA_OUT):
            return
        # All at first: a buffer that is offered again may get the head of the next.
        addresses = [self._buffers[index].pop(head) for head in heads.tolist()]
        for address, length in zip(addresses, lengths.tolist(), strict=True):
            data = bytes(self.memory.read(address, length))
            self._offer(index, address)
            if index == DATA_IN:
                self.got += data
            else:
                self._controlled(machine, ControlMessage.unpack(data))
        self._publish(machine, index)

    def _controlled(self, machine: Machine, message: ControlMessage) -> None:
        if message.event == ControlEvent.PORT_ADD:
            self._control(machine, message.id, ControlEvent.PORT_READY)
        elif message.event == ControlEvent.PORT_NAME:
            assert message.payload == NAME.encode()
            self.is_open = True
            self._control(machine, message.id, ControlEvent.PORT_OPEN)
        elif message.event == ControlEvent.PORT_OPEN:
            self.host_open = bool(message.value)

    def _control(self, machine: Machine, nr: int, event: ControlEvent) -> None:
        at = RAM_AT + 0xF_0000
        self.memory.write(at, ControlMessage(nr, event, 1).pack())
        self._rings[CONTROL_OUT].add([(at, 8)], [])
        self._publish(machine, CONTROL_OUT)
        machine.host.poll()


class Pair:
    """A machine that is exchanged now and then, and its guest.

    Attributes:
        machine: the present one.
        guest: boots at once.
        sent, written: all bytes that the guest, and its host end, have sent.
        got: bytes of the guest that host ends before the present one got.
    """

    def __init__(self, kind: str, packed: bool) -> None:
        self.guest = Guest(packed)
        self.machine = Machine(kind, packed, self.guest.ram)
        self.sent, self.written, self.got = bytearray(), bytearray(), bytearray()
        self.guest.boot(self.machine)

    def send(self, data: bytes, pieces: int) -> None:
        self.guest.send(self.machine, data, pieces)
        self.sent += data

    def write(self, data: bytes) -> None:
        assert self.machine.end.transport is not None
        self.machine.end.transport.write(data)
        self.written += data

    def hop(self, turns: int) -> None:
        """Exchange the machine for one that another process went on with for a while.

        That process gets the state and a copy of the guest's memory, lets its host end take
        ``turns`` pieces, and saves in turn; here it goes on from that.
        """
        old = self.machine
        saved = old.front.save()
        work = (old.kind, old.packed, bytes(self.guest.ram), saved, turns)
        old.close()
        self.got += old.end.got
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=pickle.dumps(work),
            stdout=subprocess.PIPE,
            timeout=120,
            check=True,
            cwd=_ROOT,
        )
        ram, saved, got, asserted = pickle.loads(done.stdout)
        self.guest.ram[:] = ram
        self.got += got
        self.machine = Machine(old.kind, old.packed, self.guest.ram, saved)
        self.machine.asserted |= old.asserted | asserted

    def finish(self) -> None:
        """Let both sides take what is on its way; it is all there is, and in order."""
        for _ in range(2000):
            at_end = self.got + self.machine.end.got
            if (len(at_end), len(self.guest.got)) == (len(self.sent), len(self.written)):
                break
            self.machine.end.resume()
            self.guest.run(self.machine)
        assert at_end == self.sent
        assert self.guest.got == self.written


def _go_on() -> None:
    kind, packed, memory, saved, turns = pickle.loads(sys.stdin.buffer.read())
    ram = bytearray(memory)
    machine = Machine(kind, packed, ram, saved)
    for _ in range(turns):
        machine.end.resume()
        machine.host.poll()
    saved = machine.front.save()
    result = (bytes(ram), saved, bytes(machine.end.got), machine.asserted)
    machine.close()
    sys.stdout.buffer.write(pickle.dumps(result))


if __name__ == "__main__":
    _go_on()
