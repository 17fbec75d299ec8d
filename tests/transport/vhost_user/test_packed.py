"""Packed rings over vhost-user: their bases, and buffers in flight elsewhere in either layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vring import PackedQueue, SplitQueue
from vring_serial.proto.vhost_user import Request, VringState
from vring_serial.transport.vhost_user.backend import PROTOCOL_FEATURES, VhostUserBackend

FEATURES = 1 << 32 | 1 << 29 | 1 << 28
RING_PACKED = 1 << 34
FRESH = 0x8000_8000
USER = 0x7F12_3456_0000
QUEUE_SIZE = 64


@pytest.fixture
def backend_options() -> dict[str, bool]:
    return {"packed": True}


@pytest.fixture
async def packed(backend: VhostUserBackend, connect: Callable[[], Any]) -> Any:
    """A frontend that has agreed on packed rings."""
    frontend = connect()
    frontend.packed = True
    await frontend.negotiate(int(PROTOCOL_FEATURES), FEATURES | RING_PACKED)
    return frontend


def other_backend(frontend: Any, index: int) -> Any:
    """What serves the same ring somewhere else."""
    address = frontend.places[index]
    parts = (address.descriptor - USER, address.available - USER, address.used - USER)
    kind = PackedQueue if frontend.packed else SplitQueue
    return kind(frontend.memory, QUEUE_SIZE, *parts, event_idx=True)


async def test_a_ring_goes_on_where_it_was_past_its_end(packed: Any) -> None:
    await packed.set_up(0, base=FRESH)
    for slot in range(40):  # two descriptors each
        assert await packed.echo(0, b"text", slot)
    base = await packed.base(0)
    assert base == (40 * 2 - QUEUE_SIZE) * 0x0001_0001, "the wrap counters have turned to 0"
    assert await packed.base(0) == base
    await packed.resume(0, base)
    assert await packed.echo(0, b"again")


async def test_a_ring_that_was_never_set_up_has_a_fresh_base(packed: Any) -> None:
    assert await packed.base(1) == FRESH


@pytest.mark.parametrize("base", [FRESH, FRESH & 0xFFFF], ids=["both", "no used index"])
async def test_frontends_may_leave_the_used_index_out(packed: Any, base: int) -> None:
    await packed.set_up(0, base=base)
    assert await packed.echo(0, b"text")
    assert await packed.base(0) == 0x8002_8002


@pytest.mark.parametrize("base", [QUEUE_SIZE, QUEUE_SIZE << 16 | 0x8000])
async def test_an_index_outside_the_ring_is_refused(packed: Any, device: Any, base: int) -> None:
    packed.ring(0)
    await packed.configure(0, base)
    assert await packed.acked(Request.SET_VRING_ENABLE, VringState(0, 1)) != 0
    assert not device.running


@pytest.mark.parametrize("layout", ["split", "packed"])
async def test_what_is_in_flight_elsewhere_is_neither_served_nor_used(
    backend: VhostUserBackend, connect: Callable[[], Any], device: Any, layout: str
) -> None:
    frontend = connect()
    frontend.packed = layout == "packed"
    features = FEATURES | RING_PACKED * frontend.packed
    await frontend.negotiate(int(PROTOCOL_FEATURES), features)
    frontend.ring(0)
    frontend.put(0, b"elsewhere")
    other = other_backend(frontend, 0)
    assert other.pop() is not None
    base = other.vring_base if frontend.packed else other.avail_index
    assert base == (0x8000_8002 if frontend.packed else 1)
    frontend.put(0, b"here", 1)
    await frontend.resume(0, base)
    assert await frontend.used(0) == [4]
    assert frontend.echoed(b"here", 1)
    assert device.echoed == [b"here"]
    assert await frontend.base(0) == (0x8002_8004 if frontend.packed else 2)
    await frontend.resume(0, 0x8002_8004 if frontend.packed else 2)
    assert await frontend.echo(0, b"more", 2)
