"""What a client has set up, as its state says it, and interrupts that go on from such a state."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from vring_serial.device.console.controller import Controller
from vring_serial.proto.vfio_user_features import MigrationState
from vring_serial.proto.vfio_user_version import Capabilities
from vring_serial.proto.vfio_user_wire import IrqIndex, IrqSet, IrqSetFlag
from vring_serial.saving import StateFormat
from vring_serial.transport.closer import Closer
from vring_serial.transport.vfio_user.irqs import Interrupts
from vring_serial.transport.vfio_user.rings import RemoteRings
from vring_serial.transport.vfio_user.state import (
    MOVING,
    PHASES,
    ClientState,
    DmaRegion,
    RemoteRingsState,
    check_client,
)

EVENTS = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER
UNMASK = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_UNMASK
FORMAT = StateFormat("vfio-user", 1, ClientState)
VECTORS = 4


@pytest.fixture
def make() -> Iterator[Callable[..., Interrupts]]:
    """Makes interrupts of a state, and closes their descriptors at the end."""
    made: list[Interrupts] = []

    def build(state: ClientState, level: bool = False, **options: object) -> Interrupts:
        made.append(
            Interrupts(VECTORS, lambda: level, lambda: None, Closer(), state, **options)  # type: ignore[arg-type]
        )
        return made[-1]

    yield build
    for each in made:
        each.close()


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def fired(event: int) -> bool:
    try:
        return os.eventfd_read(event) > 0
    except BlockingIOError:
        return False


async def test_interrupts_go_on_with_the_descriptors_that_the_state_tells_of(make, event) -> None:
    state = ClientState()
    first = make(state)
    first.set(IrqSet(EVENTS, IrqIndex.MSIX, 1, 2), [os.dup(event), os.dup(event)])
    first.set(IrqSet(UNMASK, IrqIndex.INTX, 0, 1), [os.dup(event)])
    assert state.irqs == {IrqIndex.MSIX: [1, 2]}
    assert state.unmask_event
    saved = FORMAT.unpack(FORMAT.pack(state))
    first.close()
    assert not any(state.irqs.values())
    assert not state.unmask_event

    fds = {IrqIndex.MSIX: [os.dup(event), os.dup(event)]}
    second = make(saved, fds=fds, unmask_fd=os.dup(event))
    assert not second.raise_msix(0)
    assert second.raise_msix(1)
    assert fired(event)
    assert second.msix_descriptor(2) == fds[IrqIndex.MSIX][1]
    second.set(IrqSet(EVENTS, IrqIndex.MSIX, 2, 1), [])
    assert saved.irqs[IrqIndex.MSIX] == [1]


async def test_intx_that_was_told_is_not_told_again(make, event) -> None:
    state = ClientState()
    first = make(state, level=True)
    first.set(IrqSet(EVENTS, IrqIndex.INTX, 0, 1), [os.dup(event)])
    assert fired(event)
    saved = FORMAT.unpack(FORMAT.pack(state))
    second = make(saved, level=True, fds={IrqIndex.INTX: [os.dup(event)]})
    second.set_intx(True)
    assert not fired(event)
    second.set(IrqSet(IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_UNMASK, IrqIndex.INTX, 0, 1), [])
    assert fired(event)


def test_descriptors_that_the_state_does_not_tell_of_are_refused(make, event) -> None:
    with pytest.raises(ValueError, match="shorter"):
        make(ClientState(irqs={IrqIndex.MSIX: [0, 1]}), fds={IrqIndex.MSIX: [event]})
    with pytest.raises(ValueError, match="unmasks INTx"):
        make(ClientState(unmask_event=True))


def test_a_client_s_state_can_be_written_down() -> None:
    state = ClientState(
        agreed=Capabilities(named=frozenset({"pgsizes", "max_msg_fds"})),
        regions={0x1000: DmaRegion(0x1000, 0x2000, 3, 0, True)},
        irqs={IrqIndex.MSIX: [0]},
    )
    assert FORMAT.unpack(FORMAT.pack(state)) == state


@pytest.mark.parametrize("phase", [*PHASES, MigrationState.ERROR])
def test_what_a_client_can_set_up_is_gone_on_with(phase: MigrationState) -> None:
    state = ClientState(
        agreed=Capabilities(max_msg_fds=0, max_data_xfer_size=4096),
        regions={
            0: DmaRegion(0, 0x1000, 1, 0, True, 0),
            0x1000: DmaRegion(0x1000, (1 << 64) - 0x1000, 3, 0, False, 7),
        },
        irqs={IrqIndex.INTX: [0], IrqIndex.MSI: [], IrqIndex.MSIX: [0, VECTORS - 1]},
        next_serial=8,
        life=3,
        phase=phase,
        memory=7 if phase in MOVING else None,
        length=2,
        moved=2,
    )
    check_client(FORMAT.unpack(FORMAT.pack(state)), VECTORS)


def test_rings_forget_whom_they_owe_an_interrupt_with_the_queue_and_the_driver() -> None:
    state = RemoteRingsState(owed=[0, 1, 2])
    rings = RemoteRings(Controller(max_ports=1), state)
    rings.reset_queue(1)
    assert state.owed == [0, 2]
    rings.note_owed()  # none runs
    assert state.owed == [0, 2]
    rings.reset()
    assert state.owed == []
