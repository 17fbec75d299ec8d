"""What the log says of drivers: which features, and what nothing can be done for."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from vring_serial.proto.vhost_user import (
    U64,
    MemoryTable,
    ProtocolFeature,
    Request,
    VringDescriptor,
    VringState,
)
from vring_serial.transport.vhost_user.backend import PROTOCOL_FEATURES

FEATURES = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28
RING_PACKED = 1 << 34
WITHOUT_STATUS = int(PROTOCOL_FEATURES & ~ProtocolFeature.STATUS)
UNMAPPED = "the driver is ready, but no guest memory is mapped"
NEVER_SET_UP = "notified a queue that it never set up: was this guest restored from a saved state?"


@pytest.fixture(autouse=True)
def everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.fixture
def backend_options() -> dict[str, bool]:
    return {"packed": True, "inband_notifications": True}


async def agree(frontend: Any, protocol_features: int, features: int = FEATURES) -> None:
    """All but memory."""
    assert await frontend.acked(Request.SET_PROTOCOL_FEATURES, U64(protocol_features)) == 0
    assert await frontend.acked(Request.SET_FEATURES, U64(features)) == 0


@pytest.mark.parametrize("packed", [False, True])
async def test_packed_rings_are_among_what_the_driver_accepted(
    frontend: Any, packed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    features = FEATURES | RING_PACKED * packed
    await agree(frontend, int(PROTOCOL_FEATURES), features)
    assert await frontend.acked(Request.SET_FEATURES, U64(features)) == 0  # as QEMU does
    assert caplog.text.count("the driver accepted of the rings RING_PACKED") == packed


async def test_a_driver_without_memory_is_told_of_once(
    frontend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await agree(frontend, int(PROTOCOL_FEATURES))
    for status in (1 | 2, 1 | 2 | 8, 1 | 2 | 4 | 8) * 3:
        assert await frontend.acked(Request.SET_STATUS, U64(status)) == 0
    assert caplog.text.count(UNMAPPED) == 1


@pytest.mark.parametrize("enabled_first", [False, True])
async def test_queues_without_memory_are_told_of_once_without_status(
    frontend: Any, enabled_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    await agree(frontend, WITHOUT_STATUS)
    for index in range(3):
        steps = [
            (Request.SET_VRING_KICK, VringDescriptor(index, no_fd=True)),
            (Request.SET_VRING_ENABLE, VringState(index, 1)),
        ]
        assert UNMAPPED not in caplog.text or index
        for kind, payload in steps[:: -1 if enabled_first else 1]:
            assert await frontend.acked(kind, payload) == 0
        assert caplog.text.count(UNMAPPED) == 1


async def test_queues_with_memory_are_not_told_of(
    frontend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await agree(frontend, WITHOUT_STATUS)
    assert await frontend.acked(Request.SET_VRING_ENABLE, VringState(0, 1)) == 0  # not started
    table = MemoryTable((frontend.region,))
    assert await frontend.acked(Request.SET_MEM_TABLE, table, (frontend.memfd,)) == 0
    await frontend.set_up(0)
    assert await frontend.echo(0, b"text")
    assert UNMAPPED not in caplog.text


async def test_kicks_of_queues_that_were_never_set_up_are_told_of_once(
    frontend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await frontend.negotiate(int(PROTOCOL_FEATURES | ProtocolFeature.INBAND_NOTIFICATIONS))
    await frontend.set_up(0)
    assert await frontend.acked(Request.VRING_KICK, VringState(0)) == 0
    assert NEVER_SET_UP not in caplog.text
    for index in (1, 1, 2):
        assert await frontend.acked(Request.VRING_KICK, VringState(index)) == 0
        assert caplog.text.count(NEVER_SET_UP) == 1
