"""Workers that die at every step of a vfio-user client's messages: a process of its own for a test.

See tests/support/dying. A client lives from VERSION to its guest's reset: rings, interrupts, maps,
logging, both ends of a migration. In one life the worker dies at the first step of each message
that changes something, in the next at the second, and so on. The queue is a port's transmitq, and
the host end a file; bytes are in the ring before, while and after such messages, and before it dies
a worker has time to move what it may. After each message the same is written down as in a life
without a death; the file gets every byte once, and the driver, which looks only when it is
interrupted, every buffer. Prints at how many steps a worker died.

Usage: dying_client.py split|packed [FIRST [OF]]: only each OF-th life, from that one on
"""

from __future__ import annotations

import asyncio
import difflib
import os
import pprint
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.support.dying import DyingWorld
from tests.support.dying_guest import (
    AVAIL,
    DESC,
    LENGTH,
    MEMORY,
    QUEUE,
    SIZE,
    USED,
    SendingGuest,
    make_controller,
)
from vring import LOG_PAGE
from vring_serial.device.pci.modern import CommonRegister
from vring_serial.device.testing import PciDriver
from vring_serial.proto.console import ConsoleFeature
from vring_serial.proto.framing import Payload
from vring_serial.proto.vfio_user import request
from vring_serial.proto.vfio_user_dma import DmaFlag, DmaMap, DmaUnmap
from vring_serial.proto.vfio_user_features import (
    DeviceFeature,
    FeatureIndex,
    FeatureMethod,
    LoggingControl,
    LoggingReport,
    MigrationData,
    MigrationPhase,
    MigrationState,
)
from vring_serial.proto.vfio_user_regions import (
    RegionAccess,
    RegionIndex,
    RegionIoFds,
    RegionRead,
)
from vring_serial.proto.vfio_user_version import Capabilities, Version
from vring_serial.proto.vfio_user_wire import Command, Header, IrqIndex, IrqSet, IrqSetFlag
from vring_serial.proto.virtio import Feature, Status
from vring_serial.service.descriptor_store import Notifier
from vring_serial.service.shelf import Shelf
from vring_serial.transport.repeatable import LOOKED_AT
from vring_serial.transport.vfio_user.server import VfioUserServer
from vring_serial.transport.vfio_user.written import read_left

#: A message: its command, payload, and descriptors beside it, which stay the caller's.
Said = tuple[Command, Payload | None, tuple[int, ...]]

QUEUES, VECTORS = 6, 4
#: That of the queue.
VECTOR = 1
FEATURES = Feature.VERSION_1 | ConsoleFeature.MULTIPORT
STATUS = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
BOTH = DmaFlag.READ | DmaFlag.WRITE
TELL = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER
READS = {Command.REGION_READ, Command.MIG_DATA_READ}
#: Seconds for what moves without being asked: enough on a busy machine to find the fault mostly.
MOVES_SECONDS = 0.01
#: No client's socket need hold it, and no worker looks at it.
LONG = 5 * LOOKED_AT


class World(DyingWorld[Said]):
    """A client, and what it talks to.

    Args:
        directory: for the socket.
        output: the port's host end.
    """

    def __init__(self, directory: Path, output: Path) -> None:
        self._output = output
        self._number = 0
        super().__init__(directory, header=Header.SIZE, pause=MOVES_SECONDS)
        self.wait_kept("peer")

    async def serve(self, shelf: Shelf) -> None:
        controller = make_controller(self._output, shelf)
        server = VfioUserServer(controller, self._path, packed=True, vectors=VECTORS, keeping=shelf)
        async with controller, server:
            await asyncio.get_running_loop().create_future()

    def pack(self, said: Said) -> tuple[bytes, list[int]]:
        command, payload, fds = said
        self._number += 1
        return request(command, self._number, payload), [os.dup(fd) for fd in fds]

    def answer_size(self, header: bytes) -> int:
        return Header.unpack(header).message_size

    def written(self) -> object:
        """What is written down, but for numbers that a death may change, and where the ring is."""
        with self.journal() as journal:
            left = read_left(Shelf(journal, Notifier(self._worker), {}), QUEUES, VECTORS)
        if left is None:
            return None
        client, registers = left.client, left.function.registers
        client.life = client.next_serial = 0
        client.memory = None if client.memory is None else 0
        client.regions = {at: replace(each, serial=0) for at, each in client.regions.items()}
        if client.phase is MigrationState.STOP_COPY:  # the state has more or fewer digits
            client.length = client.moved = 0
        registers.driver.events = 0
        for queue in registers.queues:
            queue.position = queue.notified = None
        return client, left.function, left.running


