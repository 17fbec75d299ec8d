"""A served device and a guest of Debian testing's kernel in Debian testing's QEMU on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.qemu_ways import WAYS, QemuOnDevice
from tests.support.shared import Shared


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.peer("qemu-root"))


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=WAYS)
async def each_way(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shared[QemuOnDevice]]:
    """One device and one guest for many tests, for each way that QEMU can have the device."""
    way = WAYS[request.param]
    shared = Shared(lambda: QemuOnDevice.start(way, tmp_path_factory.mktemp(request.param)))
    yield shared
    await shared.aclose()
