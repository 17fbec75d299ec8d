"""Clients whose descriptors take for ever: to look at, to map, and to close."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vring_serial.proto.payload import Payload
from vring_serial.proto.vfio_user_wire import (
    Command,
    DeviceInfo,
    DmaFlag,
    DmaMap,
    IrqIndex,
    IrqSet,
    IrqSetFlag,
)

TRIGGER = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER
UNMASK = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_UNMASK

MESSAGES: list[tuple[Command, Payload | None]] = [
    (Command.DMA_MAP, DmaMap(DmaFlag.READ | DmaFlag.WRITE, 0, 1 << 30, 4096)),
    (Command.DMA_MAP, DmaMap(DmaFlag.READ, 0, 1 << 30, 4096)),
    (Command.DEVICE_SET_IRQS, IrqSet(TRIGGER, IrqIndex.MSIX, 0, 1)),
    (Command.DEVICE_SET_IRQS, IrqSet(UNMASK, IrqIndex.INTX, 0, 1)),
    (Command.DEVICE_GET_INFO, DeviceInfo()),
]


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """A close that blocks ends the test run: nothing else could."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("which", ["fuse", "overlay"])
def test_a_file_that_does_not_answer_holds_nobody_up(
    server: Any, client: Any, hostile_files: Any, which: str, log: Callable[[], list[str]]
) -> None:
    driver = client.boot(0)
    for command, payload in MESSAGES:
        assert client.refused(command, payload, (getattr(hostile_files, which),))
        assert client.echo(driver, 0, b"served all the same")
    assert any("where an access can wait for ever" in line for line in log())
    assert not hostile_files.gone
    closer = server.server._door.closer
    assert closer.waiting == len(MESSAGES)
    hostile_files.end()
    until = time.monotonic() + 10
    while closer.waiting:
        assert time.monotonic() < until
        time.sleep(0.001)
