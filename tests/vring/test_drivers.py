"""The drivers: wishes for notifications, bad arguments and bad devices."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support.rings import DATA, Ring
from vring import LocalMisuseError, RingError
from vring.errors import QueueFullError, VringError
from vring.testing import GuestQueue

PACKED = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
AVAIL, USED = 1 << 7, 1 << 15


class Number:
    """A number whose conversion runs code of somebody's."""

    def __init__(self, value: int, code: Callable[[], object]) -> None:
        self.value = value
        self.code = code

    def __index__(self) -> int:
        self.code()
        return self.value


# --- notifications after several chains


def parts(source: random.Random, total: int, most: int = 5) -> list[int]:
    """Lengths of chains, `total` descriptors in all."""
    lengths: list[int] = []
    while total:
        lengths.append(source.randint(1, min(total, most)))
        total -= lengths[-1]
    return lengths


@PACKED
@pytest.mark.parametrize("in_order", [False, True], ids=["any-order", "in-order"])
@pytest.mark.parametrize("start", [0, 5, 13])
def test_a_wake_up_after_several_is_never_lost(packed: bool, in_order: bool, start: int) -> None:
    """Used before the wish: the answer says so. Used after it: the device notifies."""
    size = 16
    for seed in range(60):
        source = random.Random(seed)
        ring = Ring(size=size, packed=packed, event_idx=True, in_order=in_order)
        for _ in range(start):
            ring.chain(1)
            ring.queue.push_many(ring.queue.pop_many())
            ring.driver.get_used()
        lengths = parts(source, source.randint(1, size))
        for n in lengths:
            ring.driver.add([(DATA, 1)] * n, [])
        ring.driver.publish()
        weights = lengths if packed else [1] * len(lengths)  # split counts chains
        after = source.randint(1, sum(weights))
        early = source.randint(0, len(weights))
        batch = ring.queue.pop_many()
        ring.driver.disable_notifications()
        ring.queue.push_many(batch, None, early)
        used = sum(weights[:early])
        assert ring.driver.enable_notifications(after) == (used >= after), (seed, lengths)
        for weight in weights[early:]:
            notified = ring.queue.push_many(batch, None, 1)
            assert notified or not used < after <= used + weight, (seed, lengths)
            used += weight
        assert ring.driver.enable_notifications(after)
        ring.driver.get_used()
        assert not ring.driver.enable_notifications(), "nothing is in flight"


@pytest.mark.parametrize("wrap", [False, True], ids=["straight", "around-the-end"])
def test_batches_of_in_order_devices_count_whole(wrap: bool) -> None:
    """One used element for several chains of several descriptors (2.8.7, 2.7.9)."""
    ring = Ring(size=16, packed=True, in_order=True, event_idx=True)
    first = 9 if wrap else 0
    for _ in range(first):
        ring.chain(1)
        ring.queue.push_many(ring.queue.pop_many())
        ring.driver.get_used()
    heads = [ring.driver.add([(DATA, 1)] * n, []) for n in (1, 3, 4, 2)]
    ring.driver.publish()
    assert not ring.driver.enable_notifications(1)
    ring.put_table(ring.desc + 16 * first, (0, 0, heads[2], AVAIL | USED))
    assert [ring.driver.enable_notifications(n) for n in (1, 2, 4, 7, 8, 9)] == [True] * 5 + [False]
    last = (first + 8) % 16
    flags = AVAIL | USED if last > first else 0
    ring.put_table(ring.desc + 16 * last, (0, 0, heads[3], flags))
    assert ring.driver.enable_notifications(10)
    assert ring.driver.get_used()[0].tolist() == heads


def test_a_device_that_lies_is_looked_at() -> None:
    """What it wrote is no chain in flight: True, and get_used tells what is wrong."""
    for used_id in (9, 99):
        ring = Ring(size=16, packed=True, event_idx=True)
        ring.chain(1, 1)
        ring.put_table(ring.desc, (0, 1, used_id, AVAIL | USED))
        assert ring.driver.enable_notifications(2)
        with pytest.raises(RingError):
            ring.driver.get_used()


@PACKED
def test_a_wish_that_no_ring_can_fulfil_is_refused(packed: bool) -> None:
    ring = Ring(size=8, packed=packed, event_idx=True)
    for after in (0, 9):
        with pytest.raises(LocalMisuseError, match="of 8 descriptors"):
            ring.driver.enable_notifications(after)


# --- bad arguments

WRONG: list[tuple[list[Any], list[Any], int | None]] = [
    ([(DATA, 2**32)], [], None),
    ([(DATA, -1)], [], None),
    ([(2**64, 1)], [], None),
    ([(DATA, 1), (DATA, 1.5)], [], None),
    ([(DATA, 1)], [(DATA, 1), (DATA, 2**32)], None),
    ([(DATA, 1)], [(DATA, None)], None),
    ([(DATA, 1), (DATA,)], [], None),
    ([(DATA, 1)], [(DATA, 2**32)], DATA),
    ([(DATA, 1)], [], -1),
    ([(DATA, 1)], [], 2**64),
    ([(DATA, 1)], [], 5),
    ([(DATA, 1)], [], 1.5),  # type: ignore[list-item]
    ([], [], None),
    ([(DATA, 1)] * 9, [], None),
]


