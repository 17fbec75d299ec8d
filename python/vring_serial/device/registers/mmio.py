"""A virtio device in a range of memory (virtio 1.3, 4.2): version 2, and the legacy version 1."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from vring import GuestMemory, NotificationData
from vring_serial.callbacks import tell
from vring_serial.device.base import VirtioDevice
from vring_serial.device.registers.bank import RegisterBank
from vring_serial.device.registers.driver_registers import DriverRegisters
from vring_serial.device.registers.host import Host, LoopThread
from vring_serial.device.registers.interrupts import Event, EventStatus
from vring_serial.errors import ConfigError
from vring_serial.lifetime import Closing
from vring_serial.proto.virtio import MMIO_MAGIC, VENDOR_ID
from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger(__name__)

_CONFIG = 0x100
#: What device trees usually give a device.
_SIZE_MIN = 0x200
_ONES = 0xFFFFFFFF


class MmioDevice(Closing):
    """The registers of one virtio-mmio device.

    Accesses have any offset and size; values are numbers, their bytes little-endian. Where nothing
    is, writes are ignored and reads give zero. No access raises.

    All methods are for the event loop's thread, unless ``host`` brings them there.

    Args:
        device: any virtio device; it belongs to this object until :meth:`close`.
        version: 2, or 1 for legacy drivers.
        packed: offer packed rings; not with version 1.
        notification_data: offer NOTIFICATION_DATA, with version 2. Whoever watches QueueNotify for
            the number of a queue (a KVM ioeventfd) must not: the upper half of what drivers write
            varies then.
        queue_size: of every queue, unless the driver chooses less; 0: what the device allows, at
            most 256.
        host: brings accesses into the event loop; None: they come in its thread.

    Attributes:
        size: bytes of the range, a power of two.
        on_interrupt: called with the level of the interrupt line when it changes: in the event
            loop's thread, or within the driver's access that acknowledges.

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
    ) -> None:
        if version not in (1, 2):
            raise ConfigError(f"virtio-mmio has versions 1 and 2, not {version}")
        if packed and version == 1:
            raise ConfigError("virtio-mmio version 1 has no packed rings")
        self.device = device
        self.version = version
        self.on_interrupt: Callable[[bool], None] | None = None
        self._said = RateLimitedLog(log)
        self.size = 1 << (max(_CONFIG + device.config_size, _SIZE_MIN) - 1).bit_length()
        self._events = EventStatus(self._level_changed)
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
        )
        self._page_size = 0
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

    def set_memory(self, memory: GuestMemory | None) -> None:
        """Exchange the guest's memory; queues that run go on in it without losing anything.

        None: queues stand still until there is memory again.
        """
        self._registers.set_memory(memory)

    def kick_fd(self, queue: int) -> int:
        """An eventfd that notifies the queue, the device's own until :meth:`close`: for those who
        watch QueueNotify (offset 0x50) themselves. OSError if there are no more descriptors."""
        return self._registers.queues.kick_fd(queue)

    def notification_data(self, queue: int) -> NotificationData | None:
        """What the driver's last notification of a queue carried (2.9): its word, and no more than
        a hint. None: nothing yet, or NOTIFICATION_DATA is not negotiated."""
        return self._registers.notification_data(queue)

    @property
    def interrupt_level(self) -> bool:
        """The level of the interrupt line."""
        return self._events.level

    def reset(self) -> None:
        """As after power-on."""
        self._registers.reset()

    def close(self) -> None:
        """Reset and leave the device; close all descriptors. Safe to call twice."""
        self._registers.close()

    # --- registers

    def _place_common(self) -> None:
        registers, at = self._registers, partial(self._bank.register)
        at(0x000, 4, lambda: MMIO_MAGIC)
        at(0x004, 4, lambda: self.version)
        at(0x008, 4, lambda: self.device.device_id)
        at(0x00C, 4, lambda: VENDOR_ID)
        at(0x014, 4, None, partial(setattr, registers, "device_feature_select"))
        at(0x024, 4, None, partial(setattr, registers, "driver_feature_select"))
        at(0x030, 4, None, partial(setattr, registers, "queue_select"))
        at(0x034, 4, self._read_queue_size_max)
        at(0x038, 4, None, registers.write_queue_size)
        at(0x050, 4, None, registers.notify_queue, also_written_as=(1, 2))
        at(0x060, 4, lambda: self._events.bits)
        at(0x064, 4, None, self._events.acknowledge)
        at(0x070, 4, registers.read_status, registers.write_status)
        config_size = self.device.config_size
        if config_size:
            self._bank.window(_CONFIG, config_size, registers.read_config, registers.write_config)

    def _place_version_2(self) -> None:
        registers, at = self._registers, self._bank.register
        at(0x010, 4, registers.read_device_feature)
        at(0x020, 4, None, registers.write_driver_feature)
        at(0x044, 4, registers.read_queue_enable, self._write_queue_ready)
        areas = ("descriptor_area", "driver_area", "device_area")
        for offset, area in zip((0x080, 0x090, 0x0A0), areas, strict=True):
            at(offset, 4, None, partial(registers.write_area, area, 0))
            at(offset + 4, 4, None, partial(registers.write_area, area, 32))
        for offset in (0x0B0, 0x0B4, 0x0B8, 0x0BC):
            # There is no shared memory: length and address are -1, whatever SHMSel says.
            at(offset, 4, lambda: _ONES)
        # A reset is over before the write that asks for it returns: it never reads as 1.
        at(0x0C0, 4, None, self._write_queue_reset)
        at(0x0FC, 4, lambda: registers.generation)

    def _place_version_1(self) -> None:
        registers, at = self._registers, self._bank.register
        at(0x010, 4, registers.read_legacy_device_feature)
        at(0x020, 4, None, registers.write_legacy_driver_feature)
        at(0x028, 4, None, self._write_page_size)
        at(0x03C, 4, None, self._write_queue_align)
        at(0x040, 4, self._read_queue_page, self._write_queue_page)

    def _read_queue_size_max(self) -> int:
        registers = self._registers
        return registers.queues.size_max if registers.queue_select < len(registers.queues) else 0

    def _write_queue_ready(self, value: int) -> None:
        if value == 1:
            self._registers.enable_queue()
        elif value == 0:
            self._registers.disable_queue()

    def _write_queue_reset(self, value: int) -> None:
        if value == 1:
            self._registers.reset_queue()

    # --- registers of version 1 alone

    def _write_page_size(self, value: int) -> None:
        self._page_size = value

    def _write_queue_align(self, value: int) -> None:
        self._registers.write_legacy_alignment(value)

    def _read_queue_page(self) -> int:
        return self._registers.read_legacy_address() // self._page_size if self._page_size else 0

    def _write_queue_page(self, value: int) -> None:
        self._registers.write_legacy_address(value * self._page_size)

    # --- interrupts

    def _queue_called(self, index: int) -> None:
        self._events.set(Event.QUEUE)

    def _config_changed(self) -> None:
        self._events.set(Event.CONFIGURATION)

    def _was_reset(self) -> None:
        self._page_size = 0
        self._events.take()

    def _level_changed(self, level: bool) -> None:
        tell(self._said, f"{self.device.name}: on_interrupt", self.on_interrupt, level)
