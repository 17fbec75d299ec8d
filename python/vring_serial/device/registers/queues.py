"""Virtqueues as drivers set them up through registers, for every layout of registers.

PCI, legacy PCI and MMIO name the same things in different places: a queue has a size and three
areas in guest memory, is enabled, disabled or reset, and runs once the driver is ready.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from vring import Drained, GuestMemory, VirtQueue, drain, move_queues, notify
from vring.errors import AddressError, Error
from vring_serial.device.base import VirtioDevice
from vring_serial.device.registers.state import DriverState, QueueSetup
from vring_serial.device.virtqueue import RunningQueue, make_queue
from vring_serial.errors import ConfigError
from vring_serial.proto.virtio import Feature
from vring_serial.unix_fds import make_eventfd

#: An eventfd's increment by one.
_ONE = (1).to_bytes(8, sys.byteorder)
#: No descriptors.
NO_KICKS: Mapping[int, int] = MappingProxyType({})


@dataclass(slots=True)
class _Descriptors:
    """The eventfds of one queue, made when they are needed; -1 before.

    Attributes:
        kick_fd: readable when the driver has notified the queue.
        kick_shared: others have ``kick_fd``, and may have made it blocking.
        call_fd: the device writes to it. The number stays while the queue runs; it is redirected by
            exchanging the file behind it.
        direct: ``call_fd`` is somebody else's eventfd, instead of our own that the loop watches.
        running: the ring, while the device has it and both descriptors.
    """

    kick_fd: int = -1
    kick_shared: bool = False
    call_fd: int = -1
    direct: bool = False
    running: VirtQueue | None = None


class QueueTable:
    """All queues of a device: which of them run, and the descriptors that announce work.

    A queue runs while it is enabled, the table is *live* (the driver is ready and may be served)
    and guest memory is known. Its ring goes on where it stood when it starts again, unless it was
    reset or disabled.

    Args:
        device: has the queues.
        state: the accepted features decide how rings are laid out.
        size_max: largest size that drivers may choose, and the size of a queue after a reset.
        called: gets the index of a queue whose driver wants to know of used buffers.
        failed: gets the index of a queue that cannot run as the driver set it up, and why.
        queues: to go on from; taken over. Empty: all are as after a reset.
        records: of each queue, see VirtQueue; a ring that ran goes on where its record says. None:
            there is no successor of this process, and ``queues`` say where their rings are.
        kick_fds: what :meth:`kick_fd` of a predecessor has returned, by queue; taken over.

    Attributes:
        changed: indices of queues whose setup, apart from ``notified``, is another since whoever
            writes it down last cleared this.

    Raises ConfigError if there are ``queues`` and they are not the device's.
    """

    def __init__(
        self,
        device: VirtioDevice,
        state: DriverState,
        size_max: int,
        called: Callable[[int], None],
        failed: Callable[[int, Exception], None],
        queues: list[QueueSetup] | None = None,
        records: Sequence[memoryview] | None = None,
        kick_fds: Mapping[int, int] = NO_KICKS,
    ) -> None:
        self.size_max = size_max
        self._state = state
        self._device = device
        self._called = called
        self._failed = failed
        self._memory: GuestMemory | None = None
        self._live = False
        self._queues = [] if queues is None else queues
        if not self._queues:
            self._queues += (QueueSetup(index, size_max) for index in range(device.num_queues))
        if [queue.index for queue in self._queues] != list(range(device.num_queues)):
            raise ConfigError(f"{device.name}: the state is not one of {device.num_queues} queues")
        self._records = records
        self._resumes: set[int] = set()  # those that ran in a predecessor, and do not yet here
        for queue in self._queues:
            if queue.running and records is not None:
                self._resumes.add(queue.index)
            queue.running = False
        self.changed = {queue.index for queue in self._queues}
        self._descriptors = [_Descriptors() for _ in self._queues]
        for index, fd in kick_fds.items():
            self._descriptors[index].kick_fd = fd
            self._descriptors[index].kick_shared = True

    def __len__(self) -> int:
        return len(self._queues)

    def __getitem__(self, index: int) -> QueueSetup:
        return self._queues[index]

    # --- what the driver does

    def set_size(self, queue: QueueSetup, size: int) -> None:
        """Choose the queue's size; ignored if it is not offered or the queue is enabled."""
        if queue.enabled or not 0 < size <= self.size_max:
            return
        if self._state.features & Feature.RING_PACKED or size & (size - 1) == 0:
            queue.size = size
            self.changed.add(queue.index)

    def enable(self, queue: QueueSetup) -> None:
        """Let the device use the queue."""
        if not queue.enabled:
            queue.enabled = True
            queue.failed = False
            queue.position = None
            self._resumes.discard(queue.index)
            self.changed.add(queue.index)
            self._update(queue)

    def disable(self, queue: QueueSetup) -> None:
        """Take the queue from the device; enabled again, it starts anew."""
        queue.enabled = False
        self._resumes.discard(queue.index)
        self.changed.add(queue.index)
        self._update(queue)
        self._device.reset_queue(queue.index)

    def reset(self, queue: QueueSetup) -> None:
        """Reset this queue alone to its default state (2.6.1)."""
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
        self.start_waiting()

    def move(self, memory: GuestMemory) -> None:
        """Exchange the guest's memory while queues run, which costs little beside stopping them.

        A queue whose ring is not in the new memory is stopped; none is started, see
        :attr:`any_waiting`.
        """
        rings = {fds.running: queue for queue, fds in self._pairs() if fds.running is not None}
        left = move_queues(rings, memory)
        self._memory = None
        for ring in left:
            self._update(rings[ring])
        self._memory = memory

    @property
    def any_waiting(self) -> bool:
        """Whether a queue may run once its ring is in memory: :meth:`start_waiting`."""
        return self._live and any(
            queue.enabled and not queue.failed and fds.running is None
            for queue, fds in self._pairs()
        )

    def start_waiting(self) -> None:
        """Start the queues whose rings are in memory again."""
        for queue in self._queues:
            self._update(queue, waits=True)

    def take(self, queues: Sequence[QueueSetup]) -> None:
        """Go on from setups that were checked, while no queue runs; none: as after a reset."""
        for queue, theirs in zip(self._queues, queues, strict=bool(queues)):
            for field in dataclasses.fields(QueueSetup):
                setattr(queue, field.name, getattr(theirs, field.name))
            queue.running = False
            self.changed.add(queue.index)

    def reset_all(self) -> None:
        """Stop all queues, and forget what the driver said."""
        self._live = False
        self._update_all()
        self._resumes.clear()
        for queue in self._queues:
            queue.forget(self.size_max)
            self.changed.add(queue.index)
            self._drain(queue)

    def close(self) -> None:
        """Stop all queues and close all descriptors. Safe to call twice."""
        self.reset_all()
        for fds in self._descriptors:
            for fd in (fds.kick_fd, fds.call_fd):
                if fd >= 0:
                    os.close(fd)
            fds.kick_fd = fds.call_fd = -1

    # --- descriptors

    def kick_fd(self, index: int) -> int:
        """Return the eventfd of the queue's kicks, which stays the table's own until :meth:`close`.

        Raises OSError if there are no more descriptors.
        """
        self._descriptors[index].kick_shared = True
        return self._kick_fd(self._descriptors[index])

    @property
    def shared_kicks(self) -> list[int]:
        """The indices of the queues whose :meth:`kick_fd` others have."""
        return [index for index, fds in enumerate(self._descriptors) if fds.kick_shared]

    def _kick_fd(self, fds: _Descriptors) -> int:
        if fds.kick_fd < 0:
            fds.kick_fd = make_eventfd()
        return fds.kick_fd

    def notifier(
        self, index: int, not_set_up: Callable[[int], None], notified: Callable[[], None]
    ) -> Callable[[int], None]:
        """Return what notifies the queue, in any thread, with the value that its driver wrote.

        Args:
            not_set_up: gets the index when the queue is not enabled.
            notified: called after each notification.
        """
        # A busy driver does little else: as few calls as can be between it and the descriptor.
        queue = self._queues[index]
        fds = self._descriptors[index]

        def notify_queue(value: int) -> None:
            queue.notified = value
            if not queue.enabled:
                not_set_up(index)
            if fds.kick_shared:
                notify(fds.kick_fd)
            elif fds.kick_fd >= 0:
                # contextlib.suppress costs half as much as the write.
                try:  # noqa: SIM105
                    os.write(fds.kick_fd, _ONE)
                except BlockingIOError:
                    pass
            notified()

        return notify_queue

    def is_running(self, queue: QueueSetup) -> bool:
        """Return whether the device has the queue."""
        return self._descriptors[queue.index].running is not None

    def note_positions(self) -> None:
        """Write into the setup of each running queue where its ring is now.

        Exact while nothing is in flight, as inside ``Controller.settled``.
        """
        for queue, fds in self._pairs():
            if fds.running is not None:
                queue.position = fds.running.avail_index

    def take_calls(self) -> None:
        """Call drivers now for whom a call waits that the event loop has not seen yet."""
        for index, fds in enumerate(self._descriptors):
            if fds.call_fd >= 0 and not fds.direct:
                self._call_waits(index)

    def is_routed(self, queue: QueueSetup) -> bool:
        """Return whether the queue's calls go straight to somebody else's event."""
        return self._descriptors[queue.index].direct

    def route(self, queue: QueueSetup, fd: int) -> None:
        """Let the queue's calls go straight to the event ``fd``, or with -1 to ``called``."""
        try:
            self._route(queue, fd)
        except OSError as error:
            self._fail(queue, error)

    def _route(self, queue: QueueSetup, fd: int) -> None:
        fds = self._descriptors[queue.index]
        if fd < 0 and not fds.direct:
            return
        if fds.call_fd < 0:
            fds.call_fd = make_eventfd()
        if fd >= 0:
            waiting = os.dup(fds.call_fd) if not fds.direct else -1
            self._unwatch(queue)
            os.dup2(fd, fds.call_fd, inheritable=False)
            fds.direct = True
            if waiting >= 0:
                # Calls that came before, and that nobody has seen yet.
                if drain(waiting) is Drained.READ:
                    notify(fds.call_fd)
                os.close(waiting)
            return
        event = make_eventfd()
        os.dup2(event, fds.call_fd, inheritable=False)
        os.close(event)
        fds.direct = False
        if fds.running is not None:
            self._watch(queue)

    # --- internals

    def _pairs(self) -> Iterator[tuple[QueueSetup, _Descriptors]]:
        return zip(self._queues, self._descriptors, strict=True)

    def _update_all(self) -> None:
        for queue in self._queues:
            self._update(queue)

    def _update(self, queue: QueueSetup, *, waits: bool = False) -> None:
        """Start or stop the queue as its state demands.

        ``waits``: a ring outside of memory is no failure, the queue waits for other memory.
        """
        fds = self._descriptors[queue.index]
        if fds.running is not None and not (
            queue.enabled and self._live and self._memory is not None
        ):
            fds.running = None
            queue.running = False
            self.changed.add(queue.index)
            queue.position = self._device.stop_queue(queue.index)
            self._unwatch(queue)
        try:
            self._start_if_wanted(queue)
        except (Error, OSError) as error:
            if not (waits and isinstance(error, AddressError)):
                self._fail(queue, error)

    def _fail(self, queue: QueueSetup, error: Exception) -> None:
        queue.failed = True
        self.changed.add(queue.index)
        self._failed(queue.index, error)

    def _start_if_wanted(self, queue: QueueSetup) -> None:
        memory = self._memory
        fds = self._descriptors[queue.index]
        wanted = queue.enabled and self._live and not queue.failed
        if fds.running is not None or not wanted or memory is None:
            return
        areas = (queue.descriptor_area, queue.driver_area, queue.device_area)
        name = f"queue {queue.index}"
        features = self._state.features
        ring = make_queue(
            memory,
            queue.size,
            areas,
            features,
            index=queue.position,
            name=name,
            record=None if self._records is None else self._records[queue.index],
            resume=queue.index in self._resumes,
        )
        if fds.call_fd < 0:
            fds.call_fd = make_eventfd()
        running = RunningQueue(ring, self._kick_fd(fds), fds.call_fd)
        self._watch(queue)
        try:
            self._device.start_queue(queue.index, running)
        except BaseException:
            self._unwatch(queue)
            raise
        fds.running = ring
        queue.running = True
        self._resumes.discard(queue.index)
        self.changed.add(queue.index)

    def _watch(self, queue: QueueSetup) -> None:
        fds = self._descriptors[queue.index]
        if not fds.direct:
            loop = asyncio.get_running_loop()
            loop.add_reader(fds.call_fd, self._call_waits, queue.index)

    def _unwatch(self, queue: QueueSetup) -> None:
        fds = self._descriptors[queue.index]
        if not fds.direct and fds.call_fd >= 0:
            asyncio.get_running_loop().remove_reader(fds.call_fd)

    def _call_waits(self, index: int) -> None:
        if drain(self._descriptors[index].call_fd) is Drained.READ:
            self._called(index)

    def _drain(self, queue: QueueSetup) -> None:
        """Drop pending calls, which were about the old ring. Kicks are never read."""
        fds = self._descriptors[queue.index]
        if fds.call_fd >= 0 and not fds.direct:
            drain(fds.call_fd)