def fill_and_empty(ring: Ring) -> None:
    """Every descriptor is there, and what is in the ring arrives."""
    assert ring.driver.num_free == 8
    assert [len({ring.driver.add([(DATA, n)], []) for n in range(1, 9)})] == [8]
    with pytest.raises(QueueFullError):
        ring.driver.add([(DATA, 1)], [])
    ring.driver.publish()
    batch = ring.queue.pop_many()
    assert batch.readable_bytes.tolist() == list(range(1, 9))
    ring.queue.push_many(batch)
    assert len(ring.driver.get_used()[0]) == 8


@PACKED
@pytest.mark.parametrize("case", range(len(WRONG)))
def test_a_bad_chain_takes_nothing(packed: bool, case: int) -> None:
    readable, writable, indirect_at = WRONG[case]
    ring = Ring(packed=packed)
    before = ring.bytes.copy()
    for _ in range(20):
        with pytest.raises((VringError, ValueError, TypeError)):
            ring.driver.add(readable, writable, indirect_at=indirect_at)
    assert (ring.bytes == before).all(), "nothing is written"
    assert not ring.driver.publish()
    fill_and_empty(ring)


@PACKED
@pytest.mark.parametrize(
    "lengths",
    [[1, 2**32], [1, -1], np.array([1, 2**32]), np.array([1.5, 2]), [1, "x"], [1], [[1], [2]]],
    ids=str,
)
def test_bad_numbers_in_add_many(packed: bool, lengths: Any) -> None:
    ring = Ring(packed=packed)
    for _ in range(20):
        with pytest.raises((VringError, ValueError, TypeError)):
            ring.driver.add_many([DATA, DATA], lengths, False)
    assert not ring.driver.publish()
    fill_and_empty(ring)


@PACKED
def test_addresses_of_any_integer_kind(packed: bool) -> None:
    ring = Ring(packed=packed)
    assert ring.driver.add_many(np.array([DATA, DATA + 1], np.int64), (1, np.uint8(2)), False) == 2
    assert ring.driver.add_many([], [], False) == 0
    with pytest.raises(LocalMisuseError, match="addresses"):
        ring.driver.add_many(np.array([-1]), [1], False)
    ring.driver.publish()
    assert ring.queue.pop_many().readable_bytes.tolist() == [1, 2]


@PACKED
def test_endless_buffers_end(packed: bool) -> None:
    def buffers() -> Any:
        while True:
            yield DATA, 1

    ring = Ring(packed=packed)
    with pytest.raises(LocalMisuseError, match="more buffers"):
        ring.driver.add(buffers(), [])
    fill_and_empty(ring)


@PACKED
def test_conversions_that_use_the_driver(packed: bool) -> None:
    """What a number's code adds meanwhile is as good as added before; there is room for both."""
    ring = Ring(packed=packed)
    reentered = [
        lambda: ring.driver.add([(DATA, 2)], []),
        lambda: ring.driver.add_many([DATA] * 6, [3] * 6, False),
    ]
    ring.driver.add([(DATA, Number(1, reentered[0]))], [])
    assert ring.driver.num_free == 6
    with pytest.raises(QueueFullError):
        ring.driver.add([(Number(DATA, reentered[1]), 1)], [])
    ring.driver.publish()
    assert ring.queue.pop_many().readable_bytes.tolist() == [2, 1] + [3] * 6


@PACKED
def test_a_truth_that_uses_the_driver(packed: bool) -> None:
    class Truth:
        def __bool__(self) -> bool:
            ring.driver.add_many([DATA] * 7, [3] * 7, False)
            return False

    ring = Ring(packed=packed)
    assert ring.driver.add_many([DATA] * 8, [1] * 8, Truth()) == 1
    assert ring.driver.num_free == 0
    ring.driver.publish()
    assert ring.queue.pop_many().readable_bytes.tolist() == [3] * 7 + [1]


@PACKED
@pytest.mark.parametrize("in_order", [False, True], ids=["any-order", "in-order"])
def test_chains_before_a_bad_used_element_come_back(packed: bool, in_order: bool) -> None:
    ring = Ring(packed=packed, in_order=in_order)
    for n in (1, 2, 3):
        ring.chain(n)
    ring.queue.push_many(ring.queue.pop_many(2))
    if packed:
        ring.put_table(ring.desc + 16 * 2, (0, 1, 77, AVAIL | USED))
    else:
        ring.memory.write(ring.used + 4 + 8 * 2, (77).to_bytes(4, "little"))
        ring.memory.write(ring.used + 2, b"\3\0")
    assert len(ring.driver.get_used()[0]) == 2
    assert ring.driver.in_flight == 1
    for _ in range(2):
        with pytest.raises(RingError, match="not in flight"):
            ring.driver.get_used()


def test_buffers_that_do_not_fit_a_stream_are_not_added_in_part() -> None:
    guest = GuestQueue(np.zeros(GuestQueue.bytes_needed(8, 64), np.uint8), 8, 64, writable=False)
    guest.add([1] * 5)
    with pytest.raises(LocalMisuseError, match="do not fit"):
        guest.add([2] * 4)
    guest.add([3] * 3)
    assert guest.device_queue().pop_many().readable_bytes.tolist() == [1] * 5 + [3] * 3
