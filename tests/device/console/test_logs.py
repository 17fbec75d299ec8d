"""What a guest causes in loops does not fill the log."""

from __future__ import annotations

import logging

import pytest

from vring import RingError
from vring_serial.device.console import events as ev
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.events import Side
from vring_serial.proto.console import (
    ConsoleConfig,
)


def test_a_guest_that_opens_and_closes_in_a_loop_fills_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    controller = Controller()
    for _ in range(1000):
        controller.emit(ev.PortOpened(Side.GUEST, 1))
        controller.emit(ev.PortClosed(Side.GUEST, 1))
    assert len(caplog.records) == 20
    controller.emit(ev.PortOpened(Side.GUEST, 2))
    assert len(caplog.records) == 21  # other ports are heard


def test_a_guest_that_starts_breaks_and_resets_in_a_loop_fills_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    controller = Controller()
    broken = ev.QueueBroken(3, RingError("queue 3", 0, "garbage"))
    for _ in range(1000):
        controller.emit(ev.FeaturesNegotiated(1 << 32))
        controller.emit(ev.DriverReady())
        controller.emit(broken)
        controller.emit(ev.DeviceReset())
        controller.emit(ev.PortReady(1))
    # Each kind by itself: what broke is not lost among resets.
    assert len(caplog.records) == 100
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 20


def test_all_ports_that_open_and_close_in_loops_share_one_budget(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    controller = Controller(max_ports=511)
    for _ in range(20):
        for nr in range(511):
            controller.emit(ev.PortOpened(Side.GUEST, nr))
            controller.emit(ev.PortClosed(Side.GUEST, nr))
    assert len(caplog.records) < 4100  # of 10220 that each port by itself may log in 10 s


def test_emergency_writes_in_a_loop_fill_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    controller = Controller()
    for _ in range(5000):
        controller.write_config(ConsoleConfig.EMERG_WR, b"x\0\0\0")
    assert len(caplog.records) == 20
