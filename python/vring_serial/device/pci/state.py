"""What a PCI function must remember in order to go on elsewhere: plain values."""

from __future__ import annotations

from dataclasses import dataclass, field

from vring_serial.device.registers.state import NO_VECTOR, RegistersState
from vring_serial.errors import StateError
from vring_serial.saving import StateFormat, check_range

#: Bytes of a conventional function's configuration space (PCI 3.0, 6).
CONFIG_SIZE = 256
#: Bytes of an entry of the MSI-X table (PCI 3.0, 6.8.2).
ENTRY_SIZE = 16
#: The mask bit of an entry.
ENTRY_MASKED = 1 << 96
#: What software can write in an entry: the address but for its low two bits, data, the mask bit.
ENTRY_WRITABLE = ENTRY_MASKED | 0xFFFFFFFF << 64 | 0xFFFFFFFF_FFFFFFFC


@dataclass(slots=True)
class MsixState:
    """The state of MSI-X that is not in configuration space.

    Attributes:
        table: ENTRY_SIZE bytes for each vector; empty: as after a reset.
        pending: the pending bits, vector 0 lowest.
    """

    table: bytearray = field(default_factory=bytearray)
    pending: int = 0


@dataclass(slots=True)
class FunctionState:
    """The whole function, but for the virtio device behind it.

    Attributes:
        registers: of the virtio device.
        config_space: 256 bytes; empty: as after a reset. Only bits that software can write count.
        msix: the table and the pending bits.
    """

    registers: RegistersState = field(default_factory=RegistersState)
    config_space: bytearray = field(default_factory=bytearray)
    msix: MsixState = field(default_factory=MsixState)


@dataclass(slots=True)
class PciSnapshotState:
    """A PCI function and the device behind it.

    Attributes:
        device_id: the virtio device type.
        config_size: bytes of the device's configuration space.
        transitional: the function supports legacy drivers as well.
        vectors: entries of the MSI-X table.
        function: what the guest sees.
        device: what ``VirtioDevice.save_state`` returned.
    """

    device_id: int = 0
    config_size: int = 0
    transitional: bool = False
    vectors: int = 0
    function: FunctionState = field(default_factory=FunctionState)
    device: bytes = b""


#: How that is written down.
PCI_SNAPSHOT = StateFormat("PCI function", 1, PciSnapshotState)


def check_function(state: FunctionState, vectors: int) -> None:
    """Check what only a PCI function has in a state that somebody else wrote down.

    Raises StateError that names what does not fit a function with so many MSI-X vectors.
    """
    if len(state.config_space) not in (0, CONFIG_SIZE):
        raise StateError(f"its configuration space has {len(state.config_space)} bytes")
    if len(state.msix.table) not in (0, ENTRY_SIZE * vectors):
        raise StateError(
            f"its MSI-X table has {len(state.msix.table)} bytes, {ENTRY_SIZE} for each of "
            f"{vectors} vectors are expected"
        )
    for at in range(0, len(state.msix.table), ENTRY_SIZE):
        entry = int.from_bytes(state.msix.table[at : at + ENTRY_SIZE], "little")
        if reserved := entry & ~ENTRY_WRITABLE:
            raise StateError(
                f"vector {at // ENTRY_SIZE} of its MSI-X table has bits {reserved:#x} set, "
                "which no driver can write"
            )
    check_range("the pending vectors", state.msix.pending, vectors)
    _check_vector("config_vector", state.registers.driver.config_vector, vectors)
    for setup in state.registers.queues:
        _check_vector(f"queue {setup.index}: vector", setup.vector, vectors)


def _check_vector(name: str, vector: int, vectors: int) -> None:
    if vector != NO_VECTOR and not 0 <= vector < vectors:
        raise StateError(f"{name} is {vector}; the function has {vectors} vectors")
