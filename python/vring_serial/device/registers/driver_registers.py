"""What every layout of registers has of a device: features, status, configuration, queues."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from vring import GuestMemory, NotificationData, RingError, notify
from vring_serial.device.base import VirtioDevice, check_unserved
from vring_serial.device.registers.host import Host
from vring_serial.device.registers.queues import QueueSetup, QueueTable
from vring_serial.errors import ConfigError, RemoteProtocolError
from vring_serial.proto.virtio import Feature, Status, feature_names
from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger(__name__)

#: Offered by the registers themselves, whatever the device is.
_REGISTER_FEATURES = int(Feature.RING_RESET | Feature.VERSION_1)
#: Bits that mean something to legacy drivers alone (6.3).
_LEGACY_ONLY = int(Feature.NOTIFY_ON_EMPTY | Feature.ANY_LAYOUT)
# Numbers, all of them: the complement of a Feature has no bit that is unknown here.
_RING_PACKED = int(Feature.RING_PACKED)
_LEGACY_WORD = (1 << 32) - 1
#: queue_size for devices that would allow more: drivers fill whole queues with buffers.
QUEUE_SIZE = 256
_ONE = (1).to_bytes(8, sys.byteorder)
#: Queue indices have 16 bits, and so has their number.
MAX_QUEUES = 0xFFFF


class DriverRegisters:
    """A device from a driver's side, without the layout of registers.

    Every method may be called with whatever a guest writes: impossible values are ignored, or
    answered as the specification says, or set NEEDS_RESET.

    Args:
        device: any virtio device; its callbacks are taken over.
        queue_size: of every queue, unless the driver chooses less; 0: the device's own largest, up
            to QUEUE_SIZE.
        packed: offer packed rings.
        notification_data: offer NOTIFICATION_DATA.
        host: runs what the device's methods do.
        legacy: the layout is one of legacy drivers alone.
        queue_called: gets the index of a queue whose driver wants to know of used buffers.
        config_changed: called when the driver is to be told of the configuration or the status.
        was_reset: called after the driver has reset the device.

    Attributes:
        legacy: the driver uses the legacy interface.
        queue_select: the queue that registers are about.
        notifiers: by queue: what to call when its driver notifies it, with what it wrote; in any
            thread.

    Raises:
        ConfigError: more queues than registers can name, or an impossible ``queue_size``.
        LocalProtocolError: another front or server has the device.
    """

    def __init__(
        self,
        device: VirtioDevice,
        *,
        queue_size: int,
        packed: bool,
        notification_data: bool = True,
        host: Host,
        legacy: bool = False,
        queue_called: Callable[[int], None],
        config_changed: Callable[[], None],
        was_reset: Callable[[], None],
    ) -> None:
        check_unserved(device)
        if device.num_queues > MAX_QUEUES:
            raise ConfigError(f"the device has {device.num_queues} queues, at most {MAX_QUEUES}")
        size = queue_size or min(device.queue_size_max, QUEUE_SIZE)
        if not 0 < size <= device.queue_size_max or size & (size - 1):
            raise ConfigError(
                f"queue size {size} is not a power of two up to {device.queue_size_max}"
            )
        self.device = device
        self.legacy = legacy
        self._always_legacy = legacy
        self.queues = QueueTable(device, size, queue_called, self._queue_failed)
        self.device_feature_select = 0
        self.driver_feature_select = 0
        self.queue_select = 0
        self._packed = packed
        self._notification_data = int(Feature.NOTIFICATION_DATA) if notification_data else 0
        self._run = host.run
        self.notifiers = tuple(
            _notifier(self.queues[index], host, self._not_set_up)
            for index in range(len(self.queues))
        )
        self._config_changed = config_changed
        self._was_reset = was_reset
        self._wanted = 0  # features that the driver has written
        self._may_run = True
        self._generation = 0
        self._config: bytes | None = None
        self._config_seen = device.config_generation
        self._log = RateLimitedLog(log)
        device.on_config_change = self._device_config_changed
        device.on_needs_reset = self._device_broken

    # --- features

    @property
    def offered(self) -> int:
        """Feature bits for modern drivers."""
        bits = (int(self.device.device_features) | _REGISTER_FEATURES) & ~_LEGACY_ONLY
        bits |= self._notification_data
        return bits | _RING_PACKED if self._packed else bits & ~_RING_PACKED

    @property
    def offered_legacy(self) -> int:
        """Feature bits for legacy drivers: 0 to 31."""
        return int(self.device.device_features & _LEGACY_WORD | Feature.ANY_LAYOUT)

    def read_device_feature(self) -> int:
        """The word that device_feature_select selects; 0 where no feature is defined."""
        return self.offered >> 32 * self.device_feature_select & 0xFFFFFFFF

    def read_driver_feature(self) -> int:
        """The word that driver_feature_select selects."""
        return self._wanted >> 32 * self.driver_feature_select & 0xFFFFFFFF

    def write_driver_feature(self, word: int) -> None:
        """Accept the word of features; after FEATURES_OK it is too late."""
        if self.driver_feature_select > 1 or self.device.status & Status.FEATURES_OK:
            return
        shift = 32 * self.driver_feature_select
        self._wanted = self._wanted & ~(0xFFFFFFFF << shift) | word << shift

    def read_legacy_device_feature(self) -> int:
        """As read_device_feature, for layouts of legacy drivers that select words."""
        return 0 if self.device_feature_select else self.offered_legacy

    def write_legacy_driver_feature(self, word: int) -> None:
        """As write_legacy_features, for layouts that select words."""
        if self.driver_feature_select == 0:
            self.write_legacy_features(word)

    def write_legacy_features(self, word: int) -> None:
        """Accept features as a legacy driver, which says no more about it; others are ignored."""
        if self.queues.live:
            return
        self.legacy = True
        self._wanted = word & self.offered_legacy
        self._run(self._settle_legacy_features)

    def _settle_legacy_features(self) -> None:
        # The driver may have written others through the modern interface before.
        self._wanted &= self.offered_legacy
        self.device.set_driver_features(self._wanted & self.device.device_features)
        self.queues.features = self._wanted

    def _accept_features(self) -> bool:
        """The driver has written FEATURES_OK: whether it may."""
        wanted = self._wanted
        if wanted & ~self.offered or not wanted & Feature.VERSION_1:
            self._log.warning(
                "%s: the driver accepted features %#x, which must be some of %#x with VERSION_1",
                self.device.name,
                wanted,
                self.offered,
            )
            return False
        try:
            self.device.set_driver_features(wanted & self.device.device_features)
        except RemoteProtocolError as error:
            self._log.warning("%s", error)
            return False
        self.queues.features = wanted
        if own := wanted & ~int(self.device.device_features):
            text = "%s: the driver accepted of the registers %s"
            self._log.log(logging.INFO, text, self.device.name, feature_names(own))
        return True

    def has(self, feature: int) -> bool:
        """Whether the feature is negotiated."""
        return bool(self.queues.features & feature)

    # --- status

    def read_status(self) -> int:
        """The device status (2.1)."""
        return int(self.device.status)

    def write_status(self, value: int) -> None:
        """The driver wrote the device status; 0 resets the device before this returns."""
        if value & 0xFF:
            self._run(lambda: self._set_status(value & 0xFF))
        else:
            self.reset()

    def _set_status(self, value: int) -> None:
        old = self.device.status
        value &= ~int(Status.DEVICE_NEEDS_RESET)
        if self.legacy:
            if value & Status.DRIVER_OK and not old & Status.DRIVER_OK:
                self._settle_legacy_features()
        else:
            fresh = value & Status.FEATURES_OK and not old & Status.FEATURES_OK
            if fresh and not self._accept_features():
                value &= ~int(Status.FEATURES_OK)
            if not value & Status.FEATURES_OK:
                value &= ~int(Status.DRIVER_OK)
        self.device.set_status(value)
        memory = self.queues.memory
        if value & Status.DRIVER_OK & ~old and (memory is None or not memory.regions):
            self._log.warning(
                "%s: the driver is ready, but no guest memory is mapped", self.device.name
            )
        self._update_live()

    @property
    def may_run(self) -> bool:
        """Whether the bus lets the device touch memory at all (PCI: bus mastering)."""
        return self._may_run

    @may_run.setter
    def may_run(self, may_run: bool) -> None:
        if may_run != self._may_run:
            self._may_run = may_run
            if self.driver_ready:
                self._run(self._update_live)

    @property
    def bus_master(self) -> bool:
        """Whether the device may access memory; its messages are accesses to memory, too.

        Legacy drivers of old did not all ask for bus mastering.
        """
        return self._may_run or self.legacy

    def _update_live(self) -> None:
        ready = self.device.status & Status.DRIVER_OK
        self.queues.live = bool(ready) and self.bus_master

    def set_memory(self, memory: GuestMemory | None) -> None:
        """Exchange the guest's memory; see QueueTable."""

        def exchange() -> None:
            self.queues.memory = memory

        self._run(exchange)

    @property
    def driver_ready(self) -> bool:
        """Whether the driver takes notifications."""
        return bool(self.device.status & Status.DRIVER_OK)

    def reset(self) -> None:
        """The driver resets the device; all registers have their first values again."""
        self._run(self._reset)

    def _reset(self) -> None:
        self.queues.reset_all()
        self.device.reset()
        self.legacy = self._always_legacy
        self.device_feature_select = self.driver_feature_select = self.queue_select = 0
        self._wanted = 0
        self._was_reset()

    def close(self) -> None:
        """Leave the device, which is reset. Safe to call twice."""
        self._reset()
        self.queues.close()
        self.device.on_config_change = None
        self.device.on_needs_reset = None

    # --- configuration

    @property
    def generation(self) -> int:
        """config_generation, 8 bits: differs after the driver has read what changed (4.1.4.3.1)."""
        return self._generation

    def read_config(self, offset: int, size: int) -> int:
        """``size`` bytes of the configuration space; zero outside."""
        generation = self.device.config_generation
        if self._config is None or generation != self._config_seen:
            if generation != self._config_seen:
                self._config_seen = generation
                self._generation = self._generation + 1 & 0xFF
            self._config = self.device.read_config(0, self.device.config_size)
        return int.from_bytes(self._config[offset : offset + size], "little")

    def write_config(self, offset: int, value: int, size: int) -> None:
        """Write ``size`` bytes of the configuration space."""
        self._run(lambda: self.device.write_config(offset, value.to_bytes(size, "little")))
        self._config = None

    def _device_config_changed(self) -> None:
        if self.driver_ready:
            self._config_changed()

    # --- queues: those that are not there take part in nothing

    def read_queue_size(self) -> int:
        """Descriptors of the selected queue; 0: there is no such queue."""
        index = self.queue_select
        return self.queues[index].size if index < len(self.queues) else 0

    def write_queue_size(self, size: int) -> None:
        """Choose the size of the selected queue."""
        if self.queue_select < len(self.queues):
            self.queues.set_size(self.queues[self.queue_select], size)

    def read_queue_enable(self) -> int:
        """Whether the selected queue is enabled."""
        index = self.queue_select
        return int(index < len(self.queues) and self.queues[index].enabled)

    def enable_queue(self) -> None:
        """Enable the selected queue, before or after DRIVER_OK."""
        if self.queue_select < len(self.queues):
            queue = self.queues[self.queue_select]
            self._run(lambda: self.queues.enable(queue))

    def disable_queue(self) -> None:
        """Disable the selected queue; its set-up stays."""
        if self.queue_select < len(self.queues):
            queue = self.queues[self.queue_select]
            self._run(lambda: self.queues.disable(queue))

    def reset_queue(self) -> None:
        """Reset the selected queue alone, where RING_RESET is negotiated."""
        if self.queue_select < len(self.queues) and self.has(Feature.RING_RESET):
            queue = self.queues[self.queue_select]
            self._run(lambda: self.queues.reset(queue))

    def read_area(self, name: str, shift: int) -> int:
        """32 bits of an area's address of the selected queue."""
        return self.read_area_address(name) >> shift & 0xFFFFFFFF

    def read_area_address(self, name: str) -> int:
        """An area's address of the selected queue; 0 if there is no such queue."""
        index = self.queue_select
        if index >= len(self.queues):
            return 0
        address: int = getattr(self.queues[index], name)
        return address

    def write_area(self, name: str, shift: int, value: int) -> None:
        """Set 32 bits of an area's address, while the selected queue is not enabled."""
        index = self.queue_select
        if index < len(self.queues) and not self.queues[index].enabled:
            queue = self.queues[index]
            address: int = getattr(queue, name)
            setattr(queue, name, address & ~(0xFFFFFFFF << shift) | value << shift)

    def write_legacy_alignment(self, alignment: int) -> None:
        """Alignment of the used ring in the selected queue; what is no power of two is ignored."""
        index = self.queue_select
        if index < len(self.queues) and alignment > 0 and alignment & (alignment - 1) == 0:
            self.queues[index].alignment = alignment

    def read_legacy_address(self) -> int:
        """Where the selected queue begins; 0 while it is not in use."""
        return self.read_area_address("descriptor_area") if self.read_queue_enable() else 0

    def write_legacy_address(self, address: int) -> None:
        """The selected queue begins there, and is in use from now on; 0: it is in use no more."""
        if self.queue_select >= len(self.queues):
            return
        self.legacy = True
        queue = self.queues[self.queue_select]
        if address == 0:
            self.disable_queue()
        elif not queue.enabled:
            queue.place_legacy(address)
            self.enable_queue()

    def notify_queue(self, value: int) -> None:
        """The driver notifies: the low 16 bits are the queue's index (2.9)."""
        index = value & 0xFFFF
        if index >= len(self.notifiers):
            return
        if self.legacy:
            self._notified_by_legacy_driver(self.queues[index])
        self.notifiers[index](value)

    def notification_data(self, index: int) -> NotificationData | None:
        """What the driver's last notification of a queue carried (2.9): its word, and no more than
        a hint. None: nothing yet, or NOTIFICATION_DATA is not negotiated."""
        value = self.queues[index].notified
        if value is None or not self.has(Feature.NOTIFICATION_DATA):
            return None
        return NotificationData.unpack(value)

    def _notified_by_legacy_driver(self, queue: QueueSetup) -> None:
        """Legacy drivers use queues before DRIVER_OK (3.1.2)."""
        if queue.enabled and not queue.running and not self.driver_ready:
            self._run(self._start_before_ready)

    def _start_before_ready(self) -> None:
        self._settle_legacy_features()
        self.queues.live = True

    # --- what goes wrong

    def _queue_failed(self, index: int, error: Exception) -> None:
        """The driver set a queue up so that it cannot run."""
        self._log.warning("%s: queue %d cannot run: %s", self.device.name, index, error)
        self.device.set_status(self.device.status | Status.DEVICE_NEEDS_RESET)
        self._needs_reset()

    def _device_broken(self, error: RingError) -> None:
        self._log.warning("%s: a ring is broken: %s", self.device.name, error)
        self._needs_reset()

    def _not_set_up(self, index: int) -> None:
        """The driver notified a queue that it has not enabled."""
        self._log.warning(
            "%s: the driver notified queue %d, which it never set up: "
            "was this guest restored from a saved state?",
            self.device.name,
            index,
        )

    def _needs_reset(self) -> None:
        if self.driver_ready:
            self._config_changed()


def _notifier(
    queue: QueueSetup, host: Host, not_set_up: Callable[[int], None]
) -> Callable[[int], None]:
    # A busy driver does little else: as few calls as can be between it and the descriptor.
    notified = host.notified

    def notify_queue(value: int) -> None:
        queue.notified = value
        if not queue.enabled:
            not_set_up(queue.index)
        if queue.kick_shared:
            notify(queue.kick_fd)
        elif queue.kick_fd >= 0:
            # contextlib.suppress costs half as much as the write.
            try:  # noqa: SIM105
                os.write(queue.kick_fd, _ONE)
            except BlockingIOError:
                pass
        notified()

    return notify_queue
