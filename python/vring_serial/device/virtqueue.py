"""A virtqueue that a transport has set running, with the descriptors that announce work on it."""

from __future__ import annotations

from dataclasses import dataclass

from vring import GuestMemory, PackedQueue, SplitQueue, VirtQueue, layout, notify
from vring_serial.proto.virtio import Feature

#: ``avail_index`` of a packed ring that is fresh: the wrap counter stands at 1.
FRESH_PACKED_INDEX = layout.WRAP


def make_queue(
    memory: GuestMemory,
    size: int,
    areas: tuple[int, int, int],
    features: int,
    *,
    index: int | None = None,
    used_index: int | None = None,
    name: str,
    record: memoryview | None = None,
    resume: bool = False,
) -> VirtQueue:
    """Make the device's side of a ring with the layout and abilities that were negotiated.

    Args:
        memory: the guest's.
        size: descriptors.
        areas: guest addresses of descriptor area, driver area and device area (2.6).
        features: those that the driver accepted.
        index: ``avail_index`` to go on from; None: the ring is fresh.
        used_index: likewise; None: the same, for nothing is in flight.
        name: for errors.
        record: see VirtQueue.
        resume: see VirtQueue.

    Raises:
        AddressError: an area is misaligned or not in one region of memory.
        LocalMisuseError: an impossible size or index.
    """
    kind = PackedQueue if features & Feature.RING_PACKED else SplitQueue
    return kind(
        memory,
        size,
        *areas,
        event_idx=bool(features & Feature.EVENT_IDX),
        indirect=bool(features & Feature.INDIRECT_DESC),
        in_order=bool(features & Feature.IN_ORDER),
        index=index,
        used_index=used_index,
        name=name,
        record=record,
        resume=resume,
    )


def is_fresh(queue: VirtQueue) -> bool:
    """Return whether the ring stands where it does before its first buffer."""
    return queue.avail_index == (FRESH_PACKED_INDEX if isinstance(queue, PackedQueue) else 0)


@dataclass(frozen=True, slots=True)
class RunningQueue:
    """What a transport hands the controller when a queue starts.

    Both descriptors belong to the transport and stay open until the controller's ``stop_queue`` for
    this index has returned.

    Attributes:
        queue: the device's side of the ring. Only one thread touches it at a time.
        kick_fd: eventfd that the driver writes to when it made buffers available. Others have it
            too: ServedQueue and the pump watch it for that and never read it.
        call_fd: descriptor to write 8 bytes (a native uint64 of 1) to when the driver wants to know
            of used buffers: an eventfd or a socket; -1 if the driver polls.
    """

    queue: VirtQueue
    kick_fd: int
    call_fd: int

    def call(self) -> None:
        """Tell the driver. A full eventfd or socket buffer means that it has been told already."""
        if self.call_fd >= 0:
            notify(self.call_fd)
