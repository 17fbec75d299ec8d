"""Clients that make their descriptors block under the server, or exchange them for other kinds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.call_end import CallEnd
from tests.support.waiting import wait_until
from vring_serial.proto.vfio_user_dma import DmaUnmap
from vring_serial.proto.vfio_user_regions import RegionIoFds
from vring_serial.proto.vfio_user_wire import Command, IrqIndex, IrqSet, IrqSetFlag

NOTIFY_BAR = 4
MEMORY_SIZE = 1 << 20


pytestmark = pytest.mark.usefixtures("blocked_call_ends_the_run")


@pytest.fixture
def pumped_client(pumped: Any, make_server: Callable[..., Any], new_client: Callable) -> Any:
    """Its queue 0 runs; the driver's notifications go by eventfd."""
    client = new_client(make_server(pumped))
    client.boot(0)
    asked = RegionIoFds(NOTIFY_BAR, argsz=4096)
    client.ask(Command.DEVICE_GET_REGION_IO_FDS, asked, RegionIoFds)
    return client


def set_interrupt(client: Any, fd: int) -> None:
    what = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER
    client.do(Command.DEVICE_SET_IRQS, IrqSet(what, IrqIndex.MSIX, 1, 1), (fd,))


def send_chain(client: Any) -> None:
    if client.put(0, b"x"):
        os.eventfd_write(client.received_fds[0], 1)


def wait_all_used(driver: Any) -> None:
    wait_until(lambda: (driver.get_used(), driver.num_free == driver.size)[1])


def test_interrupts_of_another_kind_than_before(
    pumped_client: Any, make_call: Callable[[str], Any]
) -> None:
    """Whatever it was when the ring began to run, a driver that sleeps on it is woken."""
    client = pumped_client
    for before, after in itertools.permutations(CallEnd.KINDS, 2):
        client.ask(Command.DMA_UNMAP, DmaUnmap(0, MEMORY_SIZE), DmaUnmap)
        set_interrupt(client, make_call(before).fd)
        client.map_memory()
        call = make_call(after)
        set_interrupt(client, call.fd)
        for _ in range(3):
            send_chain(client)
            call.wait()
            wait_all_used(client.drivers[0])


def test_kinds_of_interrupts_are_exchanged_under_traffic(
    pumped_client: Any, make_call: Callable[[str], Any]
) -> None:
    """By a client that fills them."""
    client = pumped_client
    calls = [make_call(kind) for kind in CallEnd.KINDS]
    for turn in range(40):
        for call in calls:
            set_interrupt(client, call.fd)
            for _ in range(4):
                send_chain(client)
                call.fill()
                send_chain(client)
                wait_all_used(client.drivers[0])
            call.empty()
            send_chain(client)
            call.wait()
            if call is calls[turn % len(calls)]:
                client.ask(Command.DMA_UNMAP, DmaUnmap(0, MEMORY_SIZE), DmaUnmap)
                client.map_memory()
