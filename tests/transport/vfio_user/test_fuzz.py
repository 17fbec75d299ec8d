"""The fuzz target of the vfio-user server, with Hypothesis in the place of libFuzzer."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import vfio_user as target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vring_serial.device.virtqueue import RunningQueue
from vring_serial.transport.vfio_user.rings import RemoteRings


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.binary(min_size=20, max_size=1500))
def test_any_messages(data: bytes) -> None:
    target.one_input(data)


@pytest.mark.parametrize("shared", [0, 1], ids=["copied", "shared"])
def test_the_target_reaches_the_rings(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fuzzer whose driver never gets to DRIVER_OK would find nothing."""
    running = []

    class Watched(RemoteRings):
        def start_queue(self, index: int, queue: RunningQueue) -> None:
            super().start_queue(index, queue)
            running.append(index)

    monkeypatch.setattr(target, "RemoteRings", Watched)
    choices = [1, shared, 1]
    target.one_input(b"".join(number.to_bytes(2, "little") for number in choices))
    assert running == [0, 1, 2, 3]
