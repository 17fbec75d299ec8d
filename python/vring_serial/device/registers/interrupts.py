"""Interrupts as they leave a register model."""

from __future__ import annotations

import enum
from collections.abc import Callable
from threading import RLock
from typing import Protocol

from vring_serial.device.registers.state import DriverState


class InterruptSink(Protocol):
    """Where the interrupts of a PCI function go.

    Called in the event loop's thread, or within a driver's access that unmasks or acknowledges.
    """

    def raise_msix(self, vector: int) -> bool:
        """Deliver the MSI-X vector; return False to leave it pending, if that is impossible now."""
        ...

    def set_intx(self, level: bool) -> None:
        """Set the interrupt line INTA# to ``level``; called when that changes."""
        ...

    def msix_descriptor(self, vector: int) -> int:
        """Return an eventfd that delivers the vector when 8 bytes are written to it.

        It must stay valid until ``PciDevice.vectors_changed`` is called. -1 if there is none: the
        device calls ``raise_msix`` instead.
        """
        ...


class NoInterrupts(InterruptSink):
    """The sink of a device that is not connected to interrupts."""

    def raise_msix(self, vector: int) -> bool:
        return False

    def set_intx(self, level: bool) -> None:
        pass

    def msix_descriptor(self, vector: int) -> int:
        return -1


class Event(enum.IntFlag):
    """Bits of the ISR status and of InterruptStatus (virtio 1.3, 4.1.4.5 and 4.2.2)."""

    QUEUE = 1
    CONFIGURATION = 2


class EventStatus:
    """Events that the driver has not acknowledged, and the interrupt line that says so.

    The driver may acknowledge in another thread than events happen in.

    Args:
        state: holds the events.
        changed: must set the line to this level.
    """

    def __init__(self, state: DriverState, changed: Callable[[bool], None]) -> None:
        self._state = state
        self._changed = changed
        self._masked = False
        self._level = False
        # Held during the callback: levels must arrive in the order in which they came about.
        self._lock = RLock()

    @property
    def bits(self) -> int:
        """The events, without acknowledging any."""
        return self._state.events

    @property
    def level(self) -> bool:
        """The level of the line."""
        return self._level

    @property
    def masked(self) -> bool:
        """Whether events are kept from the line."""
        return self._masked

    @masked.setter
    def masked(self, masked: bool) -> None:
        with self._lock:
            self._masked = masked
            self._update()

    def set(self, event: int) -> None:
        """Record an event."""
        with self._lock:
            self._state.events |= event
            self._update()

    def acknowledge(self, events: int) -> None:
        """Remove events that the driver has handled."""
        with self._lock:
            self._state.events &= ~events
            self._update()

    def take(self) -> int:
        """Return the events and acknowledge all of them."""
        with self._lock:
            bits = self._state.events
            if bits:
                self._state.events = 0
                self._update()
            return bits

    def _update(self) -> None:
        level = bool(self._state.events) and not self._masked
        if level is not self._level:
            self._level = level
            self._changed(level)
