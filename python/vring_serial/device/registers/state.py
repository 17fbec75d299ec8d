"""The state that a driver puts into registers: plain values, apart from descriptors and callbacks.

Together with guest memory, and for a PCI function its configuration space and MSI-X state, these
are all that a device model has to keep in order to go on elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vring import SplitDriver
from vring_serial.errors import StateError
from vring_serial.saving import check_range

#: The areas of a queue, as :class:`QueueSetup` names them, in the order of their registers.
QUEUE_AREAS = ("descriptor_area", "driver_area", "device_area")
#: queue_msix_vector and config_msix_vector without a vector (4.1.5.1.2).
NO_VECTOR = 0xFFFF
#: Alignment of the used ring in legacy layouts, unless the driver chooses another (2.7.2).
LEGACY_ALIGNMENT = 4096


@dataclass(slots=True)
class DriverState:
    """The registers that belong to no single queue.

    Attributes:
        device_feature_select, driver_feature_select: the selected words of feature bits.
        features_written: feature bits that the driver has written, offered or not.
        features: feature bits that are accepted; 0 before FEATURES_OK.
        legacy: the driver uses the legacy interface.
        queue_select: the index that the queue registers apply to; may name no queue.
        config_generation: 8 bits (4.1.4.3.1).
        config_vector: the MSI-X vector of configuration changes, or NO_VECTOR (PCI).
        events: events that the driver has not acknowledged (ISR status, InterruptStatus).
        page_size: bytes, as legacy MMIO drivers set it; 0 before (4.2.4).
    """

    device_feature_select: int = 0
    driver_feature_select: int = 0
    features_written: int = 0
    features: int = 0
    legacy: bool = False
    queue_select: int = 0
    config_generation: int = 0
    config_vector: int = NO_VECTOR
    events: int = 0
    page_size: int = 0


@dataclass(slots=True)
class QueueSetup:
    """The registers of one queue, and the position of its ring.

    Attributes:
        index: the queue's number.
        size: descriptors.
        descriptor_area, driver_area, device_area: guest addresses.
        enabled: the driver lets the device use the queue.
        failed: the queue could not run as it is set up; cleared when it is enabled again.
        vector: the queue's MSI-X vector, or NO_VECTOR (PCI).
        alignment: bytes, of the used ring in legacy layouts.
        notified: the value of the driver's last notification; None before the first.
        position: the available index to resume from, 16 bits, with the wrap counter in bit 15 if
            the ring is packed; None for a fresh ring. While the queue runs, the device has the
            current one: see ``QueueTable.note_positions``.
        running: the device has the ring.
    """

    index: int
    size: int
    descriptor_area: int = 0
    driver_area: int = 0
    device_area: int = 0
    enabled: bool = False
    failed: bool = False
    vector: int = NO_VECTOR
    alignment: int = LEGACY_ALIGNMENT
    notified: int | None = None
    position: int | None = None
    running: bool = False

    def forget(self, size: int) -> None:
        """Return to the state after a reset, with ``size`` descriptors."""
        self.size = size
        self.descriptor_area = self.driver_area = self.device_area = 0
        self.enabled = self.failed = False
        self.vector = NO_VECTOR
        self.alignment = LEGACY_ALIGNMENT
        self.notified = self.position = None

    def place_legacy(self, address: int) -> None:
        """Set the areas in the legacy layout, which begins at guest address ``address`` (2.7.2)."""
        self.descriptor_area = address
        table, available, _ = SplitDriver.layout(self.size)
        self.driver_area = address + table
        end = self.driver_area + available
        self.device_area = (end + self.alignment - 1) & -self.alignment


@dataclass(slots=True)
class RegistersState:
    """All registers of a device, in any layout.

    Attributes:
        driver: those that belong to no single queue.
        queues: one for each queue of the device; empty: all are as after a reset.
    """

    driver: DriverState = field(default_factory=DriverState)
    queues: list[QueueSetup] = field(default_factory=list)


def check_registers(
    state: RegistersState, *, num_queues: int, size_max: int, offered: int, legacy: int
) -> None:
    """Check a state that somebody else wrote down.

    Args:
        state: all of it.
        num_queues: of the device.
        size_max: descriptors of a queue, at most.
        offered, legacy: feature bits that modern and legacy drivers are offered.

    Raises StateError that names what does not fit.
    """
    driver = state.driver
    for name, bits in (
        ("device_feature_select", 32),
        ("driver_feature_select", 32),
        ("features_written", 64),
        ("features", 64),
        ("queue_select", 32),
        ("config_generation", 8),
        ("config_vector", 16),
        ("events", 8),
        ("page_size", 32),
    ):
        check_range(name, getattr(driver, name), bits)
    if extra := driver.features & ~(legacy if driver.legacy else offered):
        raise StateError(f"the driver accepted features {extra:#x}, which are not offered")
    if not state.queues:
        return
    if [setup.index for setup in state.queues] != list(range(num_queues)):
        raise StateError(f"it has {len(state.queues)} queues, the device {num_queues}")
    for setup in state.queues:
        _check_queue(setup, size_max)


def _check_queue(setup: QueueSetup, size_max: int) -> None:
    queue = f"queue {setup.index}"
    if not 0 < setup.size <= size_max:
        raise StateError(f"{queue} has {setup.size} descriptors; 1 to {size_max} are possible")
    for area in QUEUE_AREAS:
        check_range(f"{queue}: {area}", getattr(setup, area), 64)
    check_range(f"{queue}: vector", setup.vector, 16)
    check_range(f"{queue}: alignment", setup.alignment, 32)
    if setup.notified is not None:
        check_range(f"{queue}: notified", setup.notified, 32)
    if setup.position is not None:
        check_range(f"{queue}: position", setup.position, 16)
