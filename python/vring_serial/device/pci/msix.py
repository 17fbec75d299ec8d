"""MSI-X: the table, the pending bits, and delivery (PCI 3.0, 6.8.2)."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock

from vring_serial.device.pci.state import ENTRY_MASKED, ENTRY_SIZE, ENTRY_WRITABLE, MsixState
from vring_serial.device.registers.interrupts import InterruptSink, NoInterrupts
from vring_serial.device.registers.state import NO_VECTOR
from vring_serial.errors import ConfigError

MAX_VECTORS = 0x800
_CONTROL = 12
_MASKED = ENTRY_MASKED >> 8 * _CONTROL


class Msix:
    """The table and the pending bit array of one function.

    Args:
        vectors: entries of the table.
        state: to go on from; kept up to date here. Empty: all as after a reset.

    Raises ConfigError if the state has another number of vectors.

    Attributes:
        sink: delivers vectors.
        state: the table and the pending bits.
        client_masks: table and masks are kept elsewhere (a vfio-user client keeps them), and
            whoever has the sink decides what can be delivered.
        enabled, function_masked: message control, as configuration space has it.
        may_send: whether the function may send messages at all (Bus Master Enable).
    """

    def __init__(self, vectors: int, state: MsixState | None = None) -> None:
        self.vectors = vectors
        self.sink: InterruptSink = NoInterrupts()
        self.may_send: Callable[[], bool] = lambda: True
        self.client_masks = False
        self.enabled = False
        self.function_masked = False
        self.state = state or MsixState()
        # A driver may unmask in another thread than vectors are fired in.
        self._lock = RLock()
        if not self.state.table:
            self.state.table += bytes(ENTRY_SIZE * vectors)
            self.reset()
        if len(self.state.table) != ENTRY_SIZE * vectors:
            raise ConfigError(f"the state is not one of {vectors} MSI-X vectors")

    def reset(self) -> None:
        """Mask all vectors, forget what is pending, and disable MSI-X."""
        self.set_control(False, False)
        self.forget_pending()
        for vector in range(self.vectors):
            at = vector * ENTRY_SIZE
            self.state.table[at : at + ENTRY_SIZE] = bytes(_CONTROL) + b"\1\0\0\0"

    def set_control(self, enabled: bool, function_masked: bool) -> None:
        """Handle a write to Message Control."""
        with self._lock:
            self.enabled = enabled
            self.function_masked = function_masked

    def forget_pending(self) -> None:
        """Clear all pending bits."""
        self.state.pending = 0

    def message(self, vector: int) -> tuple[int, int]:
        """Return address and data of the vector's message."""
        at = vector * ENTRY_SIZE
        address = int.from_bytes(self.state.table[at : at + 8], "little")
        return address, int.from_bytes(self.state.table[at + 8 : at + _CONTROL], "little")

    def masked(self, vector: int) -> bool:
        """Return whether the vector must stay pending for now."""
        if not self.may_send():
            return True
        if self.client_masks:
            return False
        return self.function_masked or bool(
            self.state.table[vector * ENTRY_SIZE + _CONTROL] & _MASKED
        )

    def fire(self, vector: int) -> None:
        """Deliver the vector, now or when it is unmasked; ignore NO_VECTOR and unknown vectors."""
        if vector == NO_VECTOR or vector >= self.vectors:
            return
        with self._lock:
            if not self.enabled:
                return
            if self.masked(vector) or not self.sink.raise_msix(vector):
                self.state.pending |= 1 << vector

    def deliver_pending(self) -> None:
        """Deliver pending vectors that are no longer masked."""
        with self._lock:
            if not self.enabled:
                return
            pending, self.state.pending = self.state.pending, 0
            while pending:
                vector = (pending & -pending).bit_length() - 1
                pending &= pending - 1
                self.fire(vector)

    # --- the two structures in memory

    def read_table(self, offset: int, size: int) -> int:
        """Return ``size`` bytes of the table."""
        return int.from_bytes(self.state.table[offset : offset + size], "little")

    def write_table(self, offset: int, value: int, size: int) -> None:
        """Write ``size`` bytes of the table; reserved bits stay."""
        with self._lock:
            for at in range(offset, offset + size):
                self._write_byte(at, value >> 8 * (at - offset) & 0xFF)

    def _write_byte(self, at: int, value: int) -> None:
        writable = ENTRY_WRITABLE >> 8 * (at % ENTRY_SIZE) & 0xFF
        self.state.table[at] = self.state.table[at] & ~writable & 0xFF | value & writable

    @property
    def pba_size(self) -> int:
        """Bytes of the pending bit array: whole quad words."""
        return (self.vectors + 63) // 64 * 8

    def read_pba(self, offset: int, size: int) -> int:
        """Return ``size`` bytes of the pending bit array."""
        return self.state.pending >> 8 * offset & (1 << 8 * size) - 1

    def write_pba(self, offset: int, value: int, size: int) -> None:
        """Ignore the write: the array is read-only."""
