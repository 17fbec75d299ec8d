"""A function that goes on from a state that somebody else wrote: what cannot be is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vring_serial.device.console.controller import Controller
from vring_serial.device.pci import PciDevice
from vring_serial.device.pci.state import FunctionState
from vring_serial.errors import StateError

VECTORS = 4


def saved() -> FunctionState:
    """What is left of a function."""
    pci = PciDevice(Controller(max_ports=1), vectors=VECTORS)
    pci.close()
    return pci.state


def set_table(at: int, value: int) -> Callable[[FunctionState], None]:
    def change(state: FunctionState) -> None:
        state.msix.table[at] = value

    return change


def shorter_table(state: FunctionState) -> None:
    del state.msix.table[-16:]


def pending_beyond(state: FunctionState) -> None:
    state.msix.pending = 1 << VECTORS


def config_vector_beyond(state: FunctionState) -> None:
    state.registers.driver.config_vector = VECTORS


def short_configuration(state: FunctionState) -> None:
    del state.config_space[-1:]


def missing_queue(state: FunctionState) -> None:
    del state.registers.queues[-1]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (set_table(0, 1), "vector 0 of its MSI-X table has bits 0x1 set"),
        (set_table(3 * 16 + 15, 0x80), "vector 3 of its MSI-X table has bits 0x8"),
        (shorter_table, "its MSI-X table has 48 bytes"),
        (pending_beyond, "the pending vectors is 0x10"),
        (config_vector_beyond, "config_vector is 4; the function has 4 vectors"),
        (short_configuration, "its configuration space has 255 bytes"),
        (missing_queue, "it has 3 queues, the device 4"),
    ],
)
async def test_what_cannot_be_is_named_before_the_device_is_taken(
    change: Callable[[FunctionState], None], why: str
) -> None:
    state = saved()
    change(state)
    device = Controller(max_ports=1)
    with pytest.raises(StateError) as caught:
        PciDevice(device, vectors=VECTORS, state=state)
    assert why in str(caught.value)
    PciDevice(device, vectors=VECTORS, state=saved()).close()


async def test_what_a_driver_can_write_is_taken() -> None:
    state = saved()
    state.msix.table[:12] = b"\xfc" + b"\xff" * 11
    pci = PciDevice(Controller(max_ports=1), vectors=VECTORS, state=state)
    assert pci.state.msix.table[:12] == b"\xfc" + b"\xff" * 11
    pci.close()
