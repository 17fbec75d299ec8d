"""A guest in the test's own process: a driver over real rings, beside the device that it drives."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.support.pump import pump_turn
from tests.support.waiting import turns, until
from vring import Driver, GuestMemory, PackedDriver, Region, SplitDriver, SplitQueue
from vring_serial.device.base import VirtioDevice
from vring_serial.device.console.config_space import DEFAULT_FEATURES
from vring_serial.device.console.controller import Controller
from vring_serial.device.pci import PciDevice
from vring_serial.device.registers.mmio import MmioDevice
from vring_serial.device.testing import LegacyPciDriver, MmioDriver, PciDriver, RegisterDriver
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.errors import LocalProtocolError
from vring_serial.proto.console import (
    CONTROL_RECEIVEQ,
    CONTROL_TRANSMITQ,
    ControlMessage,
    queues_of_port,
)
from vring_serial.proto.control import ControlDriver, PortAdded, PortRemoved
from vring_serial.proto.virtio import Feature, Status

NOTIFICATION_DATA = int(Feature.NOTIFICATION_DATA)
GUEST_BASE = 0x10_0000
BUFFER = 4096


@dataclass
class Ring:
    """One queue of the guest: its driver, its descriptors, and the buffers in flight."""

    driver: Driver
    parts: tuple[int, int, int]
    kick_fd: int
    call_fd: int
    base: int = 0
    buffers: dict[int, tuple[int, int]] = field(default_factory=dict)  # by head: address, length


class Guest:
    """A driver as Linux's, one step at a time, so that tests see every message."""

    def __init__(
        self,
        controller: Controller,
        *,
        features: int = DEFAULT_FEATURES,
        size: int = 64,
        index: int = 0,
        memory: int = 8 << 20,
    ) -> None:
        self.controller = controller
        self.features = features
        self.size = size
        self.ram = bytearray(memory)
        self.memory = GuestMemory([Region(GUEST_BASE, self.ram)])
        self._free = GUEST_BASE
        self._buffers: list[int] = []
        self.control = ControlDriver(controller.max_ports)
        self.messages: list[ControlMessage] = []
        self.received: dict[int, bytes] = {}
        self.rings: dict[int, Ring] = {}
        self._index = index

    # --- memory

    def allocate(self, length: int, align: int = 16) -> int:
        self._free = -(-self._free // align) * align
        address, self._free = self._free, self._free + length
        assert self._free <= GUEST_BASE + len(self.ram), "the test's guest has too little memory"
        return address

    def buffer(self) -> int:
        return self._buffers.pop() if self._buffers else self.allocate(BUFFER)

    # --- queues

    @property
    def ring_driver(self) -> type[PackedDriver] | type[SplitDriver]:
        return PackedDriver if self.features & Feature.RING_PACKED else SplitDriver

    def place_ring(self) -> list[int]:
        """Guest addresses of a new ring's three parts."""
        return [self.allocate(length) for length in self.ring_driver.layout(self.size)]

    def make_ring(self, index: int) -> Ring:
        # One that says DEVICE_READY begins with fresh control queues (decision 21).
        start = 0 if index in (CONTROL_RECEIVEQ, CONTROL_TRANSMITQ) else self._index
        parts = self.place_ring()
        if self.ring_driver is SplitDriver:
            # A device that resumes finds the used index where it left it.
            self.memory.write(parts[2] + 2, start.to_bytes(2, "little"))
        driver = self.ring_driver(
            self.memory,
            self.size,
            *parts,
            event_idx=bool(self.features & Feature.EVENT_IDX),
            indirect=bool(self.features & Feature.INDIRECT_DESC),
            index=start or (0x8000 if self.ring_driver is PackedDriver else 0),
        )
        ring = Ring(
            driver,
            (parts[0], parts[1], parts[2]),
            os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC),
            os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC),
            base=start,
        )
        self.rings[index] = ring
        return ring

    def start_queue(self, index: int) -> None:
        ring = self.rings[index] if index in self.rings else self.make_ring(index)
        queue = SplitQueue(
            self.memory,
            self.size,
            *ring.parts,
            event_idx=bool(self.features & Feature.EVENT_IDX),
            indirect=bool(self.features & Feature.INDIRECT_DESC),
            index=ring.base,
            name=f"queue {index}",
        )
        self.controller.start_queue(index, RunningQueue(queue, ring.kick_fd, ring.call_fd))

    def stop_queue(self, index: int) -> None:
        self.rings[index].base = self.controller.stop_queue(index)

    def pause(self) -> None:
        """The VM stops: as a frontend does it, in reverse order."""
        for index in sorted(self.rings, reverse=True):
            self.stop_queue(index)

    def resume(self) -> None:
        for index in sorted(self.rings):
            self.start_queue(index)

    def forget(self) -> None:
        """The driver is unbound, or the guest reboots: rings and what it knew are gone.

        The device, which has been reset, uses none of them.
        """
        for ring in self.rings.values():
            self._buffers += [at for at, length in ring.buffers.values() if length == BUFFER]
            os.close(ring.kick_fd)
            os.close(ring.call_fd)
        self.rings.clear()
        self._index = 0
        self.control = ControlDriver(self.controller.max_ports)
        self.messages.clear()
        self.received.clear()

    def close(self) -> None:
        for index, ring in self.rings.items():
            self.controller.stop_queue(index)
            os.close(ring.kick_fd)
            os.close(ring.call_fd)
        self.rings.clear()

    def publish(self, index: int) -> None:
        ring = self.rings[index]
        if ring.driver.publish():
            os.eventfd_write(ring.kick_fd, 1)

    def give_buffers(self, index: int, count: int = 16, length: int = BUFFER) -> None:
        """Fill a receiveq."""
        ring = self.rings[index]
        for _ in range(min(count, ring.driver.num_free)):
            address = self.buffer()
            ring.buffers[ring.driver.add([], [(address, length)])] = (address, length)
        self.publish(index)

    def send(self, index: int, data: bytes, *, split: int = BUFFER) -> None:
        """One chain on a transmitq; buffers of at most ``split`` bytes."""
        ring = self.rings[index]
        address = self.allocate(len(data))
        self.memory.write(address, data)
        pieces = [(address + at, min(split, len(data) - at)) for at in range(0, len(data), split)]
        ring.buffers[ring.driver.add(pieces, [])] = (address, len(data))
        self.publish(index)

    def collect(self, index: int) -> list[bytes]:
        """Take used chains back: what the device wrote into each."""
        ring = self.rings[index]
        out = []
        for head, written in zip(*(a.tolist() for a in ring.driver.get_used()), strict=True):
            address, length = ring.buffers.pop(head)
            assert written <= length
            out.append(self.memory.read(address, written))
            if length == BUFFER:
                self._buffers.append(address)
        ring.driver.enable_notifications()
        return out

    # --- the driver

    def start(self, ports: int | None = None) -> None:
        """Up to DRIVER_OK, with all queues but without a word on the control queue."""
        self.controller.set_driver_features(self.features)
        for index in range(self.controller.num_queues if ports is None else 2 * ports + 2):
            self.start_queue(index)
        self.controller.set_status(15)

    def boot(self) -> None:
        """As Linux: queues, control buffers, DEVICE_READY."""
        self.start()
        self.give_buffers(CONTROL_RECEIVEQ)
        self.control.start()
        self.flush()

    def flush(self) -> None:
        """Send what the protocol has to say."""
        self.collect(CONTROL_TRANSMITQ)
        while (message := self.control.outbox.peek()) is not None:
            self.send(CONTROL_TRANSMITQ, message)
            self.control.outbox.sent()

    def say(self, id: int, event: int, value: int = 1) -> None:
        """Send a control message past the protocol."""
        self.collect(CONTROL_TRANSMITQ)
        self.send(CONTROL_TRANSMITQ, ControlMessage(id, event, value).pack())

    def step(self) -> None:
        """Look at every queue once."""
        if CONTROL_RECEIVEQ in self.rings:
            received = self.collect(CONTROL_RECEIVEQ)
            for data in received:
                self.messages.append(ControlMessage.unpack(data))
                for event in self.control.receive_message(data):
                    if isinstance(event, PortAdded):
                        self.give_buffers(queues_of_port(event.nr)[0])
                        self.control.port_ready(event.nr)
                    elif isinstance(event, PortRemoved):
                        self.received.pop(event.nr, None)
            if received:
                self.give_buffers(CONTROL_RECEIVEQ, len(received))
            self.flush()

    def read(self, nr: int) -> bytes:
        """All that a port has received so far; the buffers go back to the device."""
        receiveq = queues_of_port(nr)[0]
        got = self.collect(receiveq)
        if got:
            self.give_buffers(receiveq, len(got))
        self.received[nr] = self.received.get(nr, b"") + b"".join(got)
        return self.received[nr]

    def write(self, nr: int, data: bytes) -> None:
        transmitq = queues_of_port(nr)[1]
        self.collect(transmitq)
        self.send(transmitq, data)

    def open(self, nr: int) -> None:
        self.control.open(nr)
        self.flush()

    def close_port(self, nr: int) -> None:
        self.control.close(nr)
        self.flush()

    def completed(self, nr: int) -> bool:
        """Whether the device has used all that was written to a port."""
        transmitq = queues_of_port(nr)[1]
        self.collect(transmitq)
        return not self.rings[transmitq].buffers

    async def until(self, condition: Callable[[], object]) -> None:
        """Go on, step by step, until ``condition`` holds."""

        def holds() -> object:
            self.step()
            return condition()

        await until(holds)

    async def settle(self, rounds: int = 3) -> None:
        """Give everybody the chance to do what they should not: in the pump and in the loop."""
        for _ in range(rounds):
            self.step()
            with contextlib.suppress(LocalProtocolError):  # it was not started, and has none
                pump_turn(self.controller.pump)
            await turns()

    async def ready(self, nr: int) -> None:
        """Until a port is usable and the device knows it."""
        await self.until(lambda: self.controller.ports[nr].guest_ready)


