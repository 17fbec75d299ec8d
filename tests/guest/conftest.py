"""A backend that follows a script, and an end for tests that hang."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.scripted_backend import (
    ScriptedServer,
)

#: Seconds after which a test that hangs is ended.
TIME_LIMIT = 60


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """Ends a test that hangs, wherever that is: in a task, a fixture or a call that blocks."""

    def expired(number: int, frame: object) -> None:
        raise TimeoutError(f"the test took more than {TIME_LIMIT} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(TIME_LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
async def scripted(tmp_path: Path) -> AsyncIterator[ScriptedServer]:
    """A scripted backend, listening."""
    server = ScriptedServer(tmp_path / "backend.sock")
    with contextlib.closing(server):
        yield server
