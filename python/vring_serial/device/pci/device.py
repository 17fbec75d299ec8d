"""A virtio device as a PCI function (virtio 1.3, 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from vring_serial.device.base import VirtioDevice
from vring_serial.device.pci import layout as at
from vring_serial.device.pci.config_space import (
    Bar,
    Command,
    ConfigSpace,
    Register,
    StatusBit,
)
from vring_serial.device.pci.isr import PciInterrupts
from vring_serial.device.pci.layout import Layout, virtio_capability
from vring_serial.device.pci.legacy import LegacyRegisters
from vring_serial.device.pci.modern import CommonConfig
from vring_serial.device.pci.msix import MAX_VECTORS, Msix
from vring_serial.device.pci.state import (
    ENTRY_SIZE,
    FunctionState,
    PciSnapshotState,
    check_function,
)
from vring_serial.device.registers.bank import RegisterBank
from vring_serial.device.registers.device import RegisterDevice
from vring_serial.device.registers.driver_registers import DriverRegisters, check_saved_registers
from vring_serial.device.registers.host import Host, LoopThread
from vring_serial.device.registers.interrupts import InterruptSink
from vring_serial.device.registers.queues import NO_KICKS
from vring_serial.errors import ConfigError
from vring_serial.proto.virtio import VENDOR_ID
from vring_serial.saving import check_equal

#: Transitional PCI device ids by device type (4.1.2.1).
_TRANSITIONAL_IDS = {
    1: 0x1000,
    2: 0x1001,
    3: 0x1003,
    4: 0x1005,
    5: 0x1002,
    8: 0x1004,
    9: 0x1009,
}
#: PCI class codes by device type, for those that have one; others are "unclassified".
_CLASS_CODES = {1: 0x020000, 2: 0x010000, 3: 0x078000, 8: 0x010000}
_UNCLASSIFIED = 0x00FF00
#: Vectors for devices with more queues: their drivers share one among all queues then. vfio-user
#: clients may send the descriptors of all vectors in one message, which has no room for more.
_DEFAULT_VECTORS_MAX = 253
_INTERRUPT_PIN_A = 1
_MSIX_CONTROL = 2
_MSIX_ENABLE = 1 << 15
_MSIX_FUNCTION_MASK = 1 << 14


def vectors_of(device: VirtioDevice, vectors: int | None) -> int:
    """Return how many MSI-X vectors a function has; ``vectors`` as of PciDevice."""
    return min(device.num_queues + 1, _DEFAULT_VECTORS_MAX) if vectors is None else vectors


@dataclass(frozen=True, slots=True)
class NotifyOffset:
    """The place where a driver notifies a queue, for callers that can watch it themselves.

    Attributes:
        queue: its index.
        bar, offset: the place.
        size: bytes that drivers write there; 4 with NOTIFICATION_DATA. A watch should accept any
            length and any value.
    """

    queue: int
    bar: int
    offset: int
    size: int


class PciDevice(RegisterDevice):
    """The registers of a PCI function with a virtio device behind them.

    Accesses have any offset and size; values are numbers, their bytes little-endian. Outside of
    registers, writes are ignored and reads give zero, or ones beyond the 256 bytes of configuration
    space. No access raises.

    All methods are for the event loop's thread, unless ``host`` brings them there.

    Args:
        device: any virtio device; this object drives it until :meth:`close`.
        transitional: support legacy (pre-1.0) drivers as well.
        packed: offer packed rings.
        queue_size: of every queue, unless the driver chooses less; 0: what the device allows, at
            most 256.
        vectors: entries of the MSI-X table; 0: the function has INTx alone; None: one for each
            queue and one for the configuration, at most 253.
        host: brings accesses into the event loop; None: they come in its thread.
        state: to go on from, of a function made with the same options; taken over.
        records, kick_fds: see QueueTable; taken over unless this raises.

    Attributes:
        state: kept up to date by the function's parts. Positions of rings are exact after
            :meth:`note_positions`.
        bars: the base address registers.
        notify_offsets: one for each queue.

    Raises:
        ConfigError: the device cannot be a PCI function so.
        StateError: the state is not one of such a function; the message says what does not fit.
    """

    def __init__(
        self,
        device: VirtioDevice,
        *,
        transitional: bool = False,
        packed: bool = False,
        queue_size: int = 0,
        vectors: int | None = None,
        host: Host | None = None,
        state: FunctionState | None = None,
        records: Sequence[memoryview] | None = None,
        kick_fds: Mapping[int, int] = NO_KICKS,
    ) -> None:
        vectors = vectors_of(device, vectors)
        if not 0 <= vectors <= MAX_VECTORS:
            raise ConfigError(f"{vectors} MSI-X vectors, at most {MAX_VECTORS} are possible")
        if transitional and device.device_id not in _TRANSITIONAL_IDS:
            raise ConfigError(f"no transitional device of virtio type {device.device_id}")
        if device.config_size > at.DEVICE_CFG_MAX:
            raise ConfigError(f"configuration of {device.config_size} bytes")
        if state is not None:  # before anything is taken
            check_function(state, vectors)
            check_saved_registers(state.registers, device, packed=packed, queue_size=queue_size)
        self.device = device
        self.transitional = transitional
        self.state = state or FunctionState()
        host = host or LoopThread()
        self._layout = Layout(device.num_queues, device.config_size, vectors)
        # First what may refuse the state, before the device is taken.
        self._config = ConfigSpace(self.state.config_space)
        self._msix = Msix(vectors, self.state.msix)
        self._registers = DriverRegisters(
            device,
            queue_size=queue_size,
            packed=packed,
            host=host,
            queue_called=self._queue_called,
            config_changed=self._config_changed,
            was_reset=self._was_reset,
            saved=self.state.registers,
            records=records,
            kick_fds=kick_fds,
        )
        self._msix_at = 0
        self._msix.may_send = lambda: self._registers.bus_master
        self._interrupts = PciInterrupts(self._msix, self._registers, host)
        self._banks = {at.VIRTIO_BAR: self._virtio_bank()}
        self._legacy: LegacyRegisters | None = None
        bars = [self._layout.virtio_bar]
        if vectors:
            self._banks[at.MSIX_BAR] = self._msix_bank()
            bars.insert(0, self._layout.msix_bar)
        if transitional:
            self._legacy = LegacyRegisters(
                self._registers, self._interrupts, self._interrupts.read_isr
            )
            self._banks[at.LEGACY_BAR] = self._legacy.without_msix
            bars.insert(0, self._legacy.bar)
        self.bars: tuple[Bar, ...] = tuple(bars)
        self.notify_offsets = tuple(
            NotifyOffset(index, at.VIRTIO_BAR, at.NOTIFY_CFG + at.NOTIFY_MULTIPLIER * index, 2)
            for index in range(device.num_queues)
        )
        self._make_config_space()

    # --- what the guest accesses

    def config_read(self, offset: int, size: int) -> int:
        """Return ``size`` bytes of the configuration space."""
        return self._config.read(offset, size)

    def config_write(self, offset: int, value: int, size: int) -> None:
        """Write ``size`` bytes of the configuration space."""
        self._config.write(offset, value, size)

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """Return ``size`` bytes at ``offset`` in BAR ``bar``."""
        bank = self._banks.get(bar)
        return 0 if bank is None else bank.read(offset, size)

    def bar_write(self, bar: int, offset: int, value: int, size: int) -> None:
        """Write ``size`` bytes at ``offset`` in BAR ``bar``."""
        bank = self._banks.get(bar)
        if bank is not None:
            bank.write(offset, value, size)

    def bar_access(
        self, bar: int
    ) -> tuple[Callable[[int, int], int], Callable[[int, int, int], None]]:
        """Return the fastest equivalents of :meth:`bar_read` and :meth:`bar_write` for one BAR."""
        if bar == at.LEGACY_BAR or bar not in self._banks:
            return partial(self.bar_read, bar), partial(self.bar_write, bar)
        return self._banks[bar].read, self._banks[bar].write

    # --- what the machine does

    def set_irq_sink(self, sink: InterruptSink, *, client_masks: bool = False) -> None:
        """Deliver interrupts to ``sink``.

        ``client_masks``: the client behind ``sink`` keeps the MSI-X table and masks; those in the
        BAR do not count.
        """
        self._msix.sink = sink
        self._msix.client_masks = client_masks
        self.vectors_changed()
        if self.intx_level:
            sink.set_intx(True)

    def vectors_changed(self) -> None:
        """Ask the sink for its descriptors again, and deliver pending interrupts."""
        self._interrupts.masks_changed()

    def tell_again(self) -> None:
        """Interrupt the driver for everything, in case a predecessor of this process owed it."""
        self._interrupts.tell_again()

    @property
    def shared_kicks(self) -> list[int]:
        """The indices of the queues whose :meth:`kick_fd` others have."""
        return self._registers.queues.shared_kicks

    def take_changed_queues(self) -> set[int]:
        """Return the indices of queues whose ``state`` changed since the last call; at first all.

        The values of notifications do not count.
        """
        queues = self._registers.queues
        changed, queues.changed = queues.changed, set()
        return changed

    @property
    def intx_level(self) -> bool:
        """The level of INTA#."""
        return self._interrupts.level

    @property
    def vectors(self) -> int:
        """Entries of the MSI-X table."""
        return self._msix.vectors

    def msix_message(self, vector: int) -> tuple[int, int]:
        """Return address and data of the vector's message, for a sink that delivers messages."""
        return self._msix.message(vector)

    def bar_address(self, bar: int) -> int | None:
        """Return the address of the BAR as the guest has mapped it; None if disabled or absent."""
        found = next((each for each in self.bars if each.index == bar), None)
        if found is None:
            return None
        wanted = Command.IO_SPACE if found.io else Command.MEMORY_SPACE
        if not self._config.word(Register.COMMAND) & wanted:
            return None
        return self._config.double_word(found.register) & -found.size

    def reset(self) -> None:
        """Reset the device and the function's configuration to their state after power-on."""
        self._config.reset()
        self._msix.reset()
        self._registers.reset()
        self._command_written()
        self._msix_written()

    def snapshot(self) -> PciSnapshotState:
        """Return all that :meth:`check_snapshot` of another function needs but guest memory.

        Called inside the device's ``settled``, with positions noted. Raises LocalProtocolError if
        the device does not say what its state is.
        """
        device = self.device
        return PciSnapshotState(
            device.device_id,
            device.config_size,
            self.transitional,
            self.vectors,
            self.state,
            device.save_state(),
        )

    def check_snapshot(self, saved: PciSnapshotState) -> Callable[[], None]:
        """Check that this function, in use, can go on from a snapshot; return what does so.

        Guest memory is not known then (``set_memory(None)``). Nothing changes before the result is
        called, which does not fail. Raises StateError that names what does not fit.
        """
        check_equal("the virtio device type", saved.device_id, self.device.device_id)
        check_equal("transitional", saved.transitional, self.transitional)
        check_equal("the number of MSI-X vectors", saved.vectors, self.vectors)
        take_over = self.device.check_state(saved.device)
        check_equal(
            "the size of the configuration space", saved.config_size, self.device.config_size
        )
        check_function(saved.function, self.vectors)
        self._registers.check(saved.function.registers)
        return lambda: self._take(saved.function, take_over)

    def _take(self, function: FunctionState, take_over: Callable[[], None]) -> None:
        self.reset()
        take_over()
        if function.config_space:
            self._config.take(function.config_space)
        if function.msix.table:
            self.state.msix.table[:] = function.msix.table
        self.state.msix.pending = function.msix.pending
        self._registers.take(function.registers)
        self._command_written()
        self._msix_written()

    # --- its parts

    def _virtio_bank(self) -> RegisterBank:
        registers = self._registers
        bank = RegisterBank(self._layout.virtio_bar.size)
        CommonConfig(registers, self._interrupts, bank)
        bank.register(at.ISR_CFG, 1, self._interrupts.read_isr)
        if self.device.config_size:
            size = self.device.config_size
            bank.window(at.DEVICE_CFG, size, registers.read_config, registers.write_config)
        for index, notify in enumerate(registers.notifiers):
            # The place says which queue it is: the value need not be looked at.
            where = at.NOTIFY_CFG + at.NOTIFY_MULTIPLIER * index
            bank.register(where, at.NOTIFY_MULTIPLIER, None, notify, also_written_as=(1, 2))
        return bank

    def _msix_bank(self) -> RegisterBank:
        bank = RegisterBank(self._layout.msix_bar.size)
        table_size = self._msix.vectors * ENTRY_SIZE
        bank.window(0, table_size, self._msix.read_table, self._interrupts.write_table)
        pba = self._layout.pba_offset
        bank.window(pba, self._msix.pba_size, self._msix.read_pba, self._msix.write_pba)
        return bank

    def _make_config_space(self) -> None:
        config = self._config
        kind = self.device.device_id
        device_id = _TRANSITIONAL_IDS[kind] if self.transitional else 0x1040 + kind
        config.set(Register.VENDOR_ID, VENDOR_ID, 2)
        config.set(Register.DEVICE_ID, device_id, 2)
        config.set(Register.COMMAND, 0, 2, self._command_bits())
        config.set(Register.REVISION, 0 if self.transitional else 1, 1)
        config.set(Register.CLASS, _CLASS_CODES.get(kind, _UNCLASSIFIED), 3)
        config.set(Register.CACHE_LINE_SIZE, 0, 1, 0xFF)
        config.set(Register.LATENCY_TIMER, 0, 1, 0xFF)
        config.set(Register.SUBSYSTEM_VENDOR_ID, VENDOR_ID, 2)
        config.set(Register.SUBSYSTEM_ID, kind if self.transitional else 0x1100, 2)
        config.set(Register.INTERRUPT_LINE, 0, 1, 0xFF)
        config.set(Register.INTERRUPT_PIN, _INTERRUPT_PIN_A, 1)
        for bar in self.bars:
            config.add_bar(bar)
        config.on_write(Register.COMMAND, 2, self._command_written)
        config.on_read(Register.STATUS, 1, self._status_read)
        if self.vectors:
            control = (_MSIX_ENABLE | _MSIX_FUNCTION_MASK).to_bytes(2, "little")
            self._msix_at = config.add_capability(
                self._layout.msix_capability(), bytes(_MSIX_CONTROL) + control
            )
            config.on_write(self._msix_at + _MSIX_CONTROL, 2, self._msix_written)
        for capability in self._layout.virtio_capabilities():
            config.add_capability(capability)
        self._add_window()
        config.seal()
        self._command_written()
        self._msix_written()

    def _command_bits(self) -> int:
        bits = Command.MEMORY_SPACE | Command.BUS_MASTER | Command.INTX_DISABLE
        bits |= Command.PARITY_ERROR_RESPONSE | Command.SERR_ENABLE
        return bits | Command.IO_SPACE if self.transitional else bits

    def _command_written(self) -> None:
        command = self._config.word(Register.COMMAND)
        may_run = bool(command & Command.BUS_MASTER)
        if may_run != self._registers.may_run:
            self._registers.may_run = may_run
            # MSI-X messages are writes to memory: they wait with the queues (PCI 3.0, 6.8.2).
            self._interrupts.masks_changed()
        self._interrupts.disable_intx(bool(command & Command.INTX_DISABLE))

    def _status_read(self) -> None:
        status = self._config.data[Register.STATUS] & ~StatusBit.INTERRUPT
        pending = StatusBit.INTERRUPT if self._interrupts.status else 0
        self._config.data[Register.STATUS] = status | pending

    def _msix_written(self) -> None:
        control = self._config.word(self._msix_at + _MSIX_CONTROL) if self.vectors else 0
        self._interrupts.set_msix(bool(control & _MSIX_ENABLE), bool(control & _MSIX_FUNCTION_MASK))
        if self._legacy is not None:
            legacy = self._legacy
            bank = legacy.with_msix if self._msix.enabled else legacy.without_msix
            self._banks[at.LEGACY_BAR] = bank

    # --- the PCI configuration access capability (4.1.4.9)

    def _add_window(self) -> None:
        body = virtio_capability(at.CapabilityType.PCI_CFG, 0, 0, bytes(4))
        writable = bytes(4) + b"\xff" + bytes(3) + b"\xff" * 12
        self._window_at = self._config.add_capability(body, writable)
        self._config.on_read(self._window_at + 16, 4, self._read_window)
        self._config.on_write(self._window_at + 16, 4, self._write_window)

    def _window(self) -> tuple[int, int, int] | None:
        """Return BAR, offset and size of the access that the driver asks for; None if invalid."""
        bar = self._config.data[self._window_at + 4]
        offset = self._config.double_word(self._window_at + 8)
        size = self._config.double_word(self._window_at + 12)
        if size not in (1, 2, 4) or offset % size or bar not in (each.index for each in self.bars):
            return None
        return bar, offset, size

    def _read_window(self) -> None:
        window = self._window()
        if window is not None:
            value = self.bar_read(*window)
            start = self._window_at + 16
            self._config.data[start : start + window[2]] = value.to_bytes(window[2], "little")

    def _write_window(self) -> None:
        window = self._window()
        if window is not None:
            bar, offset, size = window
            start = self._window_at + 16
            value = int.from_bytes(self._config.data[start : start + size], "little")
            self.bar_write(bar, offset, value, size)

    # --- interrupts

    def _queue_called(self, index: int) -> None:
        self._interrupts.queue(self._registers.queues[index])

    def _config_changed(self) -> None:
        self._interrupts.configuration()

    def _was_reset(self) -> None:
        self._interrupts.reset()
