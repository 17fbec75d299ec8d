"""What a predecessor of the process left of a session: what is of no use ends it, with its name."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.support.echo_device import EchoDevice
from tests.support.leaks import held
from tests.support.shelves import ShelfKeeper
from tests.support.vfio_client import Client, Server
from tests.support.waiting import until
from vring_serial.device.console.controller import Controller
from vring_serial.device.pci import PciDevice
from vring_serial.device.pci.state import FunctionState
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.errors import RemoteProtocolError, StateError
from vring_serial.keeping import Keeping
from vring_serial.proto.vfio_user import VfioUserParser, reply
from vring_serial.proto.vfio_user_dma import DmaFlag, DmaMap
from vring_serial.proto.vfio_user_features import (
    DeviceFeature,
    FeatureIndex,
    FeatureMethod,
    MigrationData,
    MigrationPhase,
    MigrationState,
)
from vring_serial.proto.vfio_user_version import Capabilities
from vring_serial.proto.vfio_user_wire import Command, IrqIndex
from vring_serial.proto.virtio import Status
from vring_serial.service.descriptor_store import Notifier
from vring_serial.service.journal import Journal
from vring_serial.service.shelf import Shelf
from vring_serial.transport.repeatable import Handled
from vring_serial.transport.state_memory import make_memory
from vring_serial.transport.vfio_user.remote import IDS_EACH, RemoteMemory
from vring_serial.transport.vfio_user.server import VfioUserServer
from vring_serial.transport.vfio_user.state import (
    CLIENT,
    MAX_DMA_MAPS,
    QUEUES,
    REGIONS,
    ClientState,
    DmaRegion,
    RemoteRingsState,
    WrittenClient,
    WrittenRegions,
)
from vring_serial.transport.vfio_user.written import Writer, read_left


class NotedShelf(Shelf):
    """A shelf that says which sections were written.

    Attributes:
        written: their names, in order.
        bytes_written: of all of them.
        on_write: called after each.
    """

    def __init__(self, journal: Journal, notifier: Notifier, left: dict[str, list[int]]) -> None:
        super().__init__(journal, notifier, left)
        self.written: list[str] = []
        self.bytes_written = 0
        self.on_write: Callable[[], None] | None = None

    def write(self, section: str, state: bytes) -> None:
        self.written.append(section)
        self.bytes_written += len(state)
        super().write(section, state)
        if self.on_write is not None:
            self.on_write()


@pytest.fixture
def keeper() -> Iterator[ShelfKeeper]:
    before = held()
    keeper = ShelfKeeper()
    yield keeper
    keeper.close()
    assert held() == before


@pytest.fixture
def shelves() -> Iterator[ShelfKeeper]:
    """Of a server that ends later than the test."""
    keeper = ShelfKeeper()
    yield keeper
    keeper.close()


def leave(
    kept: Keeping,
    client: ClientState,
    *,
    max_ports: int = 1,
    vectors: int = 4,
    running: Sequence[int] = (),
    owed: Sequence[int] = (),
    forge: Callable[[FunctionState], object] = lambda _: None,
) -> None:
    """Write down a session as a predecessor does, after ``forge`` has changed its function."""
    pci = PciDevice(Controller(max_ports=max_ports), vectors=vectors)
    for index in running:
        pci.state.registers.queues[index].running = True
    before = copy.deepcopy(pci.state)
    forge(pci.state)
    Writer(kept, pci, RemoteRingsState(list(owed))).write(Handled(1), client)
    pci.state.registers.driver.features = before.registers.driver.features
    pci.close()


def keep(kept: Keeping, role: str, fd: int) -> None:
    kept.keep(role, fd)
    os.close(fd)


def client_state(**fields: object) -> ClientState:
    state = ClientState(agreed=Capabilities(), **fields)  # type: ignore[arg-type]
    serials = [each.serial for each in state.regions.values()]
    state.next_serial = state.next_serial or max(serials, default=-1) + 1
    return state


def damaged(kept: Keeping) -> None:
    leave(kept, client_state())
    kept.write("session", b"\xff" * 99)


def without_registers(kept: Keeping) -> None:
    leave(kept, client_state())
    kept.write("registers", b"")  # as one that was never written


def of_more_queues(kept: Keeping) -> None:
    leave(kept, client_state(), max_ports=9)


def of_other_vectors(kept: Keeping) -> None:
    leave(kept, client_state(), vectors=7)


def without_memory(kept: Keeping) -> None:
    leave(kept, client_state(regions={0: DmaRegion(0, 4096, 3, 0, True, 8)}))


def with_smaller_memory(kept: Keeping) -> None:
    keep(kept, "memory.8", os.memfd_create("small", os.MFD_CLOEXEC))
    without_memory(kept)


def without_a_copy(kept: Keeping) -> None:
    leave(kept, client_state(regions={0: DmaRegion(0, 4096, 3, 0, False, 8)}), running=[1])


def with_a_short_copy(kept: Keeping) -> None:
    keep(kept, "copy.8", os.memfd_create("short", os.MFD_CLOEXEC))
    without_a_copy(kept)


def without_an_interrupt(kept: Keeping) -> None:
    keep(kept, "irq.2.0", os.eventfd(0, os.EFD_CLOEXEC))
    leave(kept, client_state(irqs={IrqIndex.MSIX: [0, 1]}))


def with_an_impossible_interrupt(kept: Keeping) -> None:
    keep(kept, "irq.2.4", os.eventfd(0, os.EFD_CLOEXEC))
    leave(kept, client_state(irqs={IrqIndex.MSIX: [4]}))


def without_the_unmask_event(kept: Keeping) -> None:
    leave(kept, client_state(unmask_event=True))


def without_the_twin(kept: Keeping) -> None:
    state = client_state()
    state.agreed = Capabilities(twin_socket=True)
    leave(kept, state)


def without_the_state(kept: Keeping) -> None:
    leave(kept, client_state(phase=MigrationState.RESUMING, memory=3, next_serial=4, length=11))


def with_a_pipe_for_the_state(kept: Keeping) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    keep(kept, "state.3", reader)
    without_the_state(kept)


def with_a_short_state(kept: Keeping) -> None:
    keep(kept, "state.3", make_memory(10))
    without_the_state(kept)


def with_a_mapping_twice(kept: Keeping) -> None:
    leave(kept, client_state(regions={0: region()}, next_serial=9))
    kept.write("regions.5", REGIONS.pack(WrittenRegions([replace(region(), serial=8)])))


def with_too_many_in_a_section(kept: Keeping) -> None:
    leave(kept, client_state())
    regions = [region(at << 12) for at in range(65)]
    kept.write("regions.0", REGIONS.pack(WrittenRegions(regions)))


def forged(**fields: object) -> Callable[[Keeping], None]:
    """A session whose client's setup says what no client can set up."""
    return lambda kept: leave(kept, client_state(**fields))


