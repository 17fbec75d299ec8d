"""What any layout of registers offers to the machine around it."""

from __future__ import annotations

from vring import GuestMemory, NotificationData
from vring_serial.device.registers.driver_registers import DriverRegisters
from vring_serial.lifetime import Closing


class RegisterDevice(Closing):
    """A virtio device behind registers, as whoever emulates the machine uses it.

    A layout sets ``_registers`` when it is made, and lays them out for the driver.
    """

    _registers: DriverRegisters

    def set_memory(self, memory: GuestMemory | None) -> None:
        """Exchange the guest's memory; running queues continue in it without loss.

        None: queues stop until there is memory again.
        """
        self._registers.set_memory(memory)

    def move_memory(self, memory: GuestMemory) -> None:
        """Exchange the guest's memory as :meth:`set_memory` does, but under queues that run.

        For memory in which other ranges are mapped, or elsewhere: a guest behind an IOMMU maps and
        unmaps each buffer. Chains in flight keep what they were in. A queue whose ring is not there
        stops; none starts, see :attr:`any_waiting`.
        """
        self._registers.move_memory(memory)

    @property
    def any_waiting(self) -> bool:
        """Whether a queue may run once its ring is in memory: :meth:`start_waiting`."""
        return self._registers.queues.any_waiting

    def start_waiting(self) -> None:
        """Start the queues whose rings are in memory again."""
        self._registers.start_waiting()

    def note_positions(self) -> None:
        """Bring positions of running rings, and interrupts that are due, in ``state`` up to date.

        Exact inside the device's ``settled``.
        """
        self._registers.note_progress()

    def kick_fd(self, queue: int) -> int:
        """Return an eventfd that notifies the queue, for callers that watch the place themselves.

        The place is QueueNotify of virtio-mmio, and the queue's NotifyOffset of a PCI function. The
        descriptor belongs to the device and stays open until :meth:`close`.

        Raises:
            OSError: there are no more descriptors.
        """
        return self._registers.queues.kick_fd(queue)

    def notification_data(self, queue: int) -> NotificationData | None:
        """Return what the driver's last notification of a queue carried (2.9), which is a hint.

        None before the first one, or if NOTIFICATION_DATA is not negotiated.
        """
        return self._registers.notification_data(queue)

    def close(self) -> None:
        """Reset the device, let go of it and close all descriptors. Safe to call twice."""
        self._registers.close()
