"""The rings alone: the time per chain, with driver and device in one thread.

This measures instructions, not transport: waiting between processes is not included.
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

#: Size of a buffer in bytes.
SLOT = 64
#: Turns per sample, each with a ring full of chains.
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
    """Measure the device's side, in batches and one by one, and the driver's side."""

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
    """Yield one step for each kind of ring."""
    count = len(list(_uses())) + 1
    for ring in settings.rings:
        run = functools.partial(ring_results, settings.rounds, packed=ring == "packed")
        yield Step(f"{ring} ring, one thread", count, run)