def forged_regions(regions: dict[int, DmaRegion]) -> Callable[[Keeping], None]:
    """A session with mappings where an older version has them."""

    def left(kept: Keeping) -> None:
        leave(kept, client_state())
        client = WrittenClient(client_state(regions=regions))
        kept.write("session", CLIENT.pack(client))

    return left


def agreed_on(**numbers: int) -> Callable[[Keeping], None]:
    def left(kept: Keeping) -> None:
        leave(kept, ClientState(agreed=Capabilities(**numbers)))  # type: ignore[arg-type]

    return left


def forged_function(forge: Callable[[FunctionState], object]) -> Callable[[Keeping], None]:
    return lambda kept: leave(kept, client_state(), forge=forge)


def reserved_bits(function: FunctionState) -> None:
    function.msix.table[2 * 16] = 3


def other_features(function: FunctionState) -> None:
    function.registers.driver.features = 1 << 63


def vector_beyond(function: FunctionState) -> None:
    function.registers.queues[1].vector = 4


def negative_vector(function: FunctionState) -> None:
    function.registers.driver.config_vector = -1


def size_beyond(function: FunctionState) -> None:
    function.registers.queues[1].size = 1 << 20


def region(address: int = 0, size: int = 4096, flags: int = 3, offset: int = 0) -> DmaRegion:
    return DmaRegion(address, size, flags, offset, False, address)


