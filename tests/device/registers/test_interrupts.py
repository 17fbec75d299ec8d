"""Events and their line, while two threads are at them."""

from __future__ import annotations

import threading
import time

from vring_serial.device.pci.msix import Msix
from vring_serial.device.registers.interrupts import Event, EventStatus
from vring_serial.device.registers.state import DriverState

ROUNDS = 3000


def test_the_line_follows_events_and_masks():
    levels: list[bool] = []
    status = EventStatus(DriverState(), levels.append)
    status.set(Event.QUEUE)
    status.set(Event.CONFIGURATION)
    assert levels == [True]
    status.acknowledge(Event.QUEUE)
    assert (status.bits, levels) == (2, [True])
    status.masked = True
    assert levels == [True, False]
    status.masked = False
    assert status.take() == 2
    assert status.take() == 0
    assert levels == [True, False, True, False]
    status.masked = True
    status.set(Event.QUEUE)
    assert not status.level
    assert status.take() == 1


def test_no_event_is_lost_between_threads_and_the_line_ends_low():
    levels: list[bool] = []
    status = EventStatus(DriverState(), levels.append)
    done = threading.Event()
    taken = 0

    def driver() -> None:
        nonlocal taken
        while not done.is_set() or status.bits:
            taken |= status.take()

    thread = threading.Thread(target=driver)
    thread.start()
    for number in range(ROUNDS):
        status.set(Event.QUEUE if number % 2 else Event.CONFIGURATION)
    done.set()
    thread.join(20)
    assert taken == 3
    assert not status.level
    assert levels == [True, False] * (len(levels) // 2), "edges come in their order"


class Sink:
    def __init__(self) -> None:
        self.count = 0

    def raise_msix(self, vector: int) -> bool:
        self.count += 1
        return True

    def set_intx(self, level: bool) -> None:
        raise AssertionError("not with MSI-X")

    def msix_descriptor(self, vector: int) -> int:
        return -1


def test_a_vector_that_is_fired_while_it_is_unmasked_is_not_lost():
    msix = Msix(1)
    msix.sink = sink = Sink()
    msix.set_control(True, False)
    stop = threading.Event()

    def driver() -> None:
        while not stop.is_set():
            msix.write_table(12, 1, 4)
            msix.write_table(12, 0, 4)
            msix.deliver_pending()

    thread = threading.Thread(target=driver, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    for _ in range(ROUNDS):
        before = sink.count
        msix.fire(0)
        while sink.count == before:
            assert time.monotonic() < end, "lost"
    stop.set()
    thread.join(20)
    assert sink.count == ROUNDS
    assert msix.state.pending == 0
