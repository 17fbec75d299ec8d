"""The rings, next to a plain C loop of our own that does the same work (ring_loop.c).

Every figure is ns per chain, measured in turns with the C loop in the same run (medians), and its
ratio to it. The C loop is compiled when the benchmark runs, with the flags of the extensions, and
kept under build/. The Python side's refill (one store into the available index) is timed alone and
taken off; the C loop's is inside its figure.

    python -m pytest benchmarks/test_ring.py --benchmark-only -s
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vring import GuestMemory, PackedDriver, PackedQueue, Region, SplitDriver, SplitQueue

HERE = Path(__file__).parent
SIZE, PAGE = 256, 4096
BASE = 0x100000
RINGS = 16 * PAGE  # bytes before the buffers in the first region
TABLES = 8 * PAGE
ROUNDS, BATCHES = 30, 60
RESULTS: list[tuple[str, float, float | None, str]] = []


class CRegion(ctypes.Structure):
    _fields_ = (("guest", ctypes.c_uint64), ("size", ctypes.c_uint64), ("host", ctypes.c_void_p))


class CRing(ctypes.Structure):
    _fields_ = (
        ("regions", ctypes.c_void_p),
        ("n_regions", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("desc", ctypes.c_void_p),
        ("avail", ctypes.c_void_p),
        ("used", ctypes.c_void_p),
        ("event_idx", ctypes.c_uint64),
        ("next_avail", ctypes.c_uint64),
        ("next_used", ctypes.c_uint64),
        ("avail_wrap", ctypes.c_uint64),
        ("used_wrap", ctypes.c_uint64),
        ("copy_to", ctypes.c_void_p),
        ("notifications", ctypes.c_uint64),
        ("checksum", ctypes.c_uint64),
    )


@pytest.fixture(scope="module")
def c_loop() -> ctypes.CDLL:
    source = HERE / "ring_loop.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    library = HERE.parent / "build" / f"ring_loop-{digest}.so"
    library.parent.mkdir(exist_ok=True)
    if not library.exists():
        flags = ["-std=gnu11", "-O3", "-fwrapv", "-DNDEBUG", "-Wall", "-fPIC", "-shared"]
        subprocess.run(["cc", *flags, "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Prints all figures at the end; see them with -s or in the summary of a failure."""
    yield
    print(f"\n{'workload':58} {'ns/chain':>9} {'ratio':>6}  goal")
    for name, ns, ratio, goal in RESULTS:
        print(f"{name:58} {ns:9.2f} {'' if ratio is None else f'{ratio:6.2f}':>6}  {goal}")