class Machine:
    """A machine around a register model: what its interrupts did, and a driver for it.

    Args:
        kind: "pci", "pci-legacy", "mmio" or "mmio-legacy". Guests may add "+packed" to it.
    """

    def __init__(self, device: VirtioDevice, kind: str = "pci", **options: Any) -> None:
        self.kind = kind
        self.vectors: list[int] = []
        self.levels: list[bool] = []
        self.descriptors: dict[int, int] = {}
        self.deliverable = True
        self.model: PciDevice | MmioDevice
        if kind.startswith("pci"):
            self.pci = PciDevice(device, transitional=kind == "pci-legacy", **options)
            self.pci.set_irq_sink(self)
            self.model = self.pci
        else:
            version = 1 if kind == "mmio-legacy" else 2
            self.mmio = MmioDevice(device, version=version, **options)
            self.mmio.on_interrupt = self.set_intx
            self.model = self.mmio

    # --- InterruptSink

    def raise_msix(self, vector: int) -> bool:
        if self.deliverable:
            self.vectors.append(vector)
        return self.deliverable

    def set_intx(self, level: bool) -> None:
        self.levels.append(level)

    def msix_descriptor(self, vector: int) -> int:
        return self.descriptors.get(vector, -1)

    # --- the guest's way to the device

    def bar(self, index: int) -> tuple[Callable[..., int], Callable[..., None]]:
        return partial(self.pci.bar_read, index), partial(self.pci.bar_write, index)

    def driver(
        self, pci: type[PciDriver] = PciDriver, mmio: type[MmioDriver] = MmioDriver
    ) -> RegisterDriver:
        if self.kind == "pci":
            return pci(self.pci.config_read, self.pci.config_write, self.bar)
        if self.kind == "pci-legacy":
            return LegacyPciDriver(self.pci.config_write, *self.bar(0))
        return mmio(self.mmio.read, self.mmio.write)


