"""Arguments whose conversion runs somebody's code, and who use a queue meanwhile."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support.rings import BASE, DATA, Ring
from vring import (
    AddressError,
    Batch,
    Chain,
    GuestMemory,
    LocalMisuseError,
    MemoryMapError,
    Region,
    SplitQueue,
)

PACKED = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


class Twice:
    """An index that answers otherwise the second time; `code` runs at the first."""

    def __init__(self, *answers: int, code: Callable[[], object] = lambda: None) -> None:
        self.answers = list(answers)
        self.code = code

    def __index__(self) -> int:
        self.code, code = (lambda: None), self.code
        code()
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    # Comparisons and sums are no conversions: they would agree with whatever is asked.
    def __le__(self, other: object) -> bool:
        return True

    __ge__ = __lt__ = __gt__ = __le__

    def __add__(self, other: int) -> int:
        return 0

    __radd__ = __sub__ = __rsub__ = __and__ = __add__


class Agreeable(int):
    """An int whose comparisons and sums agree with everything."""

    def __le__(self, other: object) -> bool:
        return True

    __ge__ = __lt__ = __gt__ = __le__

    def __add__(self, other: int) -> int:
        return 0

    __radd__ = __add__


def writable(packed: bool, *lengths: int) -> Ring:
    ring = Ring(packed=packed)
    for n in lengths:
        ring.driver.add([], [(DATA, n)])
    ring.driver.publish()
    return ring


# --- queues


class Lengths:
    """Written lengths; asking for one runs code."""

    def __init__(self, values: list[Any], code: Callable[[], object]) -> None:
        self.values = values
        self.code = code

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> Any:
        if i == len(self.values) - 1:
            self.code()
        return self.values[i]


@PACKED
def test_written_lengths_that_complete_the_batch(packed: bool) -> None:
    ring = writable(packed, 8, 8, 8)
    batch = ring.queue.pop_many()
    for written in (
        Lengths([1, 2, 3], lambda: ring.queue.push_many(batch, 7, 2)),
        [1, Twice(2, code=lambda: ring.queue.push_many(batch, 5, 1)), 3],
    ):
        with pytest.raises(LocalMisuseError, match=r"written lengths for|completed"):
            ring.queue.push_many(batch, written)
    assert ring.driver.get_used()[1].tolist() == [7, 7, 5]
    assert ring.queue.in_flight == 0


@PACKED
def test_written_lengths_that_change_while_they_are_read(packed: bool) -> None:
    ring = writable(packed, 8, 8)
    batch = ring.queue.pop_many()
    assert ring.queue.push_many(batch, [Twice(1, 99), Twice(2, 2**40)])
    assert ring.driver.get_used()[1].tolist() == [1, 2]


@PACKED
def test_a_count_that_completes_the_batch(packed: bool) -> None:
    ring = writable(packed, 8, 8, 8)
    batch = ring.queue.pop_many()
    with pytest.raises(LocalMisuseError, match="3 chains to complete, the batch has 1"):
        ring.queue.push_many(batch, 1, Twice(3, code=lambda: ring.queue.push_many(batch, 1, 2)))
    assert ring.queue.push_many(batch, 2, Twice(1, 300))
    assert ring.driver.get_used()[1].tolist() == [1, 1, 2]


@PACKED
def test_a_length_that_completes_its_chain(packed: bool) -> None:
    ring = writable(packed, 8, 8)
    chain = ring.queue.pop()
    with pytest.raises(LocalMisuseError, match="completed"):
        ring.queue.push(chain, Twice(3, code=lambda: ring.queue.push(chain, 4)))
    ring.queue.push(ring.queue.pop(), Twice(5, 99))
    assert ring.driver.get_used()[1].tolist() == [4, 5]


@PACKED
@pytest.mark.parametrize("use", ["push_many", "unpop", "push"])
def test_whoever_is_told_of_a_view_that_dies_uses_the_queue(packed: bool, use: str) -> None:
    ring = writable(packed, 8, 8, 8)
    batch = ring.queue.pop_many(2)
    first = batch[0]
    told = []

    def meanwhile(_: object) -> None:
        told.append(ring.queue.pop_many())
        ring.queue.push_many(batch, 6)

    watch = weakref.ref(first.writable[0], meanwhile)
    with pytest.raises(LocalMisuseError, match="used while"):
        getattr(ring.queue, use)(first if use == "push" else batch)
    assert watch() is None
    ring.queue.push_many(told[0], 7)
    assert ring.driver.get_used()[1].tolist() == [6, 6, 7]
    assert ring.queue.in_flight == 0


def test_numbers_of_a_queue_are_converted_once() -> None:
    ring = Ring()
    for size in (Twice(8, 4096), Agreeable(8)):
        assert SplitQueue(ring.memory, size, ring.desc, ring.avail, ring.used).size == 8
    for packed in (False, True):
        made = Ring(packed=packed)
        kind, driver = type(made.queue), type(made.driver)
        parts = (made.desc, made.avail, made.used)
        for wrong in (Agreeable(0), Agreeable(65536), Twice(40000)):
            with pytest.raises(LocalMisuseError):
                kind(made.memory, wrong, *parts)
            with pytest.raises(LocalMisuseError):
                driver(made.memory, wrong, *parts)
        for index in (Twice(70000), Agreeable(-1), Agreeable(70000)):
            with pytest.raises(LocalMisuseError):
                kind(made.memory, 8, *parts, index=index)
            with pytest.raises(LocalMisuseError):
                driver(made.memory, 8, *parts, index=index)
        for at in (-1, 2**64, Agreeable(2**64)):
            with pytest.raises(LocalMisuseError, match="not an address"):
                kind(made.memory, 8, at, made.avail, made.used)
        with pytest.raises(LocalMisuseError):
            kind(made.memory, 8, *parts, used_index=Agreeable(65536))
        assert kind(made.memory, 8, *(Twice(at, 5) for at in parts)).rings == parts
    with pytest.raises(LocalMisuseError, match="not in a ring of 8"):
        kind(made.memory, 8, *parts, used_index=9)


@PACKED
def test_a_refused_memory_leaves_the_old_one(packed: bool) -> None:
    """Whatever part of the ring is missing in the new one."""
    ring = Ring(packed=packed)
    ring.chain(5)
    parts = sorted((ring.desc, ring.avail, ring.used))
    for end in (at - BASE for at in parts[1:]):
        with pytest.raises(AddressError):
            ring.queue.memory = GuestMemory([Region(BASE, bytearray(end))])
        gc.collect()
        assert ring.queue.memory is ring.memory
    ring.queue.enable_notifications()
    ring.queue.push_many(ring.queue.pop_many())
    assert len(ring.driver.get_used()[0]) == 1


@PACKED
def test_the_new_memory_is_whole_when_the_old_one_goes(packed: bool) -> None:
    class Buffer(np.ndarray):  # one that can be referred to weakly
        pass

    ring = Ring(packed=packed)
    old = GuestMemory(
        [Region(BASE, ring.bytes[:].view(Buffer)), Region(DATA, ring.data[:].view(Buffer))]
    )
    ring.queue.memory = old
    gone: list[int] = []

    def use(_: object) -> None:
        gone.append(ring.queue.pop_many().readable_bytes.tolist())

    watches = [weakref.ref(old.regions[0].buffer, use)]
    ring.chain(5)
    del old
    ring.queue.memory = ring.memory
    gc.collect()
    assert gone == [[5]]
    assert watches[0]() is None


# --- batches and chains; of buffers whose owners run code, see test_cimport


def test_chains_and_batches_of_no_queue() -> None:
    ring = Ring()
    chain, batch = Chain.__new__(Chain), Batch.__new__(Batch)
    uses: list[Callable[[], object]] = [
        lambda: chain.head, lambda: chain.readable, lambda: chain.writable, chain.read,
        lambda: chain.write(b"x"), lambda: chain.readable_bytes, lambda: chain.writable_bytes,
        lambda: ring.queue.push(chain), lambda: ring.queue.push(chain, 1),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(LocalMisuseError, match="come from pop"):
            use()
    assert (len(batch), batch.gather(), list(batch), batch.heads.size) == (0, b"", [], 0)
    assert batch.scatter(b"x")[0] == 0
    assert not ring.queue.push_many(batch)
    for iterator in (iter(batch), iter(ring.queue)):
        kind: Any = type(iterator)
        assert list(kind.__new__(kind)) == []


# --- after a reset


@PACKED
def test_chains_of_before_a_reset_touch_nothing(packed: bool) -> None:
    ring = Ring(packed=packed)
    for _ in range(4):
        ring.chain(8, 8, writable=1)
    batch, chain = ring.queue.pop_many(2), ring.queue.pop()
    iterated = next(iter(ring.queue))
    row = batch[1]
    ring.queue.reset()
    ring.driver.reset()
    before = ring.data.copy()
    uses: list[Callable[[], object]] = [
        lambda: batch.scatter(b"x" * 16), batch.gather, lambda: batch.gather_into(bytearray(99)),
        lambda: batch[0].read(), lambda: row.write(b"x"), row.read, lambda: row.readable,
        lambda: chain.writable, lambda: chain.write(b"x"), lambda: iterated.write(b"x"),
        lambda: chain.head, lambda: ring.queue.push(chain), lambda: ring.queue.unpop(batch),
        lambda: ring.queue.push_many(batch, 1), lambda: [c.write(b"x") for c in batch],
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(LocalMisuseError, match="reset after"):
            use()
    assert (ring.data == before).all()
    ring.chain(8, 8, writable=1)
    again = ring.queue.pop()
    assert again.write(b"new") == 3
    ring.queue.push(again)
    assert ring.driver.get_used()[1].tolist() == [3]


# --- memory


def test_addresses_and_lengths_of_memory_are_converted_once() -> None:
    memory = GuestMemory([Region(0x1000, bytearray(range(256)))])
    assert memory.read(Twice(0x1001, 0x9000), Twice(2, 2**40)) == b"\1\2"
    assert bytes(memory.view(Twice(0x1002, 0x9000), Twice(1, 2**40))) == b"\2"
    memory.write(Twice(0x1003, 0x9000), b"x")
    assert memory.read(0x1003, 1) == b"x"
    for address, length in (
        (Agreeable(0x9000), 1), (0x1000, Agreeable(257)), (Agreeable(2**64), 1),
        (0x10FF, Agreeable(2)), (Agreeable(2**64 - 1), Agreeable(2)),
    ):  # fmt: skip
        with pytest.raises(AddressError):
            memory.read(address, length)
        with pytest.raises(AddressError):
            memory.view(address, length)
    with pytest.raises(LocalMisuseError):
        memory.read(0x1000, Agreeable(-1))


def test_numbers_of_a_region_are_plain() -> None:
    assert type(Region(Agreeable(1), bytearray(1), user_addr=Agreeable(2)).user_addr) is int
    for at, user in ((Agreeable(2**64), None), (Agreeable(2**64 - 1), None), (0, Agreeable(-1))):
        with pytest.raises(MemoryMapError):
            Region(at, bytearray(2), user_addr=user)
    with pytest.raises(MemoryMapError, match="wraps around"):
        Region(0, bytearray(2), user_addr=Agreeable(2**64 - 1))
