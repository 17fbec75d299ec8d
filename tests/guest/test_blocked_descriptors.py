"""Backends that make the guest's kick and call descriptors block under it."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.support.waiting import DEADLINE, turns
from vring_serial.guest.memory import GuestRam
from vring_serial.guest.queue import DriverQueue

FULL = 2**64 - 2


@pytest.fixture(autouse=True)
def time_limit(blocked_call_ends_the_run: None) -> None:
    """That one here: an exception does not end a call that blocks."""


@pytest.fixture
async def queue():
    ram = GuestRam(1 << 20)
    queue = DriverQueue(0, ram, 16, event_idx=True)
    yield queue
    queue.close()
    ram.close()


async def test_a_kick_that_cannot_be_written(queue: DriverQueue) -> None:
    os.set_blocking(queue.kick_fd, True)
    os.eventfd_write(queue.kick_fd, FULL)
    for _ in range(3):
        queue.kick()


async def test_a_call_that_is_gone_before_it_is_read(queue: DriverQueue) -> None:
    called = asyncio.Event()
    queue.listen(called.set)
    os.set_blocking(queue.call_fd, True)
    # Another one is told in the same turn of the loop, before the queue, and reads it.
    reading, writing = os.pipe()
    taken = asyncio.Event()

    def take() -> None:
        asyncio.get_running_loop().remove_reader(reading)
        os.eventfd_read(queue.call_fd)
        taken.set()

    asyncio.get_running_loop().add_reader(reading, take)
    os.write(writing, b"x")
    os.eventfd_write(queue.call_fd, 1)
    async with asyncio.timeout(DEADLINE):
        await taken.wait()
    await turns()
    os.close(reading)
    os.close(writing)
    assert not called.is_set()
    os.eventfd_write(queue.call_fd, 1)
    async with asyncio.timeout(DEADLINE):
        await called.wait()
