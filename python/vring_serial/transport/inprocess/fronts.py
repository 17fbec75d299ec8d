"""Devices inside an emulator's own process: memory in, registers to access, interrupts out.

docs/embedding.md shows how.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable
from typing import Generic, Self, TypeVar

from vring import GuestMemory, NotificationData
from vring_serial.callbacks import tell
from vring_serial.device.base import VirtioDevice, check_unserved
from vring_serial.device.pci import Bar, PciDevice
from vring_serial.device.pci.config_space import SIZE as CONFIG_SIZE
from vring_serial.device.pci.state import PCI_SNAPSHOT, FunctionState
from vring_serial.device.registers.host import Host
from vring_serial.device.registers.mmio import MmioDevice
from vring_serial.device.registers.state import RegistersState
from vring_serial.errors import LocalProtocolError
from vring_serial.lifetime import Closing, Starting
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.transport.inprocess.hosts import LoopHost, PolledHost
from vring_serial.transport.inprocess.state import (
    MMIO_SNAPSHOT,
    MmioSnapshotState,
    check_mmio,
    check_pci,
)

log = logging.getLogger(__name__)

__all__ = ["InProcessPci", "InProcessMmio", "Window", "PolledHost", "LoopHost"]


class Window:
    """A range of registers as the emulator sees it.

    Attributes:
        size: bytes.
        read: ``read(offset, size) -> value``, any offset and size; the value's bytes are
            little-endian.
        write: ``write(offset, value, size)``.
    """

    # As a mapping, so that help() of the fronts has them too.
    __slots__ = {
        "read": "read(offset, size) -> value: any offset and size; its bytes are little-endian.",
        "size": "Bytes of the range.",
        "write": "write(offset, value, size): as read.",
    }

    def __init__(
        self,
        size: int,
        read: Callable[[int, int], int],
        write: Callable[[int, int, int], None],
    ) -> None:
        self.size = size
        self.read = read
        self.write = write


ModelT = TypeVar("ModelT", PciDevice, MmioDevice)


class _Front(Closing, Generic[ModelT]):
    """What both fronts offer, whatever the layout of registers.

    A front sets all of these when it is made.
    """

    __slots__ = ()

    _model: ModelT
    _host: Host

    def notification_data(self, queue: int) -> NotificationData | None:
        """Return what the driver's last notification of a queue carried (2.9), which is a hint.

        None before the first one, or if NOTIFICATION_DATA is not negotiated.
        """
        return self._model.notification_data(queue)

    def note_positions(self) -> None:
        """Bring the positions of running rings in ``state`` up to date.

        Exact inside the device's ``settled``.
        """
        self._model.note_positions()

    def save(self) -> bytes:
        """Return all that ``restore`` needs but the guest's memory; the device stands still.

        From then on the device touches neither the guest's memory nor its host ends, as after
        ``set_memory(None)``: copy the memory now. Then go on with :meth:`set_memory`, or close.
        In any thread, as a register access; not in a callback of an interrupt.

        Raises:
            LocalProtocolError: the device does not say what its state is.
        """
        saved: list[bytes] = []
        self._host.run(lambda: saved.append(self._save()))
        return saved[0]

    def set_memory(self, memory: GuestMemory | None) -> None:
        """Exchange the guest's memory; None: queues stand still until there is memory again."""
        self._model.set_memory(memory)

    def reset(self) -> None:
        """Reset the device, as the machine is reset."""
        self._model.reset()

    @abc.abstractmethod
    def _pack(self, device: VirtioDevice) -> bytes:
        """Return the snapshot of a device that is settled."""

    def _save(self) -> bytes:
        device = self._model.device
        with device.settled():
            self._model.note_positions()
            saved = self._pack(device)
            self._model.set_memory(None)
        return saved


