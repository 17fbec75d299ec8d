"""One virtqueue from the driver's side, and the buffers that go round in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vring import Drained, PackedDriver, SplitDriver, drain, layout, notify
from vring.errors import RingError
from vring_serial import unix_fds
from vring_serial.guest.errors import BackendError
from vring_serial.guest.memory import PAGE, GuestRam

#: Flags AVAIL and USED of a packed descriptor (2.8.1): both are the wrap counter if it is used.
_PACKED_USED = 1 << 7 | 1 << 15
_NONE: npt.NDArray[np.uint32] = np.empty(0, np.uint32)


class DriverQueue:
    """A virtqueue in guest RAM with its two eventfds.

    Attributes:
        index: number of the queue.
        size: descriptors.
        desc, avail, used: guest addresses of the three parts; of a packed ring, the descriptor
            ring and the event suppression of driver and device.
        ring: the driver's side.
        broken: what the device did to the ring, or None.
        on_broken: told so.
        kick_fd: eventfd that tells the device of available buffers.
        call_fd: eventfd by which the device tells of used ones.
    """

    def __init__(
        self, index: int, ram: GuestRam, size: int, *, event_idx: bool, packed: bool = False
    ) -> None:
        """Lay out an empty ring of ``size`` descriptors. Raises GuestMemoryError."""
        driver = PackedDriver if packed else SplitDriver
        self.index = index
        self.size = size
        desc_bytes, avail_bytes, used_bytes = driver.layout(size)
        self.desc = ram.allocate(desc_bytes, layout.DESC_ALIGN)
        self.avail = ram.allocate(avail_bytes, max(layout.AVAIL_ALIGN, layout.EVENT_ALIGN))
        self.used = ram.allocate(used_bytes, max(layout.USED_ALIGN, layout.EVENT_ALIGN))
        self.ring: PackedDriver | SplitDriver = driver(
            ram.memory,
            size,
            self.desc,
            self.avail,
            self.used,
            event_idx=event_idx,
            name=f"queue {index}",
        )
        self._ram = ram
        self.kick_fd = unix_fds.make_eventfd()
        self.call_fd = unix_fds.make_eventfd()
        self.broken: Exception | None = None
        self.on_broken: Callable[[Exception], None] | None = None
        self._called: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def base(self) -> int:
        """Where a device is to begin, as SET_VRING_BASE wants it: behind the last used buffer.

        While a device has the ring, this is only where it was a moment ago.
        """
        if isinstance(self.ring, SplitDriver):
            view = self._ram.view(self.used + layout.USED_INDEX, 2)
            return int.from_bytes(view, "little")
        index = self._packed_used_index(self.ring)
        return index | index << 16  # the available and the used one

    def _packed_used_index(self, ring: PackedDriver) -> int:
        """Return where the device marks its next used buffer (2.8.1), with the wrap counter.

        The ring says it alone of buffers that the driver has not taken back. Every chain of ours
        has one descriptor.
        """
        index, wrap = ring.used_index & ~layout.WRAP, ring.used_index & layout.WRAP
        descriptors = self._ram.view(self.desc, self.size * layout.DESC_SIZE)
        for _ in range(self.size):
            at = index * layout.DESC_SIZE + layout.PACKED_FLAGS
            flags = int.from_bytes(descriptors[at : at + 2], "little")
            if flags & _PACKED_USED != (_PACKED_USED if wrap else 0):
                break
            index += 1
            if index == self.size:
                index, wrap = 0, wrap ^ layout.WRAP
        return index | wrap

    def listen(self, called: Callable[[], None]) -> None:
        """Have ``called`` run whenever the device notifies."""
        self._called = called
        self.listen_again()

    def listen_again(self) -> None:
        """As before :meth:`unlisten`."""
        if self.call_fd >= 0:
            self._loop.add_reader(self.call_fd, self._call)

    def unlisten(self) -> None:
        """Leave notifications to whoever waits for ``call_fd``."""
        self._loop.remove_reader(self.call_fd)

    def _call(self) -> None:
        # The device's process has both eventfds too, and may make them block: see vring.notify.
        if drain(self.call_fd) is Drained.READ and self._called is not None:
            self._called()

    # Whatever the device breaks is found here. The queue is dead from then on: it looks empty and
    # full at once, and ``on_broken`` is told, once and not before its caller is done.

    def _break(self, error: Exception) -> None:
        if self.broken is None:
            self.broken = error
            if self.on_broken is not None:
                self._loop.call_soon(self.on_broken, error)

    def refuse(self, cause: str) -> None:
        """Refuse a buffer that the device used in a way which its user cannot accept."""
        self._break(BackendError(f"queue {self.index}: {cause}"))

    def add(self, address: int, length: int, *, writable: bool) -> int:
        """Put one buffer into the ring, which must have room for it; returns its head."""
        buffer = ((address, length),)
        return self.ring.add((), buffer) if writable else self.ring.add(buffer, ())

    def publish(self) -> None:
        """Make the added chains available and kick the device if it wants that."""
        if self.broken is None:
            try:
                if self.ring.publish():
                    self.kick()
            except RingError as error:
                self._break(BackendError(str(error)))

    def get_used(self, limit: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
        """Heads that the device has used, at most ``limit`` (0: all), and the bytes it wrote."""
        if self.broken is None:
            try:
                return self.ring.get_used(limit)
            except RingError as error:
                self._break(BackendError(str(error)))
        return _NONE, _NONE

    def enable_notifications(self) -> bool:
        """Ask to be notified of used buffers; True: there are some already, go on working."""
        return self.broken is None and self.ring.enable_notifications()

    def disable_notifications(self) -> None:
        """Ask not to be notified."""
        if self.broken is None:
            self.ring.disable_notifications()

    def kick(self) -> None:
        """Tell the device. A full eventfd means that it has been told already."""
        notify(self.kick_fd)

    def close(self) -> None:
        """Stop listening and close both eventfds. Safe to call twice."""
        if self.call_fd >= 0:
            self._loop.remove_reader(self.call_fd)
            unix_fds.close_all((self.kick_fd, self.call_fd))
            self.kick_fd = self.call_fd = -1


class Buffers:
    """Equal buffers, side by side in guest RAM, each a chain of one descriptor in the ring.

    Attributes:
        queue: whose.
        count, size: how many buffers, and bytes of each.
        address: guest address of the first.
        in_flight: buffers that the device has.
    """

    def __init__(self, queue: DriverQueue, ram: GuestRam, count: int, size: int) -> None:
        """Allocate ``count`` buffers of ``size`` bytes. Raises GuestMemoryError."""
        self.queue = queue
        self.count = count
        self.size = size
        self.in_flight = 0
        self.address = ram.allocate(count * size, PAGE if size >= PAGE else 64)
        self._view = ram.view(self.address, count * size)
        #: Which buffer each head stands for. Ours alone: the device cannot write here.
        self._slot_of = np.zeros(queue.size, np.int64)

    def _take_used(self, limit: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Buffers that the device has used, and the bytes it wrote."""
        heads, lengths = self.queue.get_used(limit)
        self.in_flight -= len(heads)
        return self._slot_of[heads], lengths


