"""Every kind of chardev, with the peer on its other side."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.chardev_kinds import (
    KINDS,
    Peer,
)
from tests.support.leaks import held


@pytest.fixture(params=KINDS)
async def peer(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Peer]:
    """Every kind in turn; nothing of a chardev is open any more when the test has ended."""
    peer = KINDS[request.param](tmp_path)
    before = held()
    yield peer
    await peer.chardev.aclose()
    await peer.disconnect()
    after = held()
    await peer.aclose()
    assert not after.descriptors.keys() - before.descriptors.keys()


@pytest.fixture(autouse=True)
def quick_ptys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests wait for ptys hundreds of times; people do not notice a fifth of a second."""
    monkeypatch.setattr("vring_serial.chardev.pty.POLL_SECONDS", 0.02)


@pytest.fixture
def no_leak() -> Iterator[None]:
    """The test leaves no descriptor open; for tests that make their own chardevs."""
    before = held()
    yield
    assert not held().descriptors.keys() - before.descriptors.keys()
