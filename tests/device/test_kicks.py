"""Kick descriptors in the event loop, whatever their other owner makes of them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from tests.support.leaks import held
from tests.support.waiting import turns
from vring_serial.device.kicks import KickWatch

MANY = 1 << 40


@pytest.fixture
def semaphore() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


async def test_a_semaphore_is_told_once(semaphore: int) -> None:
    told: list[int] = []
    watch = KickWatch(semaphore, lambda: told.append(1))
    for kicks in range(1, 4):
        os.eventfd_write(semaphore, MANY)
        await turns(100)
        assert len(told) == kicks
    watch.close()
    os.eventfd_write(semaphore, 1)
    await turns(100)
    assert len(told) == 3


async def test_what_was_written_before_is_told(semaphore: int) -> None:
    os.eventfd_write(semaphore, MANY)
    told: list[str] = []
    first = KickWatch(semaphore, lambda: told.append("first"))
    await turns(100)
    assert told == ["first"]
    # queues may share a descriptor
    second = KickWatch(semaphore, lambda: told.append("second"))
    await turns(100)
    assert told == ["first", "first", "second"]
    first.close()
    first.close()
    os.eventfd_write(semaphore, 1)
    await turns(100)
    assert told[3:] == ["second"]
    second.close()


async def test_what_one_raises_costs_another_nothing(semaphore: int) -> None:
    said: list[dict] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: said.append(context))
    told: list[int] = []
    other = os.eventfd(0)

    def broken() -> None:
        raise KeyError("broken")

    def whole() -> None:
        told.append(1)

    watches = [KickWatch(fd, kicked) for fd in (semaphore, other) for kicked in (broken, whole)]
    for fd in (semaphore, other):
        os.eventfd_write(fd, 1)
    await turns(100)
    assert told == [1, 1]
    assert [type(context["exception"]) for context in said] == [KeyError, KeyError]
    for watch in watches:
        watch.close()
    os.close(other)


async def test_a_watch_may_end_another_as_it_is_told(semaphore: int) -> None:
    told: list[int] = []
    watches: list[KickWatch] = []

    def kicked() -> None:
        told.append(1)
        for watch in watches:
            watch.close()

    watches += [KickWatch(semaphore, kicked)]
    os.eventfd_write(semaphore, 1)
    await turns(100)
    os.eventfd_write(semaphore, 1)
    await turns(100)
    assert told == [1]


async def test_descriptors_come_back(semaphore: int) -> None:
    before = held()
    for _ in range(3):
        closed = os.eventfd(0)
        copy = os.dup(closed)
        watches = [KickWatch(fd, lambda: None) for fd in (semaphore, closed)]
        os.close(closed)  # too early, and somebody else has it
        os.eventfd_write(copy, 1)
        await turns(100)
        for watch in watches:
            watch.close()
        os.close(copy)
    with pytest.raises(OSError, match="Bad file descriptor"):
        KickWatch(999_999, lambda: None)
    assert held() == before
