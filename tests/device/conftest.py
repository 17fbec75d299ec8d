"""Guests, machines and controllers, which end with the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from tests.support.device_guest import (
    Guest,
    Machine,
    RegisterGuest,
)
from vring_serial.device.base import VirtioDevice
from vring_serial.device.console.config_space import DEFAULT_FEATURES
from vring_serial.device.console.controller import Controller
from vring_serial.proto.virtio import Feature


@pytest.fixture
async def make_machine() -> AsyncIterator[Callable[..., Machine]]:
    """Makes machines, and closes their register models at the end."""
    machines: list[Machine] = []

    def make(device: VirtioDevice, kind: str = "pci", **options: object) -> Machine:
        machines.append(Machine(device, kind, **options))
        return machines[-1]

    yield make
    for machine in machines:
        machine.model.close()


@pytest.fixture
async def make_register_guest() -> AsyncIterator[Callable[..., RegisterGuest]]:
    """Makes guests that use registers, and closes their devices at the end."""
    guests: list[RegisterGuest] = []

    def make(
        controller: Controller, kind: str = "pci", vectors: int | None = None, **options: int
    ) -> RegisterGuest:
        kind, _, packed = kind.partition("+")
        table = {} if vectors is None else {"vectors": vectors}
        machine = Machine(controller, kind, queue_size=64, packed=bool(packed), **table)
        if packed:
            options["features"] = options.get("features", DEFAULT_FEATURES) | Feature.RING_PACKED
        guests.append(RegisterGuest(controller, machine, **options))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


@pytest.fixture
async def make_guest() -> AsyncIterator[Callable[..., Guest]]:
    """Makes guests, and stops their queues at the end."""
    guests: list[Guest] = []

    def make(controller: Controller, **options: int) -> Guest:
        guests.append(Guest(controller, **options))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


@pytest.fixture
async def make_controller() -> AsyncIterator[Callable[..., Controller]]:
    """Makes controllers, and stops them at the end."""
    controllers: list[Controller] = []

    def make(**options: object) -> Controller:
        controllers.append(Controller(**options))  # type: ignore[arg-type]
        return controllers[-1]

    yield make
    for controller in controllers:
        await controller.aclose()
