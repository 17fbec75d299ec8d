"""A virtio device in a range of memory (virtio 1.3, 4.2): version 2, and the legacy version 1."""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from functools import partial

from vring_serial.callbacks import tell
from vring_serial.device.base import VirtioDevice
from vring_serial.device.registers.bank import RegisterBank
from vring_serial.device.registers.device import RegisterDevice
from vring_serial.device.registers.driver_registers import DriverRegisters
from vring_serial.device.registers.host import Host, LoopThread
from vring_serial.device.registers.interrupts import Event, EventStatus
from vring_serial.device.registers.state import QUEUE_AREAS, RegistersState
from vring_serial.errors import ConfigError
from vring_serial.proto.virtio import MMIO_MAGIC, VENDOR_ID
from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger(__name__)


class MmioRegister(enum.IntEnum):
    """Offsets of registers (4.2.2); those of the legacy interface alone are marked (4.2.4)."""

    MAGIC_VALUE = 0x000
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SEL = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SEL = 0x024
    GUEST_PAGE_SIZE = 0x028  # legacy
    QUEUE_SEL = 0x030
    QUEUE_NUM_MAX = 0x034
    QUEUE_NUM = 0x038
    QUEUE_ALIGN = 0x03C  # legacy
    QUEUE_PFN = 0x040  # legacy
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESC_LOW = 0x080
    QUEUE_DRIVER_LOW = 0x090
    QUEUE_DEVICE_LOW = 0x0A0
    SHM_LEN_LOW = 0x0B0
    SHM_LEN_HIGH = 0x0B4
    SHM_BASE_LOW = 0x0B8
    SHM_BASE_HIGH = 0x0BC
    QUEUE_RESET = 0x0C0
    CONFIG_GENERATION = 0x0FC
    CONFIG = 0x100


#: Registers of the areas' addresses, low half first; the high half follows.
MMIO_AREAS = (
    MmioRegister.QUEUE_DESC_LOW,
    MmioRegister.QUEUE_DRIVER_LOW,
    MmioRegister.QUEUE_DEVICE_LOW,
)
#: What device trees usually give a device.
_SIZE_MIN = 0x200
_ONES = 0xFFFFFFFF


