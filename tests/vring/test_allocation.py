"""A million chains allocate nothing, and what a queue takes is bounded by its size."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support.rings import DATA, Ring

SIZE = 256


def refilled(packed: bool) -> tuple[Any, Callable[[], None]]:
    """A full ring and a function that makes it full again, however the chains were used."""
    ring = Ring(size=SIZE, packed=packed, event_idx=True)
    at = np.full(SIZE, DATA, np.uint64)
    lengths = np.full(SIZE, 64, np.uint32)

    def refill() -> None:
        ring.driver.get_used()
        assert ring.driver.add_many(at, lengths, False) == SIZE
        ring.driver.publish()

    return ring.queue, refill


def batches(queue: Any) -> None:
    while batch := queue.pop_many():
        queue.push_many(batch)


def singles(queue: Any) -> None:
    while chain := queue.pop():
        queue.push(chain)


def iteration(queue: Any) -> None:
    for _ in queue:
        pass


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("work", [batches, singles, iteration])
def test_a_million_chains_allocate_nothing(packed: bool, work: Callable[[Any], None]) -> None:
    queue, refill = refilled(packed)
    rounds = 1_000_000 // SIZE + 1
    for _ in range(3):
        refill()
        work(queue)
    gc.collect()
    tracemalloc.start(8)
    try:
        grown = 0
        for _ in range(rounds):
            refill()
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            work(queue)
            grown = max(grown, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    # frames and ints of the loop itself, but no Batch, Chain or table
    assert grown < 256, f"{grown} bytes at the peak of a round of {SIZE} chains"


@pytest.mark.parametrize("size", [16, 256, 4096])
def test_the_footprint_is_bounded_by_the_size(size: int) -> None:
    """Two batches: chain rows of 24 bytes and written lengths of 4 per descriptor, and segments of
    16 bytes, 1024 or the queue's size of them."""
    tracemalloc.start()
    try:
        ring = Ring(size=size)
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(5):
            ring.chain(1)
            batch = ring.queue.pop_many()
            ring.queue.push_many(batch)
            ring.driver.get_used()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert taken <= 2 * (28 * size + 16 * max(1024, size)) + 4096
