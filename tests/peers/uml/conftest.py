"""A served device and a real Linux kernel (User-Mode Linux) that drives it, in one test."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from vring_serial.guest.uml import UmlGuest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.peer("linux.uml", "busybox", "virtio_console.ko"))


async def boot(bench: Any, memory_mib: int = 128) -> UmlGuest:
    guest = UmlGuest([bench.path], memory_mib=memory_mib)
    bench.guests.append(guest)
    await guest.start()
    return guest


@pytest.fixture
async def bench(bench_type: type[Any], tmp_path: Path) -> AsyncIterator[Any]:
    bench = bench_type(tmp_path, boot)
    try:
        yield bench
    finally:
        await bench.aclose()


class Payload:
    """Random bytes in a file that the guest sees as /mnt/NAME, and their checksum."""

    def __init__(self, guest: UmlGuest, size: int, name: str = "payload") -> None:
        self.size = size
        self.data = os.urandom(size)
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        self.guest_path = f"/mnt/{name}"
        (guest.share / name).write_bytes(self.data)


@pytest.fixture
def payload() -> Callable[[UmlGuest, int], Payload]:
    return Payload