class MmioDevice(RegisterDevice):
    """The registers of one virtio-mmio device.

    Accesses have any offset and size; values are numbers, their bytes little-endian. Where nothing
    is, writes are ignored and reads give zero. No access raises.

    All methods are for the event loop's thread, unless ``host`` brings them there.

    Args:
        device: any virtio device; this object drives it until :meth:`close`.
        version: 2, or 1 for legacy drivers.
        packed: offer packed rings; not with version 1.
        notification_data: offer NOTIFICATION_DATA, with version 2. Whoever watches QueueNotify for
            the number of a queue (a KVM ioeventfd) must not: the upper half of what drivers write
            varies then.
        queue_size: of every queue, unless the driver chooses less; 0: what the device allows, at
            most 256.
        host: brings accesses into the event loop; None: they come in its thread.
        state: the registers to go on from, of a device made with the same options; taken over.

    Attributes:
        state: all registers. Positions of rings are exact after :meth:`note_positions`.
        size: bytes of the range, a power of two.
        on_interrupt: must set the interrupt line to the level that it gets; called when that
            changes, in the event loop's thread or within the driver's access that acknowledges.

    Raises:
        ConfigError: the device cannot be served so.
    """

    def __init__(
        self,
        device: VirtioDevice,
        *,
        version: int = 2,
        packed: bool = False,
        notification_data: bool = True,
        queue_size: int = 0,
        host: Host | None = None,
        state: RegistersState | None = None,
    ) -> None:
        if version not in (1, 2):
            raise ConfigError(f"virtio-mmio has versions 1 and 2, not {version}")
        if packed and version == 1:
            raise ConfigError("virtio-mmio version 1 has no packed rings")
        self.device = device
        self.version = version
        self.on_interrupt: Callable[[bool], None] | None = None
        self._log = RateLimitedLog(log)
        self.size = 1 << (max(MmioRegister.CONFIG + device.config_size, _SIZE_MIN) - 1).bit_length()
        self._registers = DriverRegisters(
            device,
            queue_size=queue_size,
            packed=packed,
            notification_data=notification_data,
            host=host or LoopThread(),
            legacy=version == 1,
            queue_called=self._queue_called,
            config_changed=self._config_changed,
            was_reset=self._was_reset,
            saved=state,
        )
        self.state = self._registers.saved
        self._state = self._registers.state
        self._events = EventStatus(self._state, self._level_changed)
        self._events.masked = False  # the level that events of the state ask for
        self._bank = RegisterBank(self.size)
        self._place_common()
        if version == 2:
            self._place_version_2()
        else:
            self._place_version_1()
        #: ``size`` bytes at ``offset``: read(offset, size) -> value.
        self.read: Callable[[int, int], int] = self._bank.read
        #: Write ``size`` bytes at ``offset``: write(offset, value, size).
        self.write: Callable[[int, int, int], None] = self._bank.write

    @property
    def interrupt_level(self) -> bool:
        """The level of the interrupt line."""
        return self._events.level

    def reset(self) -> None:
        """Reset the device and all registers to their state after power-on."""
        self._registers.reset()

    # --- registers

    def _place_common(self) -> None:
        registers, state, at = self._registers, self._state, self._bank.register
        reg = MmioRegister
        at(reg.MAGIC_VALUE, 4, lambda: MMIO_MAGIC)
        at(reg.VERSION, 4, lambda: self.version)
        at(reg.DEVICE_ID, 4, lambda: self.device.device_id)
        at(reg.VENDOR_ID, 4, lambda: VENDOR_ID)
        at(reg.DEVICE_FEATURES_SEL, 4, None, partial(setattr, state, "device_feature_select"))
        at(reg.DRIVER_FEATURES_SEL, 4, None, partial(setattr, state, "driver_feature_select"))
        at(reg.QUEUE_SEL, 4, None, partial(setattr, state, "queue_select"))
        at(reg.QUEUE_NUM_MAX, 4, self._read_queue_size_max)
        at(reg.QUEUE_NUM, 4, None, registers.selected.write_size)
        at(reg.QUEUE_NOTIFY, 4, None, registers.notify_queue, also_written_as=(1, 2))
        at(reg.INTERRUPT_STATUS, 4, lambda: self._events.bits)
        at(reg.INTERRUPT_ACK, 4, None, self._events.acknowledge)
        at(reg.STATUS, 4, registers.read_status, registers.write_status)
        size = self.device.config_size
        if size:
            self._bank.window(reg.CONFIG, size, registers.read_config, registers.write_config)

    def _place_version_2(self) -> None:
        features, selected = self._registers.features, self._registers.selected
        at = self._bank.register
        reg = MmioRegister
        at(reg.DEVICE_FEATURES, 4, features.read_device)
        at(reg.DRIVER_FEATURES, 4, None, features.write_driver)
        at(reg.QUEUE_READY, 4, selected.read_enable, self._write_queue_ready)
        for offset, area in zip(MMIO_AREAS, QUEUE_AREAS, strict=True):
            at(offset, 4, None, partial(selected.write_area, area, 0))
            at(offset + 4, 4, None, partial(selected.write_area, area, 32))
        for offset in (
            *(reg.SHM_LEN_LOW, reg.SHM_LEN_HIGH),
            *(reg.SHM_BASE_LOW, reg.SHM_BASE_HIGH),
        ):
            # There is no shared memory: length and address are -1, whatever SHMSel says.
            at(offset, 4, lambda: _ONES)
        # A reset is over before the write that asks for it returns: it never reads as 1.
        at(reg.QUEUE_RESET, 4, None, self._write_queue_reset)
        at(reg.CONFIG_GENERATION, 4, lambda: self._state.config_generation)

    def _place_version_1(self) -> None:
        selected, at = self._registers.selected, self._bank.register
        reg = MmioRegister
        at(reg.DEVICE_FEATURES, 4, self._registers.features.read_device_legacy)
        at(reg.DRIVER_FEATURES, 4, None, self._write_legacy_features)
        at(reg.GUEST_PAGE_SIZE, 4, None, partial(setattr, self._state, "page_size"))
        at(reg.QUEUE_ALIGN, 4, None, selected.write_legacy_alignment)
        at(reg.QUEUE_PFN, 4, self._read_queue_page, self._write_queue_page)

    def _read_queue_size_max(self) -> int:
        registers = self._registers
        return 0 if registers.selected.setup is None else registers.queues.size_max

    def _write_queue_ready(self, value: int) -> None:
        if value == 1:
            self._registers.selected.enable()
        elif value == 0:
            self._registers.selected.disable()

    def _write_queue_reset(self, value: int) -> None:
        if value == 1:
            self._registers.selected.reset()

    # --- registers of version 1 alone

    def _write_legacy_features(self, word: int) -> None:
        if self._state.driver_feature_select == 0:
            self._registers.write_legacy_features(word)

    def _read_queue_page(self) -> int:
        page_size = self._state.page_size
        return self._registers.selected.read_legacy_address() // page_size if page_size else 0

    def _write_queue_page(self, value: int) -> None:
        self._registers.selected.write_legacy_address(value * self._state.page_size)

    # --- interrupts

    def _queue_called(self, index: int) -> None:
        self._events.set(Event.QUEUE)

    def _config_changed(self) -> None:
        self._events.set(Event.CONFIGURATION)

    def _was_reset(self) -> None:
        self._state.page_size = 0
        self._events.take()

    def _level_changed(self, level: bool) -> None:
        tell(self._log, f"{self.device.name}: on_interrupt", self.on_interrupt, level)
