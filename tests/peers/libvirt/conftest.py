"""A real libvirtd of Debian testing, in a system of its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.libvirt import LibvirtHost


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.peer("qemu-root", "libvirtd"))
            if os.geteuid():
                item.add_marker(pytest.mark.skip(reason="only root can run libvirtd's system"))


@pytest.fixture
async def libvirt(tmp_path: Path) -> AsyncIterator[LibvirtHost]:
    """libvirtd, which knows no domain yet."""
    host = LibvirtHost(tmp_path)
    try:
        await host.start()
        yield host
    finally:
        await host.aclose()
