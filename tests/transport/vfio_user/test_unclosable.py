"""Clients whose descriptors take for ever: to look at, to map, and to close."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.waiting import wait_until
from vring_serial import unix_fds
from vring_serial.proto.framing import Payload
from vring_serial.proto.vfio_user_dma import DmaFlag, DmaMap
from vring_serial.proto.vfio_user_wire import Command, DeviceInfo, IrqIndex, IrqSet, IrqSetFlag

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
    assert server.server.unclosed == len(MESSAGES)
    hostile_files.end()
    wait_until(lambda: not server.server.unclosed)


@pytest.mark.parametrize("how", ["replaced", "disabled", "gone"])
@pytest.mark.parametrize("index", [IrqIndex.MSIX, IrqIndex.INTX])
def test_a_connection_that_lingers_in_an_interrupts_socket(
    server: Any, client: Any, lingering: Callable[[], int], index: IrqIndex, how: str
) -> None:
    client.boot(0, vectors=False)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client.do(Command.DEVICE_SET_IRQS, IrqSet(TRIGGER, index, 0, 1), (theirs.fileno(),))
        fd = lingering()
        unix_fds.send(ours, b"x", [fd])
        os.close(fd)
    if how == "replaced":
        client.set_eventfd(index, 0)
    elif how == "disabled":
        nothing = IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_TRIGGER
        client.do(Command.DEVICE_SET_IRQS, IrqSet(nothing, index, 0, 0))
    else:
        client.close()
        server.wait_for("connected", "gone")
    assert server.server.unclosed == 1
    server.settle()
