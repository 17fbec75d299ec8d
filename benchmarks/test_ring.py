"""The rings, next to a plain C loop of our own that does the same work (ring_loop.c).

Every figure is ns per chain, measured in turns with the C loop in the same run (medians), and its
ratio to it; conftest.py prints them at the end. The C loop is compiled when the benchmark runs,
with the flags of the extensions, and kept under build/. The Python side's refill is timed alone and
taken off; the C loop's (one store into the available index) is inside its figure.

    python -m pytest benchmarks/test_ring.py --benchmark-only
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import statistics
import subprocess
import time
import timeit
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vring_serial.bench.ring_work import (
    BASE,
    DATA,
    PAGE,
    SIZE,
    RingWork,
    Use,
    in_batches,
    in_one_batch,
    iterate_batch,
    iterate_queue,
    one_at_a_time,
    with_memoryview,
)

HERE = Path(__file__).parent
ROUNDS, BATCHES = 30, 60


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


class Work(RingWork):
    """A ring that the C loop can work on as well."""

    def __init__(self, descriptors: int = 1, *, event_idx: bool = False, **kind: Any) -> None:
        super().__init__(descriptors, event_idx=event_idx, **kind)
        rows = [
            CRegion(guest, len(array), array.ctypes.data)
            for guest, array in zip(self.guests, self.arrays, strict=True)
        ]
        self._regions = (CRegion * len(rows))(*rows)
        host = self.arrays[0].ctypes.data
        self.ring = CRing(
            ctypes.cast(self._regions, ctypes.c_void_p), len(rows), SIZE, host, host + PAGE,
            host + 2 * PAGE, event_idx, 0, 0, 1, 1, None, 0, 0,
        )  # fmt: skip

    def c(self, library: ctypes.CDLL) -> float:
        """ns per chain of the C loop."""
        clock, ring = time.perf_counter_ns, ctypes.byref(self.ring)
        if not self.packed:
            start = clock()
            assert library.split_run(ring, BATCHES, self.chains) == 0
            return (clock() - start) / BATCHES / self.chains
        total = 0
        for _ in range(BATCHES):
            self.refill(self.ring.avail_wrap << 15)
            start = clock()
            failed = library.packed_run(ring, 1, self.chains)
            total += clock() - start
            assert failed == 0
        return total / BATCHES / self.chains


def compare(
    benchmark: Any,
    c_loop: ctypes.CDLL,
    name: str,
    work: Work,
    use: Use,
    *,
    ratio_at_most: float | None = None,
    ns_at_most: float | None = None,
) -> None:
    gc.collect()
    gc.disable()
    c, python = [], []
    for _ in range(ROUNDS):
        c.append(work.c(c_loop))
        python.append(work.ns_per_chain(use, BATCHES))
    gc.enable()
    ns, loop = statistics.median(python), statistics.median(c)
    goal, met = "", ""
    if ratio_at_most is not None:
        goal, met = f"ratio <= {ratio_at_most}", "met" if ns <= ratio_at_most * loop else "missed"
    elif ns_at_most is not None:
        goal, met = f"<= {ns_at_most:g} ns", "met" if ns <= ns_at_most else "missed"
    benchmark.extra_info.update(
        {"workload": name, "ns/chain": ns, "C loop": loop, "ratio": ns / loop, "goal": goal,
         "": met}
    )  # fmt: skip
    benchmark.pedantic(lambda: work.ns_per_chain(use, BATCHES), rounds=3)


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
@pytest.mark.parametrize("regions", [1, 8])
@pytest.mark.parametrize(
    ("descriptors", "indirect", "goal"),
    [(1, False, 1.2), (4, False, 1.15), (4, True, 1.15), (16, True, 1.15)],
    ids=["1", "4", "indirect-4", "indirect-16"],
)
def test_split_batches(
    benchmark: Any, c_loop: ctypes.CDLL, descriptors: int, indirect: bool, goal: float,
    regions: int, event_idx: bool,
) -> None:  # fmt: skip
    work = Work(descriptors, indirect=indirect, regions=regions, event_idx=event_idx)
    kind = "indirect" if indirect else "direct"
    name = f"split, {kind} {descriptors}, {regions} region{'s' * (regions > 1)}"
    name += ", EVENT_IDX" * event_idx
    # A batch ends where its segment table of 1024 is full.
    use = in_batches(4) if descriptors == 16 else in_one_batch
    compare(benchmark, c_loop, name, work, use, ratio_at_most=goal)


@pytest.mark.parametrize("regions", [1, 8])
@pytest.mark.parametrize("descriptors", [1, 4])
def test_packed_batches(
    benchmark: Any, c_loop: ctypes.CDLL, descriptors: int, regions: int
) -> None:
    work = Work(descriptors, packed=True, regions=regions)
    name = f"packed, {descriptors}, {regions} region{'s' * (regions > 1)}"
    compare(benchmark, c_loop, name, work, in_one_batch, ratio_at_most=1.2)


@pytest.mark.parametrize(
    ("name", "use", "goal"),
    [
        ("one chain at a time, fused (for chain in queue)", iterate_queue, 49),
        ("one chain at a time, pop and push", one_at_a_time, None),
        ("for chain in batch, with its pop and push", iterate_batch, 20),
        ("one chain with a memoryview of its data", with_memoryview, 100),
    ],
)
def test_objects(
    benchmark: Any, c_loop: ctypes.CDLL, name: str, use: Use, goal: float | None
) -> None:
    compare(benchmark, c_loop, name, Work(event_idx=True), use, ns_at_most=goal)


def test_an_empty_call(benchmark: Any) -> None:
    """What the goals in ns are relative to: 24 ns where they were set."""

    def empty() -> None:
        pass

    times = timeit.repeat(empty, number=100_000, repeat=20)
    benchmark.extra_info["ns"] = min(times) / 100_000 * 1e9
    benchmark.pedantic(empty)


@pytest.mark.parametrize("scattered", [False, True], ids=["adjacent", "scattered"])
def test_copy_of_the_payload(benchmark: Any, c_loop: ctypes.CDLL, scattered: bool) -> None:
    """gather_into against memcpy of the same pieces, for every alignment of the destination to a
    vector: one memcpy where the pages adjoin each other, else one for each page."""
    work = RingWork()
    # 97 has no factor in common with SIZE, so this is every page, and no two neighbours adjoin.
    order = [i * (97 if scattered else 1) % SIZE for i in range(SIZE)]
    in_one_batch(work.queue)
    work.driver.get_used()
    at = BASE + DATA + PAGE * np.array(order, np.uint64)
    work.driver.add_many(at, np.full(SIZE, PAGE, np.uint32), False)
    work.driver.publish()
    work.arrays[0][DATA:] = np.arange(len(work.arrays[0]) - DATA) * 31 >> 4
    batch = work.queue.pop_many()
    source = work.arrays[0][DATA:].ctypes.data
    raw = np.zeros(SIZE * PAGE + 2 * PAGE, np.uint8)
    aligned = raw[-raw.ctypes.data % PAGE :]
    pages = np.array([source + PAGE * page for page in order], np.uint64)
    pieces, length = (pages, PAGE) if scattered else (pages[:1], SIZE * PAGE)
    theirs, ours = [], []
    for offset in range(64):
        to = aligned[offset : offset + SIZE * PAGE]
        at_once = (ctypes.c_void_p(to.ctypes.data), ctypes.c_void_p(pieces.ctypes.data))
        plain, gather = [], []
        for _ in range(25):
            start = time.perf_counter_ns()
            c_loop.copy_pieces(*at_once, len(pieces), length)
            plain.append(time.perf_counter_ns() - start)
            start = time.perf_counter_ns()
            batch.gather_into(to)
            gather.append(time.perf_counter_ns() - start)
        theirs.append(SIZE * PAGE / statistics.median(plain))
        ours.append(SIZE * PAGE / statistics.median(gather))
    assert bytes(aligned[63 : 63 + SIZE * PAGE]) == batch.gather()
    shares = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    worst = min(shares)
    benchmark.extra_info.update(
        {
            "workload": f"1 MiB out of {'scattered' if scattered else 'adjacent'} pages",
            "GB/s": f"{min(ours):.1f} to {max(ours):.1f}",
            "memcpy": f"{min(theirs):.1f} to {max(theirs):.1f}",
            "worst share": worst,
            "at offset": shares.index(worst),
            "goal": ">= 0.95",
            "": "met" if worst >= 0.95 else "missed",
        }
    )
    benchmark.pedantic(lambda: batch.gather_into(aligned[16:]), rounds=5)