class ReceiveBuffers(Buffers):
    """Buffers for the device to fill."""

    def fill(self) -> None:
        """Give the device every buffer that the ring has room for; at the start, once."""
        room = min(self.count, self.queue.ring.num_free)
        self.give_back(np.arange(room, dtype=np.int64))

    def give_back(self, slots: npt.NDArray[np.int64]) -> None:
        """Make buffers available that hold nothing of interest any more."""
        queue = self.queue
        if queue.broken is not None:
            return
        for slot in slots.tolist():
            head = queue.add(self.address + slot * self.size, self.size, writable=True)
            self._slot_of[head] = slot
        self.in_flight += len(slots)
        self.queue.publish()

    def take(self, limit: int = 0) -> tuple[npt.NDArray[np.int64], list[memoryview]]:
        """Take used buffers, ``limit`` at most (0: all), and what the device wrote into each.

        The views are of guest memory, which the device can still write to: copy them once, and only
        then :meth:`give_back` the buffers.
        """
        slots, lengths = self._take_used(limit)
        if len(slots) == 0:
            return slots, []
        longest = int(lengths.max())
        if longest > self.size:
            self.queue.refuse(f"{longest} bytes written into a buffer of {self.size}")
            return slots[:0], []
        view = self._view
        starts = (slots * self.size).tolist()
        return slots, [
            view[start : start + length]
            for start, length in zip(starts, lengths.tolist(), strict=True)
        ]


class TransmitBuffers(Buffers):
    """Buffers for the device to read."""

    def __init__(self, queue: DriverQueue, ram: GuestRam, count: int, size: int) -> None:
        super().__init__(queue, ram, count, size)
        self._free = list(range(count - 1, -1, -1))
        queue.disable_notifications()

    def send(self, data: memoryview) -> int:
        """Copy as much of ``data`` as there is room for, and make it available.

        Returns the bytes accepted, each buffer holding as many as it can.
        """
        size, view, queue = self.size, self._view, self.queue
        if queue.broken is not None:
            return 0
        if len(self._free) * size < len(data):
            self.reclaim()
        sent = 0
        while sent < len(data) and self._free:
            piece = data[sent : sent + size]
            slot = self._free.pop()
            start = slot * size
            view[start : start + len(piece)] = piece
            head = queue.add(self.address + start, len(piece), writable=False)
            self._slot_of[head] = slot
            self.in_flight += 1
            sent += len(piece)
        if sent:
            queue.publish()
        return sent

    def reclaim(self) -> int:
        """Take back the buffers that the device has read; returns how many."""
        slots, _ = self._take_used(0)
        self._free.extend(slots.tolist())
        return len(slots)

    def wait_used(self) -> bool:
        """Ask for a notification when buffers are used; True: some are already, go on working."""
        return self.queue.enable_notifications()