class Life:
    """One client with its guest.

    Args:
        directory: for the socket and the file.
        packed: the guest has packed rings.
        die: the step of each message that changes something, at which the worker dies; 0: never.

    Attributes:
        written: what was written down after each message.
    """

    def __init__(self, directory: Path, packed: bool, die: int) -> None:
        self._packed = packed
        self._die = die
        self._guest = SendingGuest(packed)
        self._output = directory / "output"
        self._output.write_bytes(b"")
        self.world = World(directory, self._output)
        self._calls = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(VECTORS)]
        self._other = os.memfd_create("other", os.MFD_CLOEXEC)
        os.ftruncate(self._other, MEMORY)
        self._kick = -1
        self.written: list[object] = []

    def close(self) -> None:
        self.world.close()
        for fd in (*self._calls, self._other, self._guest.memfd):
            os.close(fd)

    def ask(self, command: Command, payload: Payload | None, *fds: int) -> bytes:
        """Send a message, and return the payload of the answer, which must be no error."""
        die = 0 if command in READS else self._die
        answer = self.world.say([(command, payload, fds)], die)
        assert not Header.unpack(answer[: Header.SIZE]).error, command.name
        if command not in READS:
            self.written.append((command.name, self.world.written()))
        return answer[Header.SIZE :]

    def ask_at_once(self, *messages: Said) -> None:
        """Send messages before any is answered, none of which is refused."""
        answers = self.world.say(messages, self._die * len(messages), apart=True)
        while answers:
            header = Header.unpack(answers[: Header.SIZE])
            assert not header.error, header
            answers = answers[header.message_size :]
        self.written.append(("at once", self.world.written()))

    def read(self, region: int, offset: int, size: int) -> int:
        answer = self.ask(Command.REGION_READ, RegionRead(offset, region, size))
        return int.from_bytes(answer[RegionRead.SIZE :], "little")

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        data = value.to_bytes(size, "little")
        self.ask(Command.REGION_WRITE, RegionAccess(offset, region, size, data))

    def feature(self, method: FeatureMethod, index: FeatureIndex, data: bytes) -> bytes:
        asked = DeviceFeature(method | index, data, argsz=1 << 16)
        return self.ask(Command.DEVICE_FEATURE, asked)[DeviceFeature.SIZE :]

    def go_to(self, state: MigrationState) -> None:
        packed = MigrationPhase(state).pack()
        self.feature(FeatureMethod.SET, FeatureIndex.MIG_DEVICE_STATE, packed)

    def map(self, fd: int, address: int) -> None:
        self.ask(Command.DMA_MAP, DmaMap(BOTH, 0, address, MEMORY), *([] if fd < 0 else [fd]))

    def send(self, chains: int) -> None:
        """Have that much in the ring, and notify the device once."""
        self._guest.send(chains)
        if self._kick >= 0:
            os.eventfd_write(self._kick, 1)

    def all_arrives(self) -> None:
        """Wait until the file has every byte once, and the driver, interrupted, all its buffers."""
        driver, sent = self._guest.driver, self._guest.sent
        while driver.in_flight:
            told = self.world.wait_readable(self._calls[VECTOR])
            got = self._output.read_bytes()
            text = f"{driver.in_flight} in flight, of {len(sent) // LENGTH} {list(got[::LENGTH])}"
            assert told, text
            assert sent.startswith(got), text
            os.eventfd_read(self._calls[VECTOR])
            driver.get_used()
        assert self._output.read_bytes() == sent

    def live(self) -> None:
        """Do all that a client does, one after another."""
        self.begin()
        self._guest_runs()
        self._maps_change()
        self._migrates()
        self.ask(Command.DEVICE_RESET, None)
        self.ask(Command.DMA_UNMAP, DmaUnmap(0, MEMORY))

    def begin(self) -> None:
        """Do what a client and its driver do until the device runs."""
        proposed = Capabilities(max_msg_fds=253, named=frozenset({"max_msg_fds"}))
        self.ask(Command.VERSION, Version(0, 0, proposed))
        self.map(self._guest.memfd, 0)
        irqs = IrqSet(TELL, IrqIndex.MSIX, 0, VECTORS)
        self.ask(Command.DEVICE_SET_IRQS, irqs, *self._calls)
        self._pci = driver = PciDriver(
            partial(self.read, RegionIndex.CONFIG),
            partial(self.write, RegionIndex.CONFIG),
            lambda bar: (partial(self.read, bar), partial(self.write, bar)),
        )
        self.write(RegionIndex.CONFIG, driver.msix_capability + 2, 0x8000, 2)
        bar = driver.structures[1][0]
        place = RegionIoFds(bar, (), RegionIoFds.needed(QUEUES))
        self.ask(Command.DEVICE_GET_REGION_IO_FDS, place)
        assert len(self.world.beside) == QUEUES
        self._kick = os.dup(self.world.beside[QUEUE])
        # No reset, as drivers begin with: the guest has the port open.
        accepted = FEATURES | (Feature.RING_PACKED if self._packed else 0)
        for word in (0, 1):
            driver.write_common(CommonRegister.DRIVER_FEATURE_SELECT, word, 4)
            bits = accepted >> 32 * word & 0xFFFFFFFF
            driver.write_common(CommonRegister.DRIVER_FEATURE, bits, 4)
        driver.status = STATUS
        self._guest.send(SIZE // 4)
        driver.start_queue(QUEUE, SIZE, (DESC, AVAIL, USED), vector=VECTOR)
        driver.status = STATUS | Status.DRIVER_OK

    def _guest_runs(self) -> None:
        self.send(1)
        self.all_arrives()
        self.send(SIZE // 4)
        self._pci.notify(QUEUE)
        self.all_arrives()
        other = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.send(SIZE // 4)
        self.ask(Command.DEVICE_SET_IRQS, IrqSet(TELL, IrqIndex.MSIX, VECTOR, 1), other)
        os.close(self._calls[VECTOR])
        self._calls[VECTOR] = other
        self.send(1)
        self.all_arrives()

    def _maps_change(self) -> None:
        self.send(SIZE // 2)
        self.map(self._other, 1 << 32)
        self.send(1)
        self.map(-1, 2 << 32)
        self.all_arrives()
        self.send(SIZE // 2)
        self.ask(Command.DMA_UNMAP, DmaUnmap(1 << 32, MEMORY))
        self.all_arrives()
        self.send(SIZE // 2)
        # All that comes while there is no worker: the ring loses its memory, and gets it again.
        here, there = (DmaMap(BOTH, 0, at, MEMORY) for at in (0, 1 << 32))
        self.ask_at_once(
            (Command.DMA_UNMAP, DmaUnmap(0, MEMORY), ()),
            (Command.DMA_MAP, there, (self._other,)),
            (Command.DMA_MAP, here, (self._guest.memfd,)),
            (Command.DMA_UNMAP, DmaUnmap(1 << 32, MEMORY), ()),
        )
        self.send(1)
        self.all_arrives()
        control = LoggingControl(LOG_PAGE).pack()
        report = LoggingReport(0, MEMORY, LOG_PAGE).pack()
        self.feature(FeatureMethod.SET, FeatureIndex.DMA_LOGGING_START, control)
        self.send(SIZE // 2)
        self.all_arrives()
        marks = self.feature(FeatureMethod.GET, FeatureIndex.DMA_LOGGING_REPORT, report)
        assert any(LoggingReport.unpack(marks).bitmap)
        self.feature(FeatureMethod.SET, FeatureIndex.DMA_LOGGING_STOP, control)

    def _migrates(self) -> None:
        self.send(SIZE // 2)
        self.go_to(MigrationState.STOP_COPY)
        state = b""
        while part := self._read_piece():
            state += part
        self.go_to(MigrationState.RUNNING)
        self.all_arrives()
        self.go_to(MigrationState.STOP_COPY)
        state = b""
        while part := self._read_piece():
            state += part
        self.go_to(MigrationState.RESUMING)
        # What follows the state is ignored.
        for piece in (state[:700], state[700:].ljust(6000, b"\0"), bytes(LONG)):
            self.bring(piece)
        self.send(SIZE // 2)
        self.go_to(MigrationState.STOP)
        self.go_to(MigrationState.RUNNING)
        self.all_arrives()
        self.send(SIZE // 2)
        self.all_arrives()

    def bring(self, piece: bytes) -> None:
        """Write a piece of a state."""
        self.ask(Command.MIG_DATA_WRITE, MigrationData(len(piece), piece))

    def _read_piece(self) -> bytes:
        size = 4000
        asked = MigrationData(size, argsz=MigrationData.SIZE + size)
        return self.ask(Command.MIG_DATA_READ, asked)[MigrationData.SIZE :]


@contextmanager
def made(packed: bool, die: int) -> Iterator[Life]:
    with tempfile.TemporaryDirectory() as directory:
        life = Life(Path(directory), packed, die)
        try:
            yield life
        finally:
            life.close()


def difference(got: object, expected: object) -> str:
    """How two of what was written down differ."""
    lines = [pprint.pformat(each).splitlines() for each in (expected, got)]
    return "\n".join(difflib.unified_diff(*lines, lineterm=""))


def main(layout: str, first: str = "1", of: str = "1") -> None:
    packed = layout == "packed"
    with made(packed, 0) as life:
        life.live()
        wanted = life.written
    die, died, deaths = int(first), 0, 1
    while deaths:
        with made(packed, die) as life:
            try:
                life.live()
            except AssertionError as error:
                at = len(life.written)
                raise AssertionError(f"step {die}, message {at}: {error}") from None
            for got, expected in zip(life.written, wanted, strict=True):
                assert got == expected, f"step {die}: {difference(got, expected)}"
            deaths = life.world.deaths
        died += deaths
        die += int(of)
    print(died)


if __name__ == "__main__":
    main(*sys.argv[1:])
