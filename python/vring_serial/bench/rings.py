"""The rings alone: what a chain costs, driver and device in one thread, with nothing around it.

This measures instructions, not transport: it says nothing about processes that wait for each other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from vring import Batch
from vring_serial.bench.measure import Settings, Step
from vring_serial.bench.results import Result
from vring_serial.bench.ring_work import (
    SIZE,
    RingWork,
    Use,
    in_batches,
    iterate_batch,
    iterate_queue,
    one_at_a_time,
    with_memoryview,
)

#: Bytes of a buffer.
SLOT = 64
#: Turns of a sample, each of a ring full of chains.
TURNS = 200


def _uses() -> Iterator[tuple[str, Use]]:
    for batch in (1, 16, SIZE):
        times = SIZE // batch
        yield f"pop and push, batches of {batch}", in_batches(times, batch)
        yield f"pop, gather and push, batches of {batch}", in_batches(times, batch, Batch.gather)
    yield "pop and push, single chains", one_at_a_time
    yield "for chain in queue", iterate_queue
    yield "for chain in batch", iterate_batch
    yield "the same, a memoryview each", with_memoryview


def ring_results(samples: int, *, packed: bool) -> Iterator[Result]:
    """Chains through a ring: the device's side by batches and singly, the driver's side."""

    def work() -> RingWork:
        return RingWork(packed=packed, event_idx=True, length=SLOT)

    def result(what: str, found: list[float]) -> Result:
        return Result("rings", what, "packed" if packed else "split", 1, SLOT, "ns", found)

    for what, use in _uses():
        ring = work()
        yield result(what, [ring.ns_per_chain(use, TURNS) for _ in range(samples)])
    ring = work()
    found = [ring.driver_ns_per_chain(TURNS) for _ in range(samples)]
    yield result("driver: add and get used", found)


def ring_steps(settings: Settings) -> Iterator[Step]:
    """One step for each kind of ring."""
    count = len(list(_uses())) + 1
    for ring in settings.rings:
        run = functools.partial(ring_results, settings.rounds, packed=ring == "packed")
        yield Step(f"{ring} ring, one thread", count, run)