@pytest.mark.parametrize(
    ("left", "cause"),
    [
        (forged_function(reserved_bits), "vector 2 of its MSI-X table has bits 0x3 set"),
        (forged_function(other_features), "features 0x8000000000000000, which are not offered"),
        (forged_function(vector_beyond), "queue 1: vector is 4; the function has 4 vectors"),
        (forged_function(negative_vector), "config_vector is -1"),
        (forged_function(size_beyond), "queue 1 has 1048576 descriptors"),
        (lambda kept: leave(kept, client_state(), owed=[4]), "drivers of queues [4]"),
        (forged(irqs={IrqIndex.MSIX: [-1]}), "interrupt -1 of type 2"),
        (forged(irqs={IrqIndex.MSIX: [1, 0]}), "not in ascending order"),
        (forged(irqs={IrqIndex.ERR: [0]}), "interrupt 0 of type 3; the function has 0"),
        (forged_regions({4096: region()}), "the mapping at 0x1000 is said to begin at 0x0"),
        (forged(regions={0: region(size=0)}), "the mapping at 0x0 has 0x0 bytes"),
        (forged(regions={0: region(size=1 << 65)}), "which cannot be"),
        (forged(regions={-1: region(-1)}), "which cannot be"),
        (forged(regions={0: region(size=8192), 4096: region(4096)}), "mapping at 0x1000"),
        (forged(regions={0: region(flags=4)}), "the mapping at 0x0 has flags 0x4"),
        (forged(regions={0: region(offset=-1)}), "the mapping at 0x0: offset is -0x1"),
        (
            forged_regions({at << 12: region(at << 12) for at in range(MAX_DMA_MAPS + 1)}),
            "4097 mappings; 4096 are possible",
        ),
        (
            forged_regions({0: region(), 4096: replace(region(4096), serial=0)}),
            "two mappings have the same serial",
        ),
        (agreed_on(max_data_xfer_size=0), "max_data_xfer_size is 0"),
        (agreed_on(max_msg_fds=254), "max_msg_fds is 254"),
        (forged(next_serial=-1), "next_serial is -0x1"),
        (forged(life=1 << 40), "life is"),
        (forged(phase=MigrationState.PRE_COPY), "the migration state PRE_COPY"),
        (forged(length=2, moved=3), "3 bytes of a state of 2 were moved"),
        (forged(length=1 << 25), "at most 16777216 are possible"),
        (forged(memory=1), "in state RUNNING, the memory of a device state is another"),
        (forged(phase=MigrationState.RESUMING), "in state RESUMING, the memory of a device"),
        (without_the_state, "the memory of the function's state is not there"),
        (with_a_pipe_for_the_state, "the memory of a device state is another descriptor"),
        (with_a_short_state, "the memory of a device state has 10 bytes, not 11"),
        (with_a_mapping_twice, "two mappings begin at 0x0"),
        (with_too_many_in_a_section, "65 mappings in one section"),
        (damaged, "the first bytes are others"),
        (without_registers, "the section registers is missing"),
        (of_more_queues, "20 queues, and the device has 4"),
        (of_other_vectors, "its MSI-X table has 112 bytes, 16 for each of 4 vectors"),
        (without_memory, "the descriptor memory.8 is not there"),
        (with_smaller_memory, "its file has 0x0 bytes"),
        (without_a_copy, "the ring of queue 1 is in memory that is not shared"),
        (with_a_short_copy, "the copy 8 is shorter than its region"),
        (without_an_interrupt, "the descriptor irq.2.1 is not there"),
        (with_an_impossible_interrupt, "interrupt 4 of type 2; the function has 4"),
        (without_the_unmask_event, "the descriptor unmask is not there"),
        (without_the_twin, "the descriptor twin is not there"),
    ],
)
async def test_what_is_of_no_use_ends_the_session_and_not_the_service(
    keeper: ShelfKeeper,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    left: Callable[[Keeping], None],
    cause: str,
) -> None:
    ours, theirs = socket.socketpair()
    predecessor = keeper.begin()
    keep(predecessor, "peer", theirs.detach())
    left(predecessor)
    controller = Controller(max_ports=1)
    server = VfioUserServer(controller, str(tmp_path / "v"), vectors=4, keeping=keeper.begin())
    happened: list[str] = []
    server.on_peer = happened.append
    await controller.start()
    await server.start()
    with ours:
        await until(lambda: happened == ["resumed", "gone"], lambda: f"{happened}")
        assert ours.recv(1) == b""
    assert "what the process before left cannot be gone on with" in caplog.text
    assert cause in caplog.text
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "v"))
        await until(lambda: happened[2:] == ["connected"])
    await until(lambda: happened[3:] == ["gone"])
    await server.aclose()
    await controller.aclose()


