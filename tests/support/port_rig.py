"""Two directions of a port with the driver of their rings, attached to a pump."""

from __future__ import annotations

import os
import select
from typing import Any

import numpy as np

from tests.support.waiting import DEADLINE
from vring import Flow, FlowEvent, Pump
from vring.testing import GuestQueue


class PortRig:
    """One direction of a port, with the guest's side in the caller's hands."""

    def __init__(
        self, pump: Pump, *, size: int = 64, slot: int = 4096, index: int = 0, **options: bool
    ) -> None:
        self.pump = pump
        data = np.zeros(GuestQueue.bytes_needed(size, slot), np.uint8).data
        self.guest = GuestQueue(data, size, slot, index=index, **options)
        self.driver = self.guest.driver
        self.queue = self.guest.device_queue("port 1")
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.events: list[tuple[FlowEvent, object]] = []
        self.flow: Flow | None = None

    def notifiers(self) -> dict[str, Any]:
        return {
            "kick_fd": self.kick_fd,
            "call_fd": self.call_fd,
            "on_event": lambda event, detail: self.events.append((event, detail)),
        }

    def write_to(self, fd: int, **options: object) -> Flow:
        self.flow = self.pump.guest_to_host(
            self.queue, write_fd=fd, **{**self.notifiers(), **options}
        )
        return self.flow

    def read_from(self, fd: int, **options: object) -> Flow:
        self.flow = self.pump.host_to_guest(
            self.queue, read_fd=fd, **{**self.notifiers(), **options}
        )
        return self.flow

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    def send(self, data: bytes, lengths: list[int] | None = None) -> None:
        """All of `data`, as Linux would: buffers, then a kick if the device wants one."""
        if self.guest.send(data, lengths or [len(data)]):
            self.kick()

    def offer(self, count: int | None = None, length: int | None = None) -> None:
        if self.guest.offer(count, length):
            self.kick()

    def publish(self) -> None:
        """For chains added to the driver itself."""
        if self.driver.publish():
            self.kick()

    def wait_call(self, timeout: float = DEADLINE) -> None:
        assert select.select([self.call_fd], [], [], timeout)[0], "no call"
        os.eventfd_read(self.call_fd)

    def wait_used(self, chains: int, timeout: float = DEADLINE) -> list[int]:
        """Written lengths of the next chains used; sleeps on the call descriptor, as a guest."""
        lengths = list(self.guest.collect())
        while len(lengths) < chains:
            if not self.driver.enable_notifications():
                self.wait_call(timeout)
            lengths += list(self.guest.collect())
        assert len(lengths) == chains
        return lengths

    def receive(self, length: int, timeout: float = DEADLINE) -> bytes:
        """The next bytes; buffers go back to the device at once."""
        received = b""
        while len(received) < length:
            piece = self.guest.receive()
            if piece:
                received += piece
                self.offer()
            elif not self.driver.enable_notifications():
                self.wait_call(timeout)
        assert len(received) == length
        return received

    def wait_event(self, timeout: float = DEADLINE) -> tuple[FlowEvent, object]:
        """The next event."""
        if not self.events:
            assert select.select([self.pump.event_fd], [], [], timeout)[0], "no event"
            self.pump.dispatch()
        return self.events.pop(0)

    def close(self) -> None:
        if self.flow is not None:
            self.flow.detach()
        os.close(self.kick_fd)
        os.close(self.call_fd)
