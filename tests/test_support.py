"""Helpers of the tests notice what they are there for."""

from __future__ import annotations

import asyncio
import mmap
import os
import threading

import pytest

from tests.support.leaks import held
from tests.support.waiting import until, wait_until


def test_what_is_not_closed_is_held() -> None:
    before = held()
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 1 << 16)
    with_descriptor = held()
    assert with_descriptor != before
    mapping = mmap.mmap(fd, 1 << 16)
    os.close(fd)
    assert held() != before
    assert held().mapped("memfd:guest") == before.mapped("memfd:guest") + 1
    mapping.close()
    assert held() == before


def test_threads_that_run_are_held() -> None:
    before, ends = held(), threading.Event()
    thread = threading.Thread(target=ends.wait)
    thread.start()
    assert held() != before
    ends.set()
    thread.join()
    assert held() == before


class Owner:
    """Holds a descriptor, and itself."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0)
        self.itself = self

    def __del__(self) -> None:
        os.close(self.fd)


def test_cycles_of_before_are_not_counted() -> None:
    before = held()
    Owner()
    assert held() == before


async def test_what_does_not_come_is_named() -> None:
    with pytest.raises(AssertionError, match="no answer"):
        await until(lambda: False, "no answer", timeout=0.01)
    with pytest.raises(AssertionError, match="not in time"):
        wait_until(lambda: False, timeout=0.01)


async def test_what_comes_ends_the_wait() -> None:
    came = asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, came.set)
    await until(came.is_set)
