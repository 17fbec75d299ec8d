"""The registers about the queue that queue_select names, common to all layouts."""

from __future__ import annotations

from collections.abc import Callable

from vring_serial.device.registers.queues import QueueTable
from vring_serial.device.registers.state import DriverState, QueueSetup
from vring_serial.proto.virtio import Feature


class SelectedQueue:
    """Reads and writes the registers of the selected queue.

    A selection beyond the last queue reads as zero and ignores writes.

    Args:
        queues: all queues of the device.
        state: has queue_select.
        run: calls its argument in the event loop, and returns when it has returned.
    """

    def __init__(
        self,
        queues: QueueTable,
        state: DriverState,
        run: Callable[[Callable[[], None]], None],
    ) -> None:
        self._queues = queues
        self._state = state
        self._run = run

    @property
    def setup(self) -> QueueSetup | None:
        """The selected queue; None if there is none of that index."""
        index = self._state.queue_select
        return self._queues[index] if index < len(self._queues) else None

    # --- size, enabling, reset

    def read_size(self) -> int:
        """Return the number of descriptors; 0 if there is no such queue."""
        setup = self.setup
        return 0 if setup is None else setup.size

    def write_size(self, size: int) -> None:
        """Choose the number of descriptors."""
        if (setup := self.setup) is not None:
            self._queues.set_size(setup, size)

    def read_enable(self) -> int:
        """Return 1 if the queue is enabled, else 0."""
        setup = self.setup
        return int(setup is not None and setup.enabled)

    def enable(self) -> None:
        """Enable the queue, before or after DRIVER_OK."""
        if (setup := self.setup) is not None:
            self._run(lambda: self._queues.enable(setup))

    def disable(self) -> None:
        """Disable the queue and keep its set-up."""
        if (setup := self.setup) is not None:
            self._run(lambda: self._queues.disable(setup))

    def reset(self) -> None:
        """Reset the queue alone, if RING_RESET is negotiated (2.6.1)."""
        if (setup := self.setup) is not None and self._state.features & Feature.RING_RESET:
            self._run(lambda: self._queues.reset(setup))

    # --- areas

    def read_area(self, name: str, shift: int) -> int:
        """Return 32 bits, from bit ``shift`` on, of the address of area ``name``."""
        setup = self.setup
        address: int = 0 if setup is None else getattr(setup, name)
        return address >> shift & 0xFFFFFFFF

    def write_area(self, name: str, shift: int, value: int) -> None:
        """Set 32 bits of the address of area ``name``, unless the queue is enabled."""
        setup = self.setup
        if setup is not None and not setup.enabled:
            address: int = getattr(setup, name)
            setattr(setup, name, address & ~(0xFFFFFFFF << shift) | value << shift)
            self._queues.changed.add(setup.index)

    # --- legacy layouts

    def write_legacy_alignment(self, alignment: int) -> None:
        """Set the alignment of the used ring; other numbers than powers of two are ignored."""
        setup = self.setup
        if setup is not None and alignment > 0 and alignment & (alignment - 1) == 0:
            setup.alignment = alignment
            self._queues.changed.add(setup.index)

    def read_legacy_address(self) -> int:
        """Return the guest address of the queue; 0 unless it is enabled."""
        setup = self.setup
        return setup.descriptor_area if setup is not None and setup.enabled else 0

    def write_legacy_address(self, address: int) -> None:
        """Place the queue at guest address ``address`` and enable it, or with 0 disable it."""
        setup = self.setup
        if setup is None:
            return
        self._state.legacy = True
        if address == 0:
            self.disable()
        elif not setup.enabled:
            setup.place_legacy(address)
            self.enable()
