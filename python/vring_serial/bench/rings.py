"""The rings alone: what a chain costs, driver and device in one thread, with nothing around it.

This measures instructions, not transport: it says nothing about processes that wait for each other.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import numpy as np

from vring import (
    Batch,
    GuestMemory,
    PackedDriver,
    PackedQueue,
    Region,
    SplitDriver,
    SplitQueue,
)
from vring_serial.bench.measure import Settings, Step
from vring_serial.bench.results import Result

#: Descriptors of the ring, all of which are in flight.
SIZE = 256
#: Bytes of a buffer.
SLOT = 64
BASE = 1 << 20
#: Rounds of a sample, each of a ring full of chains.
ROUNDS = 200


class RingRig:
    """A driver and a device of one ring.

    Attributes:
        driver, queue: the two sides.
    """

    def __init__(self, *, packed: bool) -> None:
        driver, queue = (PackedDriver, PackedQueue) if packed else (SplitDriver, SplitQueue)
        desc, avail, used = driver.layout(SIZE)
        at = [BASE, BASE + desc, BASE + 4096 * (-(-(desc + avail) // 4096))]
        buffers = at[2] + 4096 * (-(-used // 4096))
        data = bytearray(buffers - BASE + SIZE * SLOT)
        memory = GuestMemory([Region(BASE, data)])
        self.driver = driver(memory, SIZE, *at, event_idx=True)
        self.queue = queue(memory, SIZE, *at, event_idx=True)
        self._addresses = buffers + SLOT * np.arange(SIZE, dtype=np.uint64)
        self._lengths = np.full(SIZE, SLOT, np.uint32)

    def fill(self) -> None:
        """Make a ring full of chains available."""
        self.driver.add_many(self._addresses, self._lengths, False)
        self.driver.publish()

    def drain(self, batch: int, use: Callable[[Batch], object]) -> None:
        """Pop and complete all of them, in batches."""
        pop, push = self.queue.pop_many, self.queue.push_many
        for _ in range(SIZE // batch):
            chains = pop(batch)
            use(chains)
            push(chains)

    def drain_one_by_one(self) -> None:
        """The same by the calls for single chains."""
        pop, push = self.queue.pop, self.queue.push
        while (chain := pop()) is not None:
            push(chain)


def _nothing(_: Batch) -> None:
    """The chains are not looked into."""


def measure(work: Callable[[], None], before: Callable[[], object], samples: int) -> list[float]:
    """Nanoseconds per chain of ``work``, which takes a ring full; ``before`` is not counted."""
    found = []
    for _ in range(samples):
        spent = 0
        for _ in range(ROUNDS):
            before()
            start = time.perf_counter_ns()
            work()
            spent += time.perf_counter_ns() - start
        found.append(spent / ROUNDS / SIZE)
    return found


def ring_results(samples: int, *, packed: bool) -> Iterator[Result]:
    """Chains through a ring: the device's side by batches and singly, the driver's side."""
    rig = RingRig(packed=packed)

    def result(what: str, found: list[float]) -> Result:
        return Result("rings", what, "packed" if packed else "split", 1, SLOT, "ns", found)

    def refill() -> None:
        rig.driver.get_used()
        rig.fill()

    for batch in (1, 16, SIZE):
        for what, use in (("pop and push", _nothing), ("pop, gather and push", Batch.gather)):
            found = measure(functools.partial(rig.drain, batch, use), refill, samples)
            yield result(f"{what}, batches of {batch}", found)
    yield result("pop and push, single chains", measure(rig.drain_one_by_one, refill, samples))
    rig.driver.get_used()
    rig.fill()
    found = measure(refill, functools.partial(rig.drain, SIZE, _nothing), samples)
    yield result("driver: add and get used", found)


def ring_steps(settings: Settings) -> Iterator[Step]:
    """One step for each kind of ring."""
    for ring in settings.rings:
        run = functools.partial(ring_results, settings.rounds, packed=ring == "packed")
        yield Step(f"{ring} ring, one thread", 8, run)
