"""What a predecessor of the process left of a session: what is of no use ends it, with its name."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.leaks import held
from tests.support.shelves import ShelfKeeper
from tests.support.waiting import until
from vring_serial.device.console.controller import Controller
from vring_serial.device.pci import PciDevice
from vring_serial.errors import RemoteProtocolError
from vring_serial.keeping import Keeping
from vring_serial.proto.vfio_user import VfioUserParser, reply
from vring_serial.proto.vfio_user_version import Capabilities
from vring_serial.proto.vfio_user_wire import Command, IrqIndex
from vring_serial.service.descriptor_store import Notifier
from vring_serial.service.journal import Journal
from vring_serial.service.shelf import Shelf
from vring_serial.transport.repeatable import Handled
from vring_serial.transport.vfio_user.remote import IDS_EACH, RemoteMemory
from vring_serial.transport.vfio_user.server import VfioUserServer
from vring_serial.transport.vfio_user.state import ClientState, DmaRegion, RemoteRingsState
from vring_serial.transport.vfio_user.written import Writer


class NotedShelf(Shelf):
    """A shelf that says which sections were written.

    Attributes:
        written: their names, in order.
    """

    def __init__(self, journal: Journal, notifier: Notifier, left: dict[str, list[int]]) -> None:
        super().__init__(journal, notifier, left)
        self.written: list[str] = []

    def write(self, section: str, state: bytes) -> None:
        self.written.append(section)
        super().write(section, state)


@pytest.fixture
def keeper() -> Iterator[ShelfKeeper]:
    before = held()
    keeper = ShelfKeeper()
    yield keeper
    keeper.close()
    assert held() == before


def leave(
    kept: Keeping,
    client: ClientState,
    *,
    max_ports: int = 1,
    vectors: int = 4,
    running: Sequence[int] = (),
) -> None:
    """Write down a session as a predecessor does."""
    pci = PciDevice(Controller(max_ports=max_ports), vectors=vectors)
    for index in running:
        pci.state.registers.queues[index].running = True
    Writer(kept, pci, RemoteRingsState()).write(Handled(1), client)
    pci.close()


def keep(kept: Keeping, role: str, fd: int) -> None:
    kept.keep(role, fd)
    os.close(fd)


def client_state(**fields: object) -> ClientState:
    return ClientState(agreed=Capabilities(), **fields)  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    ("left", "cause"),
    [
        (damaged, "the first bytes are others"),
        (without_registers, "the section registers is missing"),
        (of_more_queues, "20 queues, and the device has 4"),
        (of_other_vectors, "not one of 4 MSI-X vectors"),
        (without_memory, "the descriptor memory.8 is not there"),
        (with_smaller_memory, "its file has 0x0 bytes"),
        (without_a_copy, "the ring of queue 1 is in memory that is not shared"),
        (with_a_short_copy, "the copy 8 is shorter than its region"),
        (without_an_interrupt, "the descriptor irq.2.1 is not there"),
        (with_an_impossible_interrupt, "index out of range"),
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
