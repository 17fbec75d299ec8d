"""What is written down of a device inside an emulator: its front, and the device's own state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vring_serial.device.base import VirtioDevice
from vring_serial.device.pci.device import vectors_of
from vring_serial.device.pci.state import PciSnapshotState, check_function
from vring_serial.device.registers.driver_registers import check_saved_registers
from vring_serial.device.registers.state import RegistersState
from vring_serial.errors import LocalProtocolError
from vring_serial.lifetime import Starting
from vring_serial.saving import StateFormat, check_equal


@dataclass(slots=True)
class MmioSnapshotState:
    """A virtio-mmio device: its registers, and the device behind them.

    Attributes:
        device_id: the virtio device type.
        config_size: bytes of the device's configuration space.
        version: of the registers, 1 or 2.
        registers: what the guest sees.
        device: what ``VirtioDevice.save_state`` returned.
    """

    device_id: int = 0
    config_size: int = 0
    version: int = 0
    registers: RegistersState = field(default_factory=RegistersState)
    device: bytes = b""


#: How it is written down.
MMIO_SNAPSHOT = StateFormat("virtio-mmio device in an emulator", 1, MmioSnapshotState)


def check_pci(
    saved: PciSnapshotState,
    device: VirtioDevice,
    *,
    transitional: bool,
    packed: bool,
    queue_size: int,
    vectors: int | None,
) -> Callable[[], None]:
    """Check that a function with these options can go on from a state; see PciDevice for them.

    Returns what has the device take its part over. Raises StateError that names what does not fit,
    ConfigError as PciDevice.
    """
    check_equal("transitional", saved.transitional, transitional)
    take_over = _check_device(saved, device)
    vectors = vectors_of(device, vectors)
    check_equal("the number of MSI-X vectors", saved.vectors, vectors)
    check_function(saved.function, vectors)
    check_saved_registers(saved.function.registers, device, packed=packed, queue_size=queue_size)
    return take_over


def check_mmio(
    saved: MmioSnapshotState, device: VirtioDevice, *, version: int, packed: bool, queue_size: int
) -> Callable[[], None]:
    """Check that registers with these options can go on from a state; see MmioDevice for them.

    Returns and raises as :func:`check_pci`.
    """
    check_equal("the version of virtio-mmio", saved.version, version)
    take_over = _check_device(saved, device)
    check_saved_registers(saved.registers, device, packed=packed, queue_size=queue_size)
    return take_over


def _check_device(
    saved: PciSnapshotState | MmioSnapshotState, device: VirtioDevice
) -> Callable[[], None]:
    check_equal("the virtio device type", saved.device_id, device.device_id)
    if isinstance(device, Starting) and getattr(device, "started", False):
        raise LocalProtocolError(f"{device.name} was started: a state comes before that")
    take_over = device.check_state(saved.device)
    check_equal("the size of the configuration space", saved.config_size, device.config_size)
    return take_over