async def test_late_answers_to_a_predecessor_are_ignored_once() -> None:
    sent: list[bytes] = []
    remote = RemoteMemory(sent.append, 4096, life=1)

    def answer(number: int) -> None:
        parser = VfioUserParser()
        parser.receive_data(reply(Command.DMA_WRITE, number))
        message = parser.next_message()
        assert message is not None
        remote.handle_reply(message)

    answer(7)
    with pytest.raises(RemoteProtocolError, match="nobody asked for"):
        answer(7)
    with pytest.raises(RemoteProtocolError, match="nobody asked for"):
        answer(2 * IDS_EACH)  # of no life before this one
    done = [remote.write(0, b"x") for _ in range(2)]
    answer(IDS_EACH)
    answer(IDS_EACH + 1)
    assert all(each.done() for each in done)
    remote.close()


def test_a_client_of_the_version_before_is_gone_on_with(keeper: ShelfKeeper) -> None:
    """It had its mappings, and a state on its way, in one section."""
    kept = keeper.begin()
    leave(kept, client_state())
    body = CLIENT.pack(WrittenClient(client_state(regions={0: region()}, next_serial=5)))
    fields = json.loads(body[20:])
    fields["version"] = 1
    del fields["state"]["gone"]
    for name in ("memory", "length"):
        del fields["state"]["client"][name]
    fields["state"]["client"]["content"] = ""

    def write() -> None:
        old = json.dumps(fields).encode()
        kept.write("session", body[:12] + struct.pack("<II", len(old), zlib.crc32(old)) + old)

    write()
    left = read_left(kept, 4, 4)
    assert left is not None
    assert left.client.regions == {0: region()}
    pci = PciDevice(Controller(max_ports=1), vectors=4)
    writer = Writer(kept, pci, RemoteRingsState(), left)
    writer.write(Handled(2), left.client)
    pci.close()
    again = read_left(kept, 4, 4)
    assert again is not None
    assert again.client == left.client
    fields["state"]["client"]["phase"] = MigrationState.STOP_COPY.value
    write()
    with pytest.raises(StateError, match="the function's state is on its way"):
        read_left(kept, 4, 4)


def test_a_mapping_counts_with_its_message_and_not_before(keeper: ShelfKeeper) -> None:
    """Whatever section was written last: none is lost, and none there that no message has."""
    kept = keeper.begin(NotedShelf)
    pci = PciDevice(Controller(max_ports=1), vectors=4)
    writer = Writer(kept, pci, RemoteRingsState())
    client = client_state()
    writer.write(Handled(1), client)
    chance = random.Random(7)

    def check(number: int, before: set[DmaRegion], after: set[DmaRegion]) -> None:
        left = read_left(kept, 4, 4)
        assert left is not None
        wanted = after if left.handled.number == number else before
        assert set(left.client.regions.values()) == wanted

    for number in range(2, 300):
        before = set(client.regions.values())
        if chance.random() < 0.6:
            at = client.next_serial << 12
            client.regions[at] = replace(region(at), serial=client.next_serial)
            client.next_serial += 1
        elif client.regions:
            gone = chance.sample(sorted(client.regions), min(chance.randrange(1, 4), len(before)))
            for at in gone:
                del client.regions[at]
        after = set(client.regions.values())
        kept.on_write = partial(check, number, before, after)
        writer.write(Handled(number), client)
        kept.on_write = None
    pci.close()


