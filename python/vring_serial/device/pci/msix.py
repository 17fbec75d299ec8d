"""MSI-X: the table, the pending bits, and who is told (PCI 3.0, 6.8.2)."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock

from vring_serial.device.registers.interrupts import InterruptSink, NoInterrupts
from vring_serial.device.registers.queues import NO_VECTOR

ENTRY_SIZE = 16
MAX_VECTORS = 0x800
_CONTROL = 12
_MASKED = 1
#: What software can write in an entry: the address but for its low two bits, data, the mask bit.
_WRITABLE = _MASKED << 96 | 0xFFFFFFFF << 64 | 0xFFFFFFFF_FFFFFFFC


class Msix:
    """The table and the pending bit array of one function.

    Args:
        vectors: entries of the table.

    Attributes:
        sink: where vectors are delivered.
        client_masks: table and masks are kept elsewhere (a vfio-user client keeps them), and
            whoever has the sink decides what can be delivered.
        enabled, function_masked: message control, as configuration space has it.
        may_send: whether the function may send messages at all (Bus Master Enable).
    """

    def __init__(self, vectors: int) -> None:
        self.vectors = vectors
        self.sink: InterruptSink = NoInterrupts()
        self.may_send: Callable[[], bool] = lambda: True
        self.client_masks = False
        self.enabled = False
        self.function_masked = False
        self._table = bytearray(ENTRY_SIZE * vectors)
        self._pending = 0
        # A driver may unmask in another thread than vectors are fired in.
        self._lock = RLock()
        self.reset()

    @property
    def pending(self) -> int:
        """The pending bits, vector 0 lowest."""
        return self._pending

    def reset(self) -> None:
        """All vectors masked, none pending, MSI-X disabled."""
        self.set_control(False, False)
        self.forget_pending()
        for vector in range(self.vectors):
            at = vector * ENTRY_SIZE
            self._table[at : at + ENTRY_SIZE] = bytes(_CONTROL) + b"\1\0\0\0"

    def set_control(self, enabled: bool, function_masked: bool) -> None:
        """Message control was written."""
        with self._lock:
            self.enabled = enabled
            self.function_masked = function_masked

    def forget_pending(self) -> None:
        """What was to be delivered is of no interest any more."""
        self._pending = 0

    def message(self, vector: int) -> tuple[int, int]:
        """Address and data of the vector's message: what a write to memory would be."""
        at = vector * ENTRY_SIZE
        address = int.from_bytes(self._table[at : at + 8], "little")
        return address, int.from_bytes(self._table[at + 8 : at + _CONTROL], "little")

    def masked(self, vector: int) -> bool:
        """Whether the vector must stay pending for now."""
        if not self.may_send():
            return True
        if self.client_masks:
            return False
        return self.function_masked or bool(self._table[vector * ENTRY_SIZE + _CONTROL] & _MASKED)

    def fire(self, vector: int) -> None:
        """Deliver the vector now, or when it can be; NO_VECTOR and what is no vector: never."""
        if vector == NO_VECTOR or vector >= self.vectors:
            return
        with self._lock:
            if not self.enabled:
                return
            if self.masked(vector) or not self.sink.raise_msix(vector):
                self._pending |= 1 << vector

    def deliver_pending(self) -> None:
        """Deliver what was masked or impossible, and is no more."""
        with self._lock:
            if not self.enabled:
                return
            pending, self._pending = self._pending, 0
            while pending:
                vector = (pending & -pending).bit_length() - 1
                pending &= pending - 1
                self.fire(vector)

    # --- the two structures in memory

    def read_table(self, offset: int, size: int) -> int:
        return int.from_bytes(self._table[offset : offset + size], "little")

    def write_table(self, offset: int, value: int, size: int) -> None:
        with self._lock:
            for at in range(offset, offset + size):
                self._write_byte(at, value >> 8 * (at - offset) & 0xFF)

    def _write_byte(self, at: int, value: int) -> None:
        writable = _WRITABLE >> 8 * (at % ENTRY_SIZE) & 0xFF
        self._table[at] = self._table[at] & ~writable & 0xFF | value & writable

    @property
    def pba_size(self) -> int:
        """Bytes of the pending bit array: whole quad words."""
        return (self.vectors + 63) // 64 * 8

    def read_pba(self, offset: int, size: int) -> int:
        return self._pending >> 8 * offset & (1 << 8 * size) - 1

    def write_pba(self, offset: int, value: int, size: int) -> None:
        """Read-only."""