class Work:
    """One ring that is full again after a store into the index, for both languages."""

    def __init__(
        self, descriptors: int = 1, *, indirect: bool = False, regions: int = 1,
        event_idx: bool = False, packed: bool = False,
    ) -> None:  # fmt: skip
        self.packed = packed
        per = (8 << 20) // regions
        raw = [np.zeros(per + PAGE, np.uint8) for _ in range(regions)]
        self.arrays = [a[-a.ctypes.data % PAGE :][:per] for a in raw]
        guests = [BASE + 2 * per * i for i in range(regions)]
        pairs = list(zip(guests, self.arrays, strict=True))
        self.memory = GuestMemory([Region(at, array) for at, array in pairs])
        parts = BASE, BASE + PAGE, BASE + 2 * PAGE
        features = {"event_idx": event_idx, "indirect": True}
        driver = (PackedDriver if packed else SplitDriver)(self.memory, SIZE, *parts, **features)
        self.chains = SIZE if indirect or descriptors == 1 else SIZE // descriptors
        for i in range(self.chains):
            buffers = []
            for n in range(i * descriptors, (i + 1) * descriptors):
                offset = RINGS + TABLES * 64 + n // regions * PAGE % (per // 4)
                buffers.append((guests[n % regions] + offset % (per - PAGE), PAGE))
            table_at = BASE + RINGS + 16 * descriptors * i
            driver.add(buffers, [], indirect_at=table_at if indirect else None)
        driver.publish()
        kind = PackedQueue if packed else SplitQueue
        self.queue: Any = kind(self.memory, SIZE, *parts, **features)
        host = self.arrays[0].ctypes.data
        self._regions = (CRegion * regions)(*(CRegion(at, per, a.ctypes.data) for at, a in pairs))
        self.ring = CRing(
            ctypes.cast(self._regions, ctypes.c_void_p), regions, SIZE, host, host + PAGE,
            host + 2 * PAGE, event_idx, 0, 0, 1, 1, None, 0, 0,
        )  # fmt: skip
        self.index = self.memory.view(BASE + PAGE, 4).cast("H")
        # The second words of packed descriptors: length, id, flags. Using overwrites all of them.
        self.words = np.frombuffer(self.memory.view(BASE, 16 * SIZE), np.uint64)[1::2]
        neither = self.words & np.uint64(0x7F7F_FFFF_FFFF_FFFF)  # AVAIL nor USED
        self._available = [neither | np.uint64(flags << 48) for flags in (0x8000, 0x80)]

    def refill(self) -> None:
        """Makes every chain available again."""
        if self.packed:
            wrap = self.ring.avail_wrap if self.turn == "c" else self.queue.avail_index >> 15
            self.words[:] = self._available[wrap]
        else:
            self.index[1] = (self.index[1] + self.chains) & 0xFFFF

    turn = "c"

    def c(self, library: ctypes.CDLL) -> float:
        """ns per chain of the C loop."""
        self.turn = "c"
        if not self.packed:
            start = time.perf_counter_ns()
            assert library.split_run(ctypes.byref(self.ring), BATCHES, self.chains) == 0
            return (time.perf_counter_ns() - start) / BATCHES / self.chains
        total = 0
        for _ in range(BATCHES):
            self.refill()
            start = time.perf_counter_ns()
            failed = library.packed_run(ctypes.byref(self.ring), 1, self.chains)
            total += time.perf_counter_ns() - start
            assert failed == 0
        return total / BATCHES / self.chains

    def python(self, work: Callable[[Any], None]) -> float:
        """ns per chain of `work`, which uses up what is available; without the refill."""
        self.turn = "python"
        if self.packed:
            total = 0
            for _ in range(BATCHES):
                self.refill()
                start = time.perf_counter_ns()
                work(self.queue)
                total += time.perf_counter_ns() - start
            return total / BATCHES / self.chains
        self.index[1] = self.queue.avail_index
        start = time.perf_counter_ns()
        for _ in range(BATCHES):
            self.refill()
            work(self.queue)
        full = time.perf_counter_ns() - start
        now = self.index[1]
        start = time.perf_counter_ns()
        for _ in range(BATCHES):
            self.refill()
            nothing(self.queue)
        refills = time.perf_counter_ns() - start
        self.index[1] = now
        return (full - refills) / BATCHES / self.chains


def nothing(queue: Any) -> None:
    pass


def compare(
    benchmark: Any,
    c_loop: ctypes.CDLL,
    name: str,
    work: Work,
    use: Callable[[Any], None],
    goal: str,
) -> None:
    gc.collect()
    gc.disable()
    c, python = [], []
    for _ in range(ROUNDS):
        c.append(work.c(c_loop))
        python.append(work.python(use))
    gc.enable()
    ns, loop = statistics.median(python), statistics.median(c)
    RESULTS.append((f"{name} [C loop {loop:.2f}]", ns, ns / loop, goal))
    benchmark.extra_info.update(ns_per_chain=ns, c_loop=loop, ratio=ns / loop, goal=goal)
    benchmark.pedantic(lambda: work.python(use), rounds=3)


def in_one_batch(queue: Any) -> None:
    queue.push_many(queue.pop_many())


