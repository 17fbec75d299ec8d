"""A driver that floods the control queue leaves others their turns of the loop."""

from __future__ import annotations

import asyncio
import itertools

from tests.support.waiting import until
from vring_serial import turns
from vring_serial.chardev.null import NullChardev
from vring_serial.device.console.port import Port
from vring_serial.proto.console import CONTROL_TRANSMITQ, NO_PORT, ControlEvent, ControlMessage


class Clock:
    """Goes on by a millisecond whenever somebody looks at it."""

    def __init__(self) -> None:
        self._ticks = itertools.count()

    def monotonic(self) -> float:
        return next(self._ticks) * 0.001


async def test_device_ready_again_and_again(make_controller, make_guest, monkeypatch):
    """Each makes the device announce all its ports."""
    controller = make_controller(max_ports=8)
    for nr in range(8):
        controller.add_port(Port(nr, f"port{nr}", NullChardev(f"null{nr}")))
    await controller.start()
    guest = make_guest(controller, size=64)
    guest.boot()
    await guest.ready(7)
    await guest.settle()
    monkeypatch.setattr(turns, "time", Clock())
    told: list[str] = []
    controller.on_event = lambda event: told.append(type(event).__name__)
    loop = asyncio.get_running_loop()

    def others() -> None:
        told.append("others")
        if told.count("DriverReady") < 32:
            loop.call_soon(others)

    loop.call_soon(others)
    guest.collect(CONTROL_TRANSMITQ)
    message = ControlMessage(NO_PORT, ControlEvent.DEVICE_READY, 1).pack()
    ring = guest.rings[CONTROL_TRANSMITQ]
    for _ in range(32):
        address = guest.allocate(len(message))
        guest.memory.write(address, message)
        ring.buffers[ring.driver.add([(address, len(message))], [])] = (address, len(message))
    guest.publish(CONTROL_TRANSMITQ)
    await until(lambda: told.count("DriverReady") >= 32)
    first, last = told.index("DriverReady"), len(told) - told[::-1].index("DriverReady")
    assert told[first:last].count("others") >= 32 / 3 - 1
    await guest.ready(7)
