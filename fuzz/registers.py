"""Registers under a driver that does anything, in any order, with any memory behind them.

Invariant: every access has an answer that fits its size, nothing raises, no call takes unbounded
work, and after a reset the device is as new.

    python fuzz/registers.py --seconds 60

tests/device/registers/test_fuzz_registers.py plays the same with Hypothesis.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import sys
from contextlib import suppress

from vring import GuestMemory, Region, layout
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.device.console.config_space import DEFAULT_FEATURES
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.device.testing import LegacyPciDriver, MmioDriver, PciDriver, RegisterDriver
from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.virtio import Feature, Status
from vring_serial.transport.inprocess.fronts import InProcessMmio, InProcessPci, PolledHost, Window

RAM_SIZE = 64 << 10
STEPS_MAX = 400
#: Bytes from one part of a ring to the next; those of a legacy one follow each other.
AREA = 0x400
_STEP = struct.Struct("<BBHI")
#: Registers whose writes lead somewhere, by kind of window.
_ENABLE = {"pci": (28, 1, 2), "legacy": (8, 1, 4), "mmio": (0x44, 1, 4)}
_SELECT = {"pci": (22, 2), "legacy": (14, 2), "mmio": (0x30, 4)}


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


class Rig:
    """A device behind one kind of registers, and all that a guest can reach of it."""

    def __init__(self, kind: str, *, packed: bool) -> None:
        self.kind = kind
        self.host = PolledHost()
        self.ram = bytearray(RAM_SIZE)
        self.ring = 0  # where the queue that was placed last is
        features = DEFAULT_FEATURES | Feature.IN_ORDER
        self.device = Controller(max_ports=1, features=features)
        self.device.add_port(Port(0, "echo", ProtocolChardev("echo", Echo), console=True))
        self.host.complete(self.device.start())
        memory = GuestMemory([Region(0, self.ram)])
        self.windows: list[Window]
        if kind == "mmio":
            self.front: InProcessPci | InProcessMmio = InProcessMmio(
                self.host, self.device, memory, interrupt=self._interrupt, packed=packed
            )
            self.windows = [self.front]
            self.driver: RegisterDriver = MmioDriver(self.front.read, self.front.write)
        else:
            self.front = InProcessPci(
                self.host,
                self.device,
                memory,
                msi=self._message,
                intx=self._interrupt,
                transitional=kind == "legacy",
                packed=packed,
            )
            main = self.front.bars[0 if kind == "legacy" else 4]
            self.windows = [main, self.front.config, *self.front.bars.values()]
            bars = {index: (bar.read, bar.write) for index, bar in self.front.bars.items()}
            config = self.front.config
            if kind == "legacy":
                self.driver = LegacyPciDriver(config.write, main.read, main.write)
            else:
                self.driver = PciDriver(config.read, config.write, bars.__getitem__)

    def close(self) -> None:
        self.front.close()
        self.host.complete(self.device.aclose())
        self.host.close()

    def _interrupt(self, level: bool) -> None:
        assert level is True or level is False

    def _message(self, address: int, data: int) -> None:
        assert 0 <= address < 1 << 64
        assert 0 <= data < 1 << 32

    def step(self, what: int, where: int, offset: int, value: int) -> None:
        """One thing that a guest can do."""
        window = self.windows[where % len(self.windows)]
        size = (1, 2, 4, 8, 3, 16)[what >> 3 & 7 if what >> 3 & 7 < 6 else 2]
        offset %= window.size + 8
        match what & 7:
            case 0 | 1:
                answer = window.read(offset, size)
                assert 0 <= answer < 1 << 8 * size
            case 2:
                window.write(offset, value * 0x1_0000_0001, size)
            case 3 if where & 1:  # negotiated as it should be, but for what is accepted
                with suppress(RemoteProtocolError):
                    self.driver.accept(value << 32 * (where >> 1 & 1) | Feature.VERSION_1)
                self.driver.status |= Status.DRIVER_OK
            case 3:
                self.driver.status = (0, 1, 3, 11, 15, 7)[value % 6]
            case 4:
                self._place_queue(where % 5, value)
            case 5 if where & 1:  # rings and buffers, of the last queue or wherever
                at = (self.ring + value) % (RAM_SIZE - 8)
                self.ram[at : at + 8] = struct.pack("<IHH", offset, where, what)
            case 5:  # few chains become available, in a ring of small descriptors
                at = self.ring + layout.DESC_SIZE * (value & 15)
                self.ram[at : at + layout.DESC_SIZE] = struct.pack(
                    "<QIHH", offset, where, what >> 3, value & 15
                )
                avail = self.ring + (AREA if self.kind != "legacy" else layout.DESC_SIZE * 256)
                self.ram[avail : avail + layout.AVAIL_RING] = struct.pack("<HH", 0, value >> 4 & 7)
            case 6:
                self._notify(where % 5)
            case 7:
                self.host.poll()

    def _place_queue(self, index: int, value: int) -> None:
        main = self.windows[0]
        at, size = _SELECT[self.kind]
        main.write(at, index, size)
        address = value % (RAM_SIZE - 0x1000) & ~15
        if self.kind == "legacy":
            self.ring = value % 20 * 4096 % (RAM_SIZE - 0x2000)
            main.write(8, self.ring // 4096, 4)
            return
        self.ring = address
        areas = (32, 40, 48) if self.kind == "pci" else (0x80, 0x90, 0xA0)
        for area in areas:
            main.write(area, address, 4)
            main.write(area + 4, 0, 4)
            address = address + AREA & RAM_SIZE - 1
        main.write(*_ENABLE[self.kind])

    def _notify(self, index: int) -> None:
        if self.kind == "pci":
            self.windows[0].write(0x3000 + 4 * index, index, 2)
        else:
            self.windows[0].write(*((16, index, 2) if self.kind == "legacy" else (0x50, index, 4)))


def one_input(data: bytes) -> None:
    """Play one guest. The first byte says which registers it has."""
    if not data:
        return
    rig = Rig(("pci", "legacy", "mmio")[data[0] % 3], packed=bool(data[0] & 4))
    try:
        steps = data[1 : 1 + STEPS_MAX * _STEP.size]
        for what in _STEP.iter_unpack(steps[: len(steps) // _STEP.size * _STEP.size]):
            rig.step(*what)
        rig.driver.status = 0
        assert rig.driver.status == rig.device.status == 0
    finally:
        rig.close()


if __name__ == "__main__":
    from runner import run

    logging.disable(logging.WARNING)
    sys.exit(run(one_input, "registers"))
