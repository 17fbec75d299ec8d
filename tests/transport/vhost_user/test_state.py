"""Where rings stand while they run, as a state says it."""

from __future__ import annotations

import asyncio
import dataclasses
import os

import pytest

from tests.support.waiting import DEADLINE
from vring import GuestMemory, PackedDriver, Region, SplitDriver
from vring_serial.device.queue_device import QueueDevice
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.proto.vhost_user import VringAddress
from vring_serial.proto.virtio import Feature
from vring_serial.transport.closer import Closer
from vring_serial.transport.vhost_user.state import VringSetup
from vring_serial.transport.vhost_user.vring import Vring

SIZE = 8
USER, BASE = 0x7000_0000, 0x10_0000


class Echo(QueueDevice):
    """Completes every chain."""

    def serve(self, index: int, running: RunningQueue) -> bool:
        while True:
            while (chain := running.queue.pop()) is not None:
                running.queue.push(chain, 0)
            if not running.queue.enable_notifications():
                return False


@pytest.mark.parametrize("packed", [False, True])
async def test_a_ring_goes_on_elsewhere_from_where_it_was_noted(packed: bool) -> None:
    features = int(Feature.VERSION_1) | (int(Feature.RING_PACKED) if packed else 0)
    memory = GuestMemory([Region(BASE, bytearray(1 << 16), user_addr=USER)])
    kind = PackedDriver if packed else SplitDriver
    starts = [0x1000, 0x2000, 0x3000]
    driver = kind(memory, SIZE, *(BASE + start for start in starts))
    address = VringAddress(
        0, 0, descriptor=USER + starts[0], available=USER + starts[1], used=USER + starts[2]
    )
    setup = VringSetup(size=SIZE, packed=packed, address=address, enabled=True)

    for _ in range(5):
        closer = Closer()
        device = Echo("echo", 3, 1)
        vring = Vring(0, dataclasses.replace(setup), device, closer)
        try:
            kick = os.eventfd(0, os.EFD_NONBLOCK)
            vring.set_kick(kick)
            assert vring.run(memory, features, enabled=True)
            vring.begin()
            for _ in range(3):
                driver.add([(BASE + 0x8000, 16)], [])
            driver.publish()
            os.eventfd_write(kick, 1)
            used = 0
            async with asyncio.timeout(DEADLINE):
                while used < 3:
                    used += len(driver.get_used()[0])
                    await asyncio.sleep(0)
            vring.note_position()
            setup = dataclasses.replace(vring.setup, running=False)
            vring.stop()
            assert vring.setup == setup
        finally:
            vring.reset()
