"""Driver against device against the oracle, over random operations, features, sizes and indices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.ring_oracle import FaultError, PackedOracle, SplitOracle
from vring import (
    GuestMemory,
    PackedDriver,
    PackedQueue,
    QueueFullError,
    Region,
    RingError,
    SplitDriver,
    SplitQueue,
)

RING = 0x10_000
BUFFERS = 0x20_000
SPAN = 0x4000  # bytes of buffers: two regions that touch, then a hole, then one more
TABLES = 0x40_000


class Bench:
    """One ring with its driver, device and oracle in the same memory."""

    def __init__(
        self, packed: bool, size: int, event_idx: bool, in_order: bool, start: int
    ) -> None:
        sizes = {RING: 0x8000, BUFFERS: SPAN // 2, BUFFERS + SPAN // 2: SPAN // 2, TABLES: 0x20000}
        self.arrays = {at: np.zeros(n, np.uint8) for at, n in sizes.items()}
        self.memory = GuestMemory([Region(at, array) for at, array in self.arrays.items()])
        self.size = size
        parts = RING, RING + 0x4000, RING + 0x5000
        features: dict[str, Any] = {"event_idx": event_idx, "indirect": True}
        if packed:
            index = start % size | (start & 1) << 15
            self.driver: Any = PackedDriver(
                self.memory, size, *parts, **features, in_order=in_order, index=index
            )
            self.queue: Any = PackedQueue(
                self.memory, size, *parts, **features, in_order=in_order, index=index
            )
            slot, wrap = start % size, bool(start & 1)
            self.oracle: Any = PackedOracle(
                self.read, size, *parts, **features, avail_slot=slot, avail_wrap=wrap,
                used_slot=slot, used_wrap=wrap,
            )  # fmt: skip
            if not wrap:  # as a driver and device would have left the ring
                self.memory.write(RING, b"".join(_used_slot(slot, i) for i in range(size)))
        else:
            self.memory.write(parts[2] + 2, start.to_bytes(2, "little"))
            self.driver = SplitDriver(
                self.memory, size, *parts, **features, in_order=in_order, index=start
            )
            self.queue = SplitQueue(
                self.memory, size, *parts, **features, in_order=in_order, index=start
            )
            self.oracle = SplitOracle(
                self.read, size, *parts, **features, next_avail=start, next_used=start
            )
        self.in_order = in_order
        self.batches: list[tuple[Any, list[Any]]] = []  # popped: batch, the oracle's chains
        self.expected: dict[int, int] = {}  # head -> written, for the driver to take back
        self.tables = 0

    def read(self, address: int, length: int) -> bytes | None:
        out = bytearray()
        for at in range(address, address + length):
            for base, array in self.arrays.items():
                if base <= at < base + len(array):
                    out.append(array[at - base])
                    break
            else:
                return None
        return bytes(out)

    def host_segments(self, chain: Any) -> list[tuple[int, int]]:
        """A chain's buffers as host ranges, cut at region borders."""
        out = []
        for address, length, _ in chain.buffers:
            while length:
                base, array = next(
                    (b, a) for b, a in self.arrays.items() if b <= address < b + len(a)
                )
                there = min(length, base + len(array) - address)
                out.append((array.ctypes.data + address - base, there))
                address += there
                length -= there
        return out

    def add(self, data: st.DataObject) -> None:
        buffer = st.tuples(st.integers(0, SPAN - 1), st.sampled_from([0, 1, 7, 64, 4096, 9000]))
        drawn = data.draw(st.lists(buffer, min_size=1, max_size=min(5, self.size)))
        buffers = [(BUFFERS + at, min(n, SPAN - at)) for at, n in drawn]
        cut = data.draw(st.integers(0, len(buffers)))
        table = None
        if data.draw(st.booleans()):
            self.tables = (self.tables + 1) % 64
            table = TABLES + self.tables * 0x100
        try:
            self.driver.add(buffers[:cut], buffers[cut:], indirect_at=table)
        except QueueFullError:
            return

    def pop(self, limit: int) -> None:
        wanted = self.oracle.pop(limit or self.size)
        batch = self.queue.pop_many(limit)
        assert batch.heads.tolist() == [chain.head for chain in wanted]
        assert batch.readable_bytes.tolist() == [chain.total(False) for chain in wanted]
        assert batch.writable_bytes.tolist() == [chain.total(True) for chain in wanted]
        segments = [self.host_segments(chain) for chain in wanted]
        assert list(zip(batch.addresses.tolist(), batch.lengths.tolist(), strict=True)) == [
            segment for chain in segments for segment in chain
        ]
        starts = np.cumsum([0, *map(len, segments)])[:-1]
        assert batch.first_segment.tolist() == starts.tolist()
        assert (batch.n_readable + batch.n_writable).tolist() == [len(s) for s in segments]
        assert bool(batch) == bool(wanted)
        if wanted:
            self.batches.append((batch, wanted))

    def push(self, data: st.DataObject) -> None:
        if not self.batches:
            return
        at = 0 if self.in_order else data.draw(st.integers(0, len(self.batches) - 1))
        batch, chains = self.batches[at]
        count = data.draw(st.integers(0, len(chains)))
        written = [data.draw(st.sampled_from([0, chain.total(True)])) for chain in chains[:count]]
        notify = self.queue.push_many(batch, written, count)
        assert notify == self.oracle.push(chains[:count], written)
        self.expected.update(
            {chain.head: n for chain, n in zip(chains[:count], written, strict=True)}
        )
        del chains[:count]
        assert len(batch) == len(chains)
        if not chains:
            del self.batches[at]

    def unpop(self) -> None:
        if self.batches:
            batch, chains = self.batches[-1]
            if batch is self.newest:
                self.queue.unpop(batch)
                self.oracle.unpop(chains[::-1])
                del self.batches[-1]

    @property
    def newest(self) -> Any:
        return self.batches[-1][0] if self.batches else None

    def take_back(self) -> None:
        heads, lengths = self.driver.get_used()
        for head, length in zip(heads.tolist(), lengths.tolist(), strict=True):
            assert self.expected.pop(head) == length
        assert not self.expected

    def notifications(self, device: bool, on: bool) -> None:
        side = self.queue if device else self.driver
        if not on:
            side.disable_notifications()
            if device:
                self.oracle.check_disabled()
            return
        more = side.enable_notifications()
        if device:
            assert more == self.oracle.check_enabled()
        else:
            assert more == bool(self.expected)

    def check(self) -> None:
        in_flight = sum(len(chains) for _, chains in self.batches)
        assert self.queue.in_flight == in_flight
        assert self.queue.broken is None