class InProcessPci(_Front[PciDevice]):
    """A PCI function for an emulator that has a PCI bus.

    The emulator gives the function a place on its bus, hands accesses to configuration space to
    ``config``, and those to what the guest mapped at its BARs to ``bars``.

    Args:
        host: a PolledHost or a LoopHost.
        device: any virtio device; it belongs to this object until :meth:`close`.
        memory: the guest's; None until :meth:`set_memory`.
        msi: called with address and data of each MSI-X message: what a write to memory would be.
        intx: called with the level of INTA# when it changes.
        transitional, packed, queue_size, vectors: see PciDevice.
        state: to go on from; see PciDevice. Interrupts that are pending in it are told at once.

    Attributes:
        state: see PciDevice, as :meth:`note_positions`.
        config: the 256 bytes of configuration space, a Window: read(offset, size) -> value,
            write(offset, value, size), size.
        bars: by number: each a Window. Their kinds are in ``layout``.
        layout: what each BAR is.

    Raises:
        ConfigError: the device cannot be a PCI function so.
        LocalProtocolError: another front has the device, or it is a Controller not started.
    """

    def __init__(
        self,
        host: Host,
        device: VirtioDevice,
        memory: GuestMemory | None,
        *,
        msi: Callable[[int, int], None],
        intx: Callable[[bool], None],
        transitional: bool = False,
        packed: bool = False,
        queue_size: int = 0,
        vectors: int | None = None,
        state: FunctionState | None = None,
    ) -> None:
        _check_started(device)
        self._model = PciDevice(
            device,
            transitional=transitional,
            packed=packed,
            queue_size=queue_size,
            vectors=vectors,
            host=host,
            state=state,
        )
        self.state = self._model.state
        self._host = host
        self._closed = False
        self._model.set_irq_sink(_Callbacks(self._model, msi, intx))
        self.layout: tuple[Bar, ...] = self._model.bars
        self.config = Window(CONFIG_SIZE, self._model.config_read, self._model.config_write)
        self.bars = {
            bar.index: Window(bar.size, *self._model.bar_access(bar.index)) for bar in self.layout
        }
        self.set_memory(memory)

    def find(self, address: int, *, io: bool = False) -> tuple[Window, int] | None:
        """Return the BAR that the guest mapped at a bus address: its window, and the offset in it.

        ``io``: of I/O space. None if the guest has mapped nothing of this function there.
        """
        for bar in self.layout:
            start = self._model.bar_address(bar.index)
            if bar.io is io and start is not None and start <= address < start + bar.size:
                return self.bars[bar.index], address - start
        return None

    @classmethod
    async def restore(
        cls,
        saved: bytes,
        host: Host,
        device: VirtioDevice,
        memory: GuestMemory | None,
        *,
        msi: Callable[[int, int], None],
        intx: Callable[[bool], None],
        transitional: bool = False,
        packed: bool = False,
        queue_size: int = 0,
        vectors: int | None = None,
    ) -> Self:
        """Return a front that goes on where :meth:`save` was called, in this process or another.

        The guest's memory is as it was when it was copied. The device is made in the same way as
        the one that was saved, with the same ports, and not started: it is started here, once the
        state is known to fit. With a PolledHost: ``host.complete(InProcess...restore(...))``.

        Its host ends are new. Where the guest believes one connected that is not, it is told;
        protocols of ports that the guest has open see a new connection. Interrupts that were
        pending are told at once. The other arguments are the front's; so is what it raises.

        Raises:
            StateError: the state is torn, forged, or of another device, front or version; the
                message says what does not fit. Nothing was started or changed.
            LocalProtocolError: the device was started, or another front has it.
            ResourceError: the device cannot be started.
        """
        snapshot = PCI_SNAPSHOT.unpack(saved)
        take_over = check_pci(
            snapshot,
            device,
            transitional=transitional,
            packed=packed,
            queue_size=queue_size,
            vectors=vectors,
        )
        await _start_from(device, take_over)
        return cls(
            host,
            device,
            memory,
            msi=msi,
            intx=intx,
            transitional=transitional,
            packed=packed,
            queue_size=queue_size,
            vectors=vectors,
            state=snapshot.function,
        )

    def close(self) -> None:
        """Reset and leave the device. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._host.run(self._model.close)

    def _pack(self, device: VirtioDevice) -> bytes:
        return PCI_SNAPSHOT.pack(self._model.snapshot())

    @property
    def intx_level(self) -> bool:
        """The level of INTA#."""
        return self._model.intx_level


