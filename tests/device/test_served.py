"""Queues that are served in the event loop."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator

import pytest

from tests.support.waiting import turns, until
from vring import GuestMemory, Region, SplitDriver, SplitQueue
from vring_serial.device.served import Discarder
from vring_serial.device.virtqueue import RunningQueue

PARTS = (0x1000, 0x2000, 0x3000)


@pytest.fixture
def running() -> Iterator[RunningQueue]:
    kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
    memory = GuestMemory([Region(0, bytearray(0x10000))])
    yield RunningQueue(SplitQueue(memory, 16, *PARTS), kick_fd, -1)
    os.close(kick_fd)


async def test_who_has_stopped_is_freed_at_once_with_the_guests_memory(running: RunningQueue):
    """A cycle would keep the memory mapped until it is collected."""
    driver = SplitDriver(running.queue.memory, 16, *PARTS)
    gc.collect()
    gc.disable()
    try:
        discarder = Discarder(running, lambda error: pytest.fail(f"{error}"))
        driver.add([(0x4000, 16)], [])
        driver.publish()
        await until(lambda: driver.get_used()[0].size)
        is_there = weakref.ref(discarder)
        discarder.stop()
        del discarder
        await turns(1)  # what the loop still had of it is gone with its turn
        assert is_there() is None
    finally:
        gc.enable()
