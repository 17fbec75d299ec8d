"""Virtqueues as drivers set them up through registers, for every layout of registers.

PCI, legacy PCI and MMIO name the same things in different places: a queue has a size and three
areas in guest memory, is enabled, disabled or reset, and runs once the driver is ready.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from vring import GuestMemory, drain, notify
from vring.errors import AddressError, VringError
from vring_serial.device.base import VirtioDevice
from vring_serial.device.virtqueue import RunningQueue, make_queue
from vring_serial.errors import VringSerialError
from vring_serial.proto.virtio import Feature
from vring_serial.unix_fds import make_eventfd

#: queue_msix_vector and config_msix_vector without a vector (4.1.5.1.2).
NO_VECTOR = 0xFFFF
_LEGACY_ALIGNMENT = 4096


class QueueSetup:
    """What the driver has said of one queue.

    Attributes:
        index: which queue.
        size: descriptors.
        descriptor_area, driver_area, device_area: guest addresses.
        enabled: the driver lets the device use it.
        vector: of MSI-X, where the layout has that; else NO_VECTOR.
        alignment: of the device area, where legacy drivers lay the queue out.
        running: the device has it.
        notified: what the driver wrote to notify it last.
    """

    __slots__ = (
        "alignment",
        "call_fd",
        "descriptor_area",
        "device_area",
        "direct",
        "driver_area",
        "enabled",
        "failed",
        "index",
        "kick_fd",
        "kick_shared",
        "notified",
        "position",
        "running",
        "size",
        "vector",
    )

    def __init__(self, index: int, size: int) -> None:
        self.index = index
        self.running = False
        self.kick_fd = -1
        self.kick_shared = False  # others have it, and may make it blocking
        # The device keeps this number while the queue runs; what it stands for is exchanged.
        self.call_fd = -1
        self.direct = False  # call_fd is someone else's event, not one of ours that is watched
        self.forget(size)

    def forget(self, size: int) -> None:
        """As after a reset."""
        self.size = size
        self.descriptor_area = self.driver_area = self.device_area = 0
        self.enabled = False
        self.failed = False  # until it is enabled anew
        self.vector = NO_VECTOR
        self.alignment = _LEGACY_ALIGNMENT
        self.notified: int | None = None
        self.position: int | None = None  # available index to go on from; None: a fresh ring

    def place_legacy(self, address: int) -> None:
        """Set the areas as legacy drivers lay them out, from ``address`` on (2.7.2)."""
        self.descriptor_area = address
        self.driver_area = address + 16 * self.size
        end = self.driver_area + 2 * (3 + self.size)
        self.device_area = (end + self.alignment - 1) & -self.alignment


class QueueTable:
    """All queues of a device: which of them run, and the descriptors that announce work.

    A queue runs while it is enabled, the table is *live* (the driver is ready and may be served)
    and guest memory is known. Its ring goes on where it stood when it starts again, unless it was
    reset or disabled.

    Args:
        device: has the queues.
        size_max: largest size that drivers may choose, and the size of a queue after a reset.
        called: gets the index of a queue whose driver wants to know of used buffers.
        failed: gets the index of a queue that cannot run as the driver set it up, and why.
    """

    def __init__(
        self,
        device: VirtioDevice,
        size_max: int,
        called: Callable[[int], None],
        failed: Callable[[int, Exception], None],
    ) -> None:
        self.size_max = size_max
        self.features = 0
        self._device = device
        self._called = called
        self._failed = failed
        self._memory: GuestMemory | None = None
        self._live = False
        self._queues = [QueueSetup(index, size_max) for index in range(device.num_queues)]

    def __len__(self) -> int:
        return len(self._queues)

    def __getitem__(self, index: int) -> QueueSetup:
        return self._queues[index]

    # --- what the driver does

    def set_size(self, queue: QueueSetup, size: int) -> None:
        """A size that is none, is not offered, or comes while the queue is enabled is ignored."""
        if queue.enabled or not 0 < size <= self.size_max:
            return
        if self.features & Feature.RING_PACKED or size & (size - 1) == 0:
            queue.size = size

    def enable(self, queue: QueueSetup) -> None:
        """The device may use the queue from now on."""
        if not queue.enabled:
            queue.enabled = True
            queue.failed = False
            queue.position = None
            self._update(queue)

    def disable(self, queue: QueueSetup) -> None:
        """The device leaves the queue alone; enabled again, it starts anew."""
        queue.enabled = False
        self._update(queue)
        self._device.reset_queue(queue.index)

    def reset(self, queue: QueueSetup) -> None:
        """The driver resets this queue alone (2.6.1): its state is the default state."""
        self.disable(queue)
        queue.forget(self.size_max)
        self._drain(queue)

    # --- what happens to the device as a whole

    @property
    def live(self) -> bool:
        """Whether enabled queues run."""
        return self._live

    @live.setter
    def live(self, live: bool) -> None:
        if live != self._live:
            self._live = live
            self._update_all()

    @property
    def memory(self) -> GuestMemory | None:
        """The guest's memory; None while it is not known, and then no queue runs.

        Setting it exchanges it under running queues. One whose ring is not in the new memory waits
        for the next: maps are taken apart and put together again while a machine starts.
        """
        return self._memory

    @memory.setter
    def memory(self, memory: GuestMemory | None) -> None:
        self._memory = None
        self._update_all()
        self._memory = memory
        for queue in self._queues:
            self._update(queue, waits=True)

    def reset_all(self) -> None:
        """Stop all queues, and forget what the driver said."""
        self._live = False
        self.features = 0
        self._update_all()
        for queue in self._queues:
            queue.forget(self.size_max)
            self._drain(queue)

    def close(self) -> None:
        """Stop all queues and close all descriptors. Safe to call twice."""
        self.reset_all()
        for queue in self._queues:
            for fd in (queue.kick_fd, queue.call_fd):
                if fd >= 0:
                    os.close(fd)
            queue.kick_fd = queue.call_fd = -1

    # --- descriptors

    def kick_fd(self, index: int) -> int:
        """The eventfd of the queue's kicks: the table's own, the same one until :meth:`close`.

        Raises OSError if there are no more descriptors.
        """
        self._queues[index].kick_shared = True
        return self._kick_fd(self._queues[index])

    def _kick_fd(self, queue: QueueSetup) -> int:
        if queue.kick_fd < 0:
            queue.kick_fd = make_eventfd()
        return queue.kick_fd

    def route(self, queue: QueueSetup, fd: int) -> None:
        """Let the queue's calls go straight to the event ``fd``, or with -1 to ``called``."""
        try:
            self._route(queue, fd)
        except OSError as error:
            self._fail(queue, error)

    def _route(self, queue: QueueSetup, fd: int) -> None:
        if fd < 0 and not queue.direct:
            return
        if queue.call_fd < 0:
            queue.call_fd = make_eventfd()
        if fd >= 0:
            waiting = os.dup(queue.call_fd) if not queue.direct else -1
            self._unwatch(queue)
            os.dup2(fd, queue.call_fd, inheritable=False)
            queue.direct = True
            if waiting >= 0:
                # Calls that came before, and that nobody has seen yet.
                if drain(waiting):
                    notify(queue.call_fd)
                os.close(waiting)
            return
        event = make_eventfd()
        os.dup2(event, queue.call_fd, inheritable=False)
        os.close(event)
        queue.direct = False
        if queue.running:
            self._watch(queue)

    # --- internals

    def _update_all(self) -> None:
        for queue in self._queues:
            self._update(queue)

    def _update(self, queue: QueueSetup, *, waits: bool = False) -> None:
        """Let the queue run or not, as it should. ``waits``: for its ring to be in memory."""
        if queue.running and not (queue.enabled and self._live and self._memory is not None):
            queue.running = False
            queue.position = self._device.stop_queue(queue.index)
            self._unwatch(queue)
        try:
            self._start_if_wanted(queue)
        except (VringError, VringSerialError, OSError) as error:
            if not (waits and isinstance(error, AddressError)):
                self._fail(queue, error)

    def _fail(self, queue: QueueSetup, error: Exception) -> None:
        queue.failed = True
        self._failed(queue.index, error)

    def _start_if_wanted(self, queue: QueueSetup) -> None:
        memory = self._memory
        if queue.running or queue.failed or not queue.enabled or not self._live or memory is None:
            return
        areas = (queue.descriptor_area, queue.driver_area, queue.device_area)
        name = f"queue {queue.index}"
        ring = make_queue(memory, queue.size, areas, self.features, index=queue.position, name=name)
        if queue.call_fd < 0:
            queue.call_fd = make_eventfd()
        running = RunningQueue(ring, self._kick_fd(queue), queue.call_fd)
        self._watch(queue)
        try:
            self._device.start_queue(queue.index, running)
        except BaseException:
            self._unwatch(queue)
            raise
        queue.running = True

    def _watch(self, queue: QueueSetup) -> None:
        if not queue.direct:
            loop = asyncio.get_running_loop()
            loop.add_reader(queue.call_fd, self._call_waits, queue)

    def _unwatch(self, queue: QueueSetup) -> None:
        if not queue.direct and queue.call_fd >= 0:
            asyncio.get_running_loop().remove_reader(queue.call_fd)

    def _call_waits(self, queue: QueueSetup) -> None:
        if drain(queue.call_fd):
            self._called(queue.index)

    def _drain(self, queue: QueueSetup) -> None:
        """Forget calls, which were about a ring that is no more. Kicks are never read."""
        if queue.call_fd >= 0 and not queue.direct:
            drain(queue.call_fd)
