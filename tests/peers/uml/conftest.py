"""A served device and a real Linux kernel (User-Mode Linux) that drives it.

A test that boots has ``bench``, with a device and guests of its own. All others have ``uml``, one
guest for a module. Tests of a module share an event loop: each module says so in ``pytestmark``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.bench import DeviceBench
from tests.support.shared import Shared
from tests.support.uml import PluggedUml


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.peer("linux.uml", "busybox", "virtio_console.ko"))


@pytest_asyncio.fixture(loop_scope="module")
async def bench(tmp_path: Path) -> AsyncIterator[DeviceBench]:
    async with DeviceBench(tmp_path) as bench:
        yield bench


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_uml(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Shared[PluggedUml]]:
    shared = Shared(lambda: PluggedUml.start(tmp_path_factory.mktemp("uml")))
    yield shared
    await shared.aclose()


@pytest_asyncio.fixture(loop_scope="module")
async def uml(
    shared_uml: Shared[PluggedUml], failed: Callable[[], bool]
) -> AsyncIterator[PluggedUml]:
    """The module's guest, booted and without ports."""
    async with shared_uml.turn(failed) as uml:
        yield uml