def test_what_one_more_piece_costs_does_not_grow(
    shelves: ShelfKeeper,
    make_server: Callable[..., Server],
    new_client: Callable[[Server], Client],
) -> None:
    shelf = shelves.begin(NotedShelf)
    client = new_client(make_server(Controller(max_ports=1), keeping=shelf))
    client.negotiate()

    def cost(do: Callable[[], object]) -> int:
        before = shelf.bytes_written
        do()
        return shelf.bytes_written - before

    phase = MigrationPhase(MigrationState.RESUMING).pack()
    asked = FeatureMethod.SET | FeatureIndex.MIG_DEVICE_STATE
    client.ask(Command.DEVICE_FEATURE, DeviceFeature(asked, phase, argsz=64), DeviceFeature)
    piece = MigrationData(5000, bytes(5000))
    costs = [cost(lambda: client.do(Command.MIG_DATA_WRITE, piece)) for _ in range(40)]
    assert max(costs) < min(costs) + 20, "more than digits of numbers"
    memory = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.ftruncate(memory, 4096)

    def add(at: int) -> None:
        client.do(Command.DMA_MAP, DmaMap(DmaFlag.READ, 0, at << 20, 4096), (memory,))

    costs = [cost(partial(add, at)) for at in range(1, 300)]
    os.close(memory)
    assert max(costs[150:]) < max(costs[:150]) + 500


async def test_only_what_a_message_changed_is_written(keeper: ShelfKeeper) -> None:
    kept = keeper.begin(NotedShelf)
    pci = PciDevice(Controller(max_ports=20), vectors=4)
    writer = Writer(kept, pci, RemoteRingsState())
    message = Handled(1, b"message")
    writer.write(message, client_state())
    kept.written.clear()
    place = pci.notify_offsets[3]
    pci.bar_write(place.bar, place.offset, 3, 2)
    writer.write(message, None)
    assert kept.written == ["handled"]
    kept.written.clear()
    pci.config_write(0x3C, 11, 1)
    writer.write(message, None)
    assert kept.written == ["registers", "handled"]
    pci.close()


def test_that_a_ring_runs_is_written_down_before_the_device_has_it(
    shelves: ShelfKeeper,
    device: EchoDevice,
    make_server: Callable[..., Server],
    new_client: Callable[[Server], Client],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the device moved before would be moved again by a successor, which begins anew."""
    shelf = shelves.begin()
    written: list[tuple[int, bool]] = []
    start_queue = device.start_queue

    def start(index: int, queue: RunningQueue) -> None:
        setups = QUEUES.unpack(shelf.read("queues.0") or b"").queues
        written.append((index, setups[index].running))
        start_queue(index, queue)

    monkeypatch.setattr(device, "start_queue", start)
    server = make_server(device, keeping=shelf)
    client = new_client(server)
    driver = client.boot(0, 1)
    server.settle()
    assert written == [(0, True), (1, True)]
    assert client.echo(driver, 0, b"it moves")


def test_a_queue_that_cannot_be_served_is_said_to_be_broken(
    shelves: ShelfKeeper,
    device: EchoDevice,
    make_server: Callable[..., Server],
    new_client: Callable[[Server], Client],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(index: int, queue: RunningQueue) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(device, "start_queue", start)
    server = make_server(device, keeping=shelves.begin())
    driver = new_client(server).boot(0)
    server.settle()
    assert driver.status & Status.DEVICE_NEEDS_RESET
