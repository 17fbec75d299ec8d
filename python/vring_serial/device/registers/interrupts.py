"""Interrupts as they leave a register model."""

from __future__ import annotations

import enum
from collections.abc import Callable
from threading import RLock
from typing import Protocol


class InterruptSink(Protocol):
    """Where the interrupts of a PCI function go.

    Called in the event loop's thread, or within a driver's access that unmasks or acknowledges.
    """

    def raise_msix(self, vector: int) -> bool:
        """Deliver the MSI-X vector; False if that is impossible now, and it is to stay pending."""
        ...

    def set_intx(self, level: bool) -> None:
        """The level of the interrupt line INTA#; called when it changes."""
        ...

    def msix_descriptor(self, vector: int) -> int:
        """An event descriptor that delivers the vector when 8 bytes are written to it, valid until
        ``PciDevice.vectors_changed`` is called; -1 if there is none: then ``raise_msix`` is used.
        """
        ...


class NoInterrupts:
    """The sink of a device that nobody has connected yet."""

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
        changed: called with the line's new level.
    """

    def __init__(self, changed: Callable[[bool], None]) -> None:
        self._changed = changed
        self._bits = 0
        self._masked = False
        self._level = False
        # Held while the change is told: levels must arrive in the order in which they came about.
        self._lock = RLock()

    @property
    def bits(self) -> int:
        """The events, without acknowledging any."""
        return self._bits

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
        """An event happened."""
        with self._lock:
            self._bits |= event
            self._update()

    def acknowledge(self, events: int) -> None:
        """The driver has handled these."""
        with self._lock:
            self._bits &= ~events
            self._update()

    def take(self) -> int:
        """The events, all of which are acknowledged by this."""
        with self._lock:
            bits = self._bits
            if bits:
                self._bits = 0
                self._update()
            return bits

    def _update(self) -> None:
        level = bool(self._bits) and not self._masked
        if level is not self._level:
            self._level = level
            self._changed(level)
