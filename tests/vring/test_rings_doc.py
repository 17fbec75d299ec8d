"""The examples of docs/rings.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.rings import DATA, Ring

PAGE = Path(__file__).parents[2] / "docs" / "rings.md"
MEMORY, SIDES, BATCHES, ITERATION, ONE, NOTIFICATIONS = re.findall(
    r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL
)
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


def run(block: str, **names: Any) -> dict[str, Any]:
    exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_memory_and_both_sides() -> None:
    names = run(MEMORY)
    assert names["more"].read(0x1000, 5) == b"hello"
    kicks: list[int] = []
    for kind in ("Split", "Packed"):
        done = run(
            SIDES.replace("Split", kind), memory=names["memory"], kick=lambda: kicks.append(1)
        )
        assert done["written"].tolist() == [7, 0]
        assert done["driver"].in_flight == done["queue"].in_flight == 0
        names["memory"].write(0x1_0000, bytes(0x3000))
    assert len(kicks) == 2


@LAYOUTS
def test_batches(packed: bool) -> None:
    ring = Ring(packed=packed)
    ring.data[:] = 7
    ring.chain(10, 20)
    sunk: list[bytes] = []
    drain, _, receive = BATCHES.partition("batch = queue.pop_many(64)")
    run(drain, queue=ring.queue, sink=sunk.append, notify=lambda: sunk.append(b"notified"))
    assert sunk == [b"\7" * 30, b"notified"]
    ring.driver.get_used()
    for _ in range(3):
        ring.chain(16, writable=1)
    run("batch = queue.pop_many(64)" + receive, queue=ring.queue, data=b"x" * 20)
    assert ring.driver.get_used()[1].tolist() == [16, 4]
    assert ring.queue.in_flight == 0


@LAYOUTS
def test_iteration(packed: bool) -> None:
    ring = Ring(packed=packed)
    ring.data[:] = 65
    ring.chain(3, 8, writable=1)
    told: list[int] = []
    run(ITERATION, queue=ring.queue, handle=bytes.lower, notify=lambda: told.append(1))
    assert ring.driver.get_used()[1].tolist() == [3]
    assert ring.memory.read(DATA + 0x1000, 3) == b"aaa"
    assert told == [1]


@LAYOUTS
def test_one_chain(packed: bool) -> None:
    ring = Ring(packed=packed)
    ring.chain(3, 8, writable=1)
    seen: list[Any] = []
    run(ONE, queue=ring.queue, checksum=lambda view: seen.append(bytes(view)), notify=list)
    assert seen == [bytes(3)]
    assert ring.driver.get_used()[1].tolist() == [4]
    assert ring.memory.read(DATA + 0x1000, 4) == b"done"


@LAYOUTS
def test_notifications(packed: bool) -> None:
    ring = Ring(packed=packed)
    turns: list[int] = []

    def work(queue: Any) -> None:
        while batch := queue.pop_many():
            queue.push_many(batch)
        if not turns:
            ring.chain(1)  # comes after the last look at the ring
        turns.append(1)

    run(NOTIFICATIONS, queue=ring.queue, work=work, wait_for_kick=lambda: turns.append(2))
    assert turns == [1, 1, 2]
