"""Real peers as fixtures; the helpers behind them are in tests/support."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.support.vdagent import NEWER_ROOT, VdAgentSession


@pytest.fixture(params=["installed", pytest.param("newer", marks=pytest.mark.peer("vdagent-root"))])
async def vdagent(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[VdAgentSession]:
    """An X server that runs, and a real agent ready to be started on a unix socket.

    It is this machine's, 0.22.1 in Debian 12, and then Debian testing's, 0.23.
    """
    root = NEWER_ROOT if request.param == "newer" else None
    async with VdAgentSession(tmp_path, root) as session:
        yield session


@pytest.fixture
def failed(request: pytest.FixtureRequest) -> Callable[[], bool]:
    """Whether the test has failed, for fixtures that clear up after it."""
    before = request.session.testsfailed
    return lambda: request.session.testsfailed > before
