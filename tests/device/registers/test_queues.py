"""Queues as they are set up, where the machine itself is short of something."""

from __future__ import annotations

import os
import resource

import pytest

from vring import GuestMemory, Region
from vring_serial.device.queue_device import RING_FEATURES, QueueDevice
from vring_serial.device.registers.queues import QueueTable
from vring_serial.device.registers.state import DriverState
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.proto.virtio import Status


@pytest.fixture
def few_descriptors():
    """No descriptor more can be opened, from the moment that the test calls this."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def exhaust() -> None:
        fd = os.dup(0)
        os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd, before[1]))

    yield exhaust
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_without_descriptors_the_device_needs_a_reset(
    make_controller, make_register_guest, few_descriptors
):
    controller = make_controller(max_ports=1)
    guest = make_register_guest(controller)
    guest.registers.accept(guest.features)
    for index in range(4):
        guest.start_queue(index)
    few_descriptors()
    guest.registers.status = 15
    assert guest.registers.status & Status.DEVICE_NEEDS_RESET
    resource.setrlimit(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[1:] * 2)
    guest.forget()
    guest.boot()
    await guest.until(lambda: guest.collect(3) is not None and not guest.rings[3].buffers)
    assert guest.registers.status == 15


async def test_a_descriptor_that_is_none_is_no_guest_s_error(make_controller, make_register_guest):
    guest = make_register_guest(make_controller(max_ports=1))
    guest.start()
    machine = guest.machine
    capability = guest.registers.msix_capability
    machine.descriptors[1] = 1 << 20  # never opened
    machine.pci.set_irq_sink(machine, client_masks=True)
    machine.pci.config_write(capability + 2, 0x8000, 2)
    guest.registers.write_common(22, 1, 2)
    guest.registers.write_common(26, 1, 2)
    assert guest.registers.read_common(26, 2) == 1
    assert guest.registers.status & Status.DEVICE_NEEDS_RESET


class Caller(QueueDevice):
    """Interrupts its driver when the test says so."""

    def __init__(self) -> None:
        super().__init__("caller", 42, 1)
        self.running: RunningQueue | None = None

    def start_queue(self, index: int, queue: RunningQueue) -> None:
        super().start_queue(index, queue)
        self.running = queue

    def serve(self, index: int, running: RunningQueue) -> bool:
        return False


async def test_a_call_that_nobody_has_seen_goes_where_calls_go_from_now_on():
    device = Caller()
    called: list[int] = []
    state = DriverState(features=RING_FEATURES)
    table = QueueTable(
        device, state, 16, called.append, lambda index, error: pytest.fail(f"{error}")
    )
    table.memory = GuestMemory([Region(0, bytearray(1 << 16))])
    setup = table[0]
    setup.descriptor_area, setup.driver_area, setup.device_area = 0x1000, 0x2000, 0x3000
    table.enable(setup)
    table.live = True
    event = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        device.running.call()
        table.route(setup, event)
        assert os.eventfd_read(event) == 1
        device.running.call()
        assert os.eventfd_read(event) == 1
        table.route(setup, event)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(event)  # what has been seen is not told again
    finally:
        table.close()
        os.close(event)
    assert called == []