class RegisterGuest(Guest):
    """The same guest, with a device that it reaches through registers alone."""

    def __init__(self, controller: Controller, machine: Machine, **options: int) -> None:
        super().__init__(controller, **options)
        self.machine = machine
        self.registers = machine.driver()
        self.accept = self.registers.accept
        self.vectors: dict[int, int] = {}
        self.size = min(self.size, self.registers.queue_size(0))
        machine.model.set_memory(self.memory)

    def place_ring(self) -> list[int]:
        alignment = self.registers.alignment
        if not alignment:
            return super().place_ring()
        descriptors, available, used = SplitDriver.layout(self.size)
        gap = -(descriptors + available) % alignment
        first = self.allocate(descriptors + available + gap + used, alignment)
        return [first, first + descriptors, first + descriptors + available + gap]

    def start_queue(self, index: int) -> None:
        ring = self.rings[index] if index in self.rings else self.make_ring(index)
        vector = self.vectors.get(index, 0xFFFF)
        self.registers.start_queue(index, self.size, ring.parts, vector=vector)

    def stop_queue(self, index: int) -> None:
        self.registers.reset_queue(index)

    def publish(self, index: int) -> None:
        driver = self.rings[index].driver
        if driver.publish():
            data = driver.notification_data(index)
            self.registers.notify(index, data if self.features & NOTIFICATION_DATA else None)

    def start(self, ports: int | None = None) -> None:
        self.features = self.accept(self.features)
        for index in range(self.controller.num_queues if ports is None else 2 * ports + 2):
            self.start_queue(index)
        self.registers.status = self.registers.status | Status.DRIVER_OK

    def forget(self) -> None:
        self.registers.status = 0
        super().forget()

    def close(self) -> None:
        self.machine.model.close()
        for ring in self.rings.values():
            os.close(ring.kick_fd)
            os.close(ring.call_fd)
        self.rings.clear()
