"""Interrupts as they leave a register model."""

from __future__ import annotations

from typing import Protocol


class InterruptSink(Protocol):
    """Where interrupts of a PCI function go. Called in the event loop's thread, but for
    ``set_intx(False)``, which happens where the driver's access happens."""

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
