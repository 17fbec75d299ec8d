"""The state that a driver puts into registers: plain values, apart from descriptors and callbacks.

Together with guest memory, and for a PCI function its configuration space and MSI-X state, these
are all that a device model has to keep in order to go on elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vring import SplitDriver

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
