"""A barrier for the pump's thread."""

from __future__ import annotations

import os
import socket

from tests.support.waiting import DEADLINE, wait_until
from vring import Pump
from vring.testing import GuestQueue


def pump_turn(pump: Pump) -> None:
    """Return when the pump has seen all that happened before: bytes went through it since."""
    size, slot = 4, 16
    memory = bytearray(GuestQueue.bytes_needed(size, slot))
    guest = GuestQueue(memory, size, slot, writable=False)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(DEADLINE)
    kick_fd, call_fd = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    with ours, theirs:
        flow = pump.guest_to_host(
            guest.device_queue("barrier"),
            write_fd=ours.fileno(),
            kick_fd=kick_fd,
            call_fd=call_fd,
            on_event=lambda event, detail: None,
        )
        try:
            for _ in range(2):  # the first may come in a turn that had begun already
                if guest.send(b"x", [1]):
                    os.eventfd_write(kick_fd, 1)
                assert theirs.recv(1) == b"x"
                wait_until(lambda: len(guest.collect()))
        finally:
            flow.detach()
            os.close(kick_fd)
            os.close(call_fd)
