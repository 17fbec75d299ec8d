"""What a predecessor of the process left of a session: what is of no use ends it, with its name."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.leaks import held
from tests.support.waiting import until
from vring_serial.device.console.controller import Controller
from vring_serial.device.pci import PciDevice
from vring_serial.errors import RemoteProtocolError
from vring_serial.keeping import Keeping
from vring_serial.proto.vfio_user import VfioUserParser, reply
from vring_serial.proto.vfio_user_version import Capabilities
from vring_serial.proto.vfio_user_wire import Command, IrqIndex
from vring_serial.transport.repeatable import Handled
from vring_serial.transport.vfio_user.remote import IDS_EACH, RemoteMemory
from vring_serial.transport.vfio_user.server import VfioUserServer
from vring_serial.transport.vfio_user.state import ClientState, DmaRegion, RemoteRingsState
from vring_serial.transport.vfio_user.written import Writer


class Kept(Keeping):
    """What a keeper has, in this process."""

    def __init__(self) -> None:
        self.fds: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self.sections: dict[str, bytes] = {}
        self.written: list[str] = []

    def keep(self, role: str, fd: int) -> None:
        self.drop(role)
        self.fds[role] = os.dup(fd)

    def drop(self, role: str) -> None:
        if role in self.fds:
            os.close(self.fds.pop(role))

    def take(self, role: str) -> int | None:
        return self.left.pop(role, None)

    def roles(self) -> list[str]:
        return sorted(self.left)

    def write(self, section: str, state: bytes) -> None:
        self.sections[section] = state
        self.written.append(section)

    def read(self, section: str) -> bytes | None:
        return self.sections.get(section) or None

    def area(self, name: str, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def scoped(self, name: str) -> Keeping:
        raise NotImplementedError

    def close(self) -> None:
        for fd in (*self.fds.values(), *self.left.values()):
            os.close(fd)


@pytest.fixture
def kept() -> Iterator[Kept]:
    before = held()
    kept = Kept()
    yield kept
    kept.close()
    assert held() == before


def leave(
    kept: Kept,
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


def client_state(**fields: object) -> ClientState:
    return ClientState(agreed=Capabilities(), **fields)  # type: ignore[arg-type]


def damaged(kept: Kept) -> None:
    leave(kept, client_state())
    kept.sections["session"] = b"\xff" * 99


def without_registers(kept: Kept) -> None:
    leave(kept, client_state())
    del kept.sections["registers"]


def of_more_queues(kept: Kept) -> None:
    leave(kept, client_state(), max_ports=9)


def of_other_vectors(kept: Kept) -> None:
    leave(kept, client_state(), vectors=7)


def without_memory(kept: Kept) -> None:
    leave(kept, client_state(regions={0: DmaRegion(0, 4096, 3, 0, True, 8)}))


def with_smaller_memory(kept: Kept) -> None:
    kept.left["memory.8"] = os.memfd_create("small", os.MFD_CLOEXEC)
    without_memory(kept)


def without_a_copy(kept: Kept) -> None:
    leave(kept, client_state(regions={0: DmaRegion(0, 4096, 3, 0, False, 8)}), running=[1])


def with_a_short_copy(kept: Kept) -> None:
    kept.left["copy.8"] = os.memfd_create("short", os.MFD_CLOEXEC)
    without_a_copy(kept)


def without_an_interrupt(kept: Kept) -> None:
    kept.left["irq.2.0"] = os.eventfd(0, os.EFD_CLOEXEC)
    leave(kept, client_state(irqs={IrqIndex.MSIX: [0, 1]}))


def with_an_impossible_interrupt(kept: Kept) -> None:
    kept.left["irq.2.4"] = os.eventfd(0, os.EFD_CLOEXEC)
    leave(kept, client_state(irqs={IrqIndex.MSIX: [4]}))


def without_the_unmask_event(kept: Kept) -> None:
    leave(kept, client_state(unmask_event=True))


def without_the_twin(kept: Kept) -> None:
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
    kept: Kept,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    left: Callable[[Kept], None],
    cause: str,
) -> None:
    ours, theirs = socket.socketpair()
    kept.left["peer"] = theirs.detach()
    left(kept)
    controller = Controller(max_ports=1)
    server = VfioUserServer(controller, str(tmp_path / "v"), vectors=4, keeping=kept)
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


async def test_only_what_a_message_changed_is_written(kept: Kept) -> None:
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