class InProcessMmio(Window, _Front[MmioDevice]):
    """A virtio-mmio device for an emulator without a PCI bus: one window.

    Args:
        host: a PolledHost or a LoopHost.
        device: any virtio device; it belongs to this object until :meth:`close`.
        memory: the guest's; None until :meth:`set_memory`.
        interrupt: called with the level of the interrupt line when it changes.
        version, packed, queue_size: see MmioDevice.
        state: to go on from; see MmioDevice. An interrupt that is pending in it is told at once.

    Attributes:
        state: see MmioDevice, as :meth:`note_positions`.
        size: bytes of the registers.
        read: ``read(offset, size) -> value``, any offset and size; the value's bytes are
            little-endian.
        write: ``write(offset, value, size)``.

    Raises:
        ConfigError: the device cannot be served so.
        LocalProtocolError: another front has the device, or it is a Controller not started.
    """

    __slots__ = ("_closed", "_host", "_model", "state")

    def __init__(
        self,
        host: Host,
        device: VirtioDevice,
        memory: GuestMemory | None,
        *,
        interrupt: Callable[[bool], None],
        version: int = 2,
        packed: bool = False,
        queue_size: int = 0,
        state: RegistersState | None = None,
    ) -> None:
        _check_started(device)
        self._host = host
        self._closed = False
        self._model = MmioDevice(
            device, version=version, packed=packed, queue_size=queue_size, host=host, state=state
        )
        self.state = self._model.state
        self._model.on_interrupt = interrupt
        if self._model.interrupt_level:
            interrupt(True)
        super().__init__(self._model.size, self._model.read, self._model.write)
        self.set_memory(memory)

    @classmethod
    async def restore(
        cls,
        saved: bytes,
        host: Host,
        device: VirtioDevice,
        memory: GuestMemory | None,
        *,
        interrupt: Callable[[bool], None],
        version: int = 2,
        packed: bool = False,
        queue_size: int = 0,
    ) -> Self:
        """Return a front that goes on where :meth:`save` was called; see InProcessPci.restore.

        The arguments are this front's. Raises as InProcessPci.restore does.
        """
        snapshot = MMIO_SNAPSHOT.unpack(saved)
        take_over = check_mmio(
            snapshot, device, version=version, packed=packed, queue_size=queue_size
        )
        await _start_from(device, take_over)
        return cls(
            host,
            device,
            memory,
            interrupt=interrupt,
            version=version,
            packed=packed,
            queue_size=queue_size,
            state=snapshot.registers,
        )

    def close(self) -> None:
        """Reset and leave the device. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._host.run(self._model.close)

    def _pack(self, device: VirtioDevice) -> bytes:
        return MMIO_SNAPSHOT.pack(
            MmioSnapshotState(
                device.device_id,
                device.config_size,
                self._model.version,
                self.state,
                device.save_state(),
            )
        )

    @property
    def interrupt_level(self) -> bool:
        """The level of the interrupt line."""
        return self._model.interrupt_level


async def _start_from(device: VirtioDevice, take_over: Callable[[], None]) -> None:
    """Start a device in the state that was saved. Raises as ``restore``."""
    check_unserved(device)
    take_over()
    if isinstance(device, Starting):
        await device.start()


def _check_started(device: VirtioDevice) -> None:
    # Devices that have nothing to start do not say whether they are.
    if not getattr(device, "started", True):
        raise LocalProtocolError(
            f"{device.name} was not started: host.complete(device.start()) comes first"
        )


class _Callbacks:
    """The sink that turns vectors into messages."""

    def __init__(
        self,
        function: PciDevice,
        msi: Callable[[int, int], None],
        intx: Callable[[bool], None],
    ) -> None:
        self._function = function
        self._msi = msi
        self._intx = intx
        self._log = RateLimitedLog(log)

    def raise_msix(self, vector: int) -> bool:
        tell(self._log, "msi", self._msi, *self._function.msix_message(vector))
        return True

    def set_intx(self, level: bool) -> None:
        tell(self._log, "intx", self._intx, level)

    def msix_descriptor(self, vector: int) -> int:
        return -1
