"""A virtqueue that a transport has set running, with the descriptors that announce work on it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from vring import SplitQueue


@dataclass(frozen=True, slots=True)
class RunningQueue:
    """What a transport hands the controller when a queue starts.

    Both descriptors belong to the transport and stay open until the controller's ``stop_queue`` for
    this index has returned.

    Attributes:
        queue: the device's side of the ring. Only one thread touches it at a time.
        kick_fd: eventfd that is readable when the driver made buffers available.
        call_fd: descriptor to write 8 bytes (a native uint64 of 1) to when the driver wants to know
            of used buffers: an eventfd or a socket; -1 if the driver polls.
    """

    queue: SplitQueue
    kick_fd: int
    call_fd: int

    def call(self) -> None:
        """Tell the driver. A full eventfd or socket buffer means that it has been told already."""
        if self.call_fd >= 0:
            try:
                os.write(self.call_fd, b"\x01\0\0\0\0\0\0\0")
            except (BlockingIOError, BrokenPipeError, ConnectionError):
                return