def _used_slot(start: int, slot: int) -> bytes:
    flags = 0 if slot < start else 0x8080
    return bytes(14) + flags.to_bytes(2, "little")


OPERATIONS = ("add", "add", "publish", "pop", "push", "push", "unpop", "take", "device", "driver")


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(),
    shift=st.integers(0, 4),
    odd=st.sampled_from([1, 3, 5, 12]),
    event_idx=st.booleans(),
    in_order=st.booleans(),
    start=st.sampled_from([0, 1, 2, 65533, 65534, 65535]),
)
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_driver_device_and_oracle_agree(
    packed: bool,
    data: st.DataObject,
    shift: int,
    odd: int,
    event_idx: bool,
    in_order: bool,
    start: int,
) -> None:
    bench = Bench(packed, odd if packed else 1 << shift, event_idx, in_order, start)
    for operation in data.draw(st.lists(st.sampled_from(OPERATIONS), max_size=40)):
        match operation:
            case "add":
                bench.add(data)
            case "publish":
                bench.driver.publish()
            case "pop":
                bench.pop(data.draw(st.integers(0, 4)))
            case "push":
                bench.push(data)
            case "unpop":
                bench.unpop()
            case "take":
                bench.take_back()
            case _:
                bench.notifications(operation == "device", data.draw(st.booleans()))
        bench.check()


@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), indirect=st.booleans())
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_malformed_rings_are_judged_as_the_oracle_does(
    packed: bool, data: st.DataObject, seed: int, indirect: bool
) -> None:
    """Random descriptors, of which most are nearly right: same chains, or the same error."""
    bench = Bench(packed, 4, False, False, 0)
    kind = PackedQueue if packed else SplitQueue
    bench.queue = kind(
        bench.memory, 4, RING, RING + 0x4000, RING + 0x5000, indirect=indirect, name="q"
    )
    bench.oracle.indirect = indirect
    if packed:
        bench.oracle.avail_wrap = bench.oracle.used_wrap = True
    random = np.random.default_rng(seed)
    addresses = [BUFFERS, BUFFERS + SPAN - 8, TABLES, TABLES + 16, 2**64 - 8, 0x5000]
    lengths = [0, 1, 16, 16, 32, 48, 64, 80, 17, 0x2001, 0xFFFFFFFF]

    def descriptor() -> bytes:
        flags = int(random.choice([0, 0, 1, 1, 2, 3, 4, 4, 5, 6, 8]))
        following = int(random.choice([0, 1, 2, 3, 4]))
        low, high = following, flags
        if packed:
            high |= int(random.choice([0x80, 0x80, 0x80, 0, 0x8080]))
        else:
            low, high = flags, following
        return (
            int(random.choice(np.array(addresses, np.uint64))).to_bytes(8, "little")
            + int(random.choice(lengths)).to_bytes(4, "little")
            + low.to_bytes(2, "little")
            + high.to_bytes(2, "little")
        )

    bench.memory.write(RING, b"".join(descriptor() for _ in range(4)))
    bench.memory.write(TABLES, b"".join(descriptor() for _ in range(6)))
    heads = [int(random.choice([0, 1, 2, 3, 3, 4])) for _ in range(4)]
    index = int(random.choice([1, 2, 3, 4, 4, 5]))
    if not packed:
        bench.memory.write(
            RING + 0x4000, b"".join(n.to_bytes(2, "little") for n in (0, index, *heads))
        )
    for _ in range(5):
        try:
            wanted = bench.oracle.pop(4)
        except FaultError as fault:
            cause = str(fault)
            with pytest.raises(RingError) as caught:
                bench.queue.pop_many()
            assert type(caught.value).__name__ == cause
            assert caught.value.queue == "q"
            assert bench.queue.broken is not None
            return
        bench.oracle.unpop(wanted[::-1])
        before = len(bench.batches)
        bench.pop(0)
        if len(bench.batches) == before:
            return