def in_batches(times: int) -> Callable[[Any], None]:
    def use(queue: Any) -> None:
        for _ in range(times):
            queue.push_many(queue.pop_many())

    return use


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
@pytest.mark.parametrize("regions", [1, 8])
@pytest.mark.parametrize(
    ("descriptors", "indirect", "goal"),
    [(1, False, "<= 1.2"), (4, False, "<= 1.15"), (4, True, "<= 1.15"), (16, True, "<= 1.15")],
    ids=["1", "4", "indirect-4", "indirect-16"],
)
def test_split_batches(
    benchmark: Any, c_loop: ctypes.CDLL, descriptors: int, indirect: bool, goal: str, regions: int,
    event_idx: bool,
) -> None:  # fmt: skip
    work = Work(descriptors, indirect=indirect, regions=regions, event_idx=event_idx)
    kind = "indirect" if indirect else "direct"
    name = f"split {kind} {descriptors}, {regions} region(s), event_idx {event_idx}"
    use = in_batches(4) if descriptors == 16 else in_one_batch
    compare(benchmark, c_loop, name, work, use, goal)


@pytest.mark.parametrize("descriptors", [1, 4])
def test_packed_batches(benchmark: Any, c_loop: ctypes.CDLL, descriptors: int) -> None:
    work = Work(descriptors, packed=True)
    compare(benchmark, c_loop, f"packed {descriptors}", work, in_one_batch, "<= 1.2")


def iterate_queue(queue: Any) -> None:
    for _ in queue:
        pass


def one_at_a_time(queue: Any) -> None:
    pop, push = queue.pop, queue.push
    while (chain := pop()) is not None:
        push(chain)


def iterate_batch(queue: Any) -> None:
    batch = queue.pop_many()
    for _ in batch:
        pass
    queue.push_many(batch)


def with_memoryview(queue: Any) -> None:
    for chain in queue:
        chain.readable[0]


@pytest.mark.parametrize(
    ("name", "use", "goal"),
    [
        ("one chain at a time, fused (for chain in queue)", iterate_queue, "<= 49 ns"),
        ("one chain at a time, pop and push", one_at_a_time, "two calls"),
        ("iteration over a batch, with its pop and push", iterate_batch, "<= 20 ns"),
        ("one chain with a memoryview of its data", with_memoryview, "<= 100 ns"),
    ],
)
def test_objects(
    benchmark: Any, c_loop: ctypes.CDLL, name: str, use: Callable[[Any], None], goal: str
) -> None:
    compare(benchmark, c_loop, name, Work(event_idx=True), use, goal)


def test_copy_of_the_payload(benchmark: Any) -> None:
    """gather_into against one memcpy of the same bytes, for every alignment of the destination."""
    work = Work()
    source = work.arrays[0][RINGS + TABLES * 64 :][: SIZE * PAGE]
    raw = np.zeros(SIZE * PAGE + 2 * PAGE, np.uint8)
    aligned = raw[-raw.ctypes.data % PAGE :]
    work.index[1] = work.queue.avail_index
    work.refill()
    batch = work.queue.pop_many()
    memcpy = ctypes.CDLL(None).memcpy
    memcpy.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
    worst = 9.0
    source_at = source.ctypes.data
    figures = []
    for offset in [*range(0, 65, 3), 16, 32, 64, 128, 2048]:
        to = aligned[offset : offset + SIZE * PAGE]
        best: list[list[int]] = [[], []]
        for _ in range(7):
            for side, call in enumerate(
                (
                    lambda to=to.ctypes.data: memcpy(to, source_at, SIZE * PAGE),
                    lambda to=to: batch.gather_into(to),
                )
            ):
                start = time.perf_counter_ns()
                call()
                best[side].append(time.perf_counter_ns() - start)
        ratio = min(best[0]) / min(best[1])
        worst = min(worst, ratio)
        figures.append(SIZE * PAGE / min(best[1]))
    speed = f"{min(figures):.0f} to {max(figures):.0f} GB/s"
    RESULTS.append((f"gather_into, {speed}, share of memcpy at worst", 0, worst, ">= 0.95"))
    benchmark.extra_info.update(worst=worst, speed=speed)
    benchmark.pedantic(lambda: batch.gather_into(aligned[16:]), rounds=5)
