"""Small virtio devices: one that echoes, one whose queues the pump has."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress

from vring import (
    Flow,
    Pump,
    RingError,
)
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.errors import LocalProtocolError, RemoteProtocolError

NEEDS_RESET = 64
FEATURES = 1 << 32 | 1 << 29 | 1 << 28


class EchoDevice:
    """Writes what a chain's driver wrote into the same chain, and keeps what it was told.

    Attributes:
        holds: leaves chains in the rings.
        serves_on_start: looks for chains when a queue starts, too; else only when it is kicked.
    """

    name = "echo"
    device_id = 42
    device_features = FEATURES
    num_queues = 4
    queue_size_max = 1024
    config_size = 12
    config_generation = 0

    def __init__(self) -> None:
        self.on_config_change: Callable[[], None] | None = None
        self.on_needs_reset: Callable[[RingError], None] | None = None
        self.status = 0
        self.holds = False
        self.serves_on_start = True
        self.config = bytearray(range(12))
        self.told: list[tuple[object, ...]] = []
        self.running: dict[int, RunningQueue] = {}
        self.echoed: list[bytes] = []

    def set_status(self, status: int) -> None:
        self.told.append(("status", status))
        self.status = status | self.status & NEEDS_RESET

    def set_driver_features(self, bits: int) -> None:
        if bits & ~FEATURES:
            raise RemoteProtocolError(f"features {bits & ~FEATURES:#x} were not offered")
        self.told.append(("features", bits))

    def read_config(self, offset: int, length: int) -> bytes:
        return bytes(self.config[offset : offset + length]).ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        self.told.append(("config", offset, data))

    def start_queue(self, index: int, queue: RunningQueue) -> None:
        if index in self.running:
            raise LocalProtocolError(f"queue {index} runs already")
        self.told.append(("start", index, queue.queue.avail_index))
        self.running[index] = queue
        asyncio.get_running_loop().add_reader(queue.kick_fd, self._kicked, index)
        if self.serves_on_start:
            self.serve(index)

    def stop_queue(self, index: int) -> int:
        queue = self.running.pop(index)
        asyncio.get_running_loop().remove_reader(queue.kick_fd)
        self.told.append(("stop", index, queue.queue.avail_index))
        return queue.queue.avail_index

    def reset_queue(self, index: int) -> None:
        self.told.append(("reset queue", index))

    def reset(self) -> None:
        for index in list(self.running):
            self.stop_queue(index)
        self.told.append(("reset",))
        self.status = 0

    def _kicked(self, index: int) -> None:
        with suppress(BlockingIOError):
            os.read(self.running[index].kick_fd, 8)
        self.serve(index)

    def serve(self, index: int) -> None:
        if self.holds:
            return
        running = self.running[index]
        try:
            again = True
            while again:
                running.queue.disable_notifications()
                while (chain := running.queue.pop()) is not None:
                    self.echoed.append(chain.read())
                    written = chain.write(self.echoed[-1])
                    if running.queue.push(chain, written):
                        running.call()
                again = running.queue.enable_notifications()
        except RingError as error:
            self.status |= NEEDS_RESET
            asyncio.get_running_loop().remove_reader(running.kick_fd)
            if self.on_needs_reset is not None:
                self.on_needs_reset(error)


class PumpedDevice(EchoDevice):
    """Takes what drivers write, in the pump's thread."""

    name = "pumped"

    def __init__(self) -> None:
        super().__init__()
        self.pump = Pump()
        self._flows: dict[int, Flow] = {}

    def start_queue(self, index: int, queue: RunningQueue) -> None:
        self._flows[index] = self.pump.guest_to_host(
            queue.queue,
            write_fd=-1,
            kick_fd=queue.kick_fd,
            call_fd=queue.call_fd,
            on_event=lambda event, detail: None,
            lossy=True,  # a console's driver is called for each chain
        )

    def stop_queue(self, index: int) -> int:
        flow = self._flows.pop(index)
        flow.detach()
        return flow.queue.avail_index

    def reset(self) -> None:
        for index in list(self._flows):
            self.stop_queue(index)
        self.status = 0

    def close(self) -> None:
        self.reset()
        self.pump.close()
