"""A port of which the guest has a ring and the host end is a file, for workers that die."""

from __future__ import annotations

import os
from pathlib import Path

from vring import Driver, GuestMemory, PackedDriver, Region, SplitDriver
from vring_serial.chardev.file import FileChardev, FileOptions
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.device.console.state import CONSOLE, ConsoleState
from vring_serial.keeping import Keeping
from vring_serial.proto.control import ControlPortState, PortState

#: The transmitq of port 1.
QUEUE = 5
SIZE = 16
DESC, USED, AVAIL, BUFFERS = 0x0, 0x1000, 0x2000, 0x10000
LENGTH = 100
#: Bytes of the guest's memory, which begins at address 0.
MEMORY = 1 << 20


def make_controller(path: Path, keeping: Keeping) -> Controller:
    """A device whose guest has said that it has the port open."""
    saved = keeping.read(CONSOLE.kind)
    state = ConsoleState() if saved is None else CONSOLE.unpack(saved)
    control = state.controller.control
    if saved is None:
        control.driver_ready = True
        control.ports[1] = ControlPortState(1, b"p", console=False, state=PortState.OPEN)
    controller = Controller(max_ports=1 + 1, state=state.controller, keeping=keeping)
    chardev = FileChardev("f", FileOptions(path=str(path)))
    chardev.keeping = keeping.scoped("f")
    controller.add_port(Port(1, "p", chardev, state=state.ports.get(1)))
    return controller


class SendingGuest:
    """The driver of a ring, in memory that it shares with the workers.

    Args:
        packed: it has packed rings.

    Attributes:
        memfd: the memory.
        driver: of the ring.
        sent: what it has sent so far.
    """

    def __init__(self, packed: bool) -> None:
        self.memfd = os.memfd_create("memory", os.MFD_CLOEXEC)
        os.ftruncate(self.memfd, MEMORY)
        self._memory = GuestMemory([Region.map(self.memfd, MEMORY, guest_addr=0)])
        kind: type[Driver] = PackedDriver if packed else SplitDriver
        self.driver = kind(self._memory, SIZE, DESC, AVAIL, USED)
        self.sent = b""

    def send(self, chains: int) -> None:
        """Make so many buffers available."""
        for _ in range(chains):
            number = len(self.sent) // LENGTH
            data = number.to_bytes(4, "little") * (LENGTH // 4)
            at = BUFFERS + number % SIZE * LENGTH
            self._memory.write(at, data)
            self.driver.add([(at, LENGTH)], [])
            self.sent += data
        self.driver.publish()
