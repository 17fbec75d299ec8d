"""Real peers as fixtures; the helpers behind them are the files beside this one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def load_helper(name: str) -> ModuleType:
    """The module of a helper file beside this one; test directories are no packages."""
    full = f"vring_test_peers_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).parent / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[full] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full]


@pytest.fixture
async def vdagent(tmp_path: Path) -> AsyncIterator[Any]:
    """An X server that runs, and the real agent ready to be started on a unix socket."""
    async with load_helper("vdagent").VdAgentSession(tmp_path) as session:
        yield session
