"""The registers that all layouts share: device status, configuration, notifications."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

from vring import GuestMemory, NotificationData, RingError
from vring_serial.device.base import VirtioDevice, check_unserved
from vring_serial.device.registers.host import Host
from vring_serial.device.registers.negotiation import (
    FeatureNegotiation,
    offered_features,
    offered_legacy_features,
)
from vring_serial.device.registers.queues import NO_KICKS, QueueTable
from vring_serial.device.registers.selected import SelectedQueue
from vring_serial.device.registers.state import (
    DriverState,
    QueueSetup,
    RegistersState,
    check_registers,
)
from vring_serial.errors import ConfigError
from vring_serial.proto.virtio import Feature, Status
from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger(__name__)

#: queue_size for devices that would allow more: drivers fill whole queues with buffers.
QUEUE_SIZE = 256
#: Queue indices have 16 bits, and so has their number.
MAX_QUEUES = 0xFFFF


def queue_size_of(device: VirtioDevice, queue_size: int) -> int:
    """Return the largest size that drivers may choose; ``queue_size`` as of DriverRegisters.

    Raises ConfigError if that is impossible.
    """
    size = queue_size or min(device.queue_size_max, QUEUE_SIZE)
    if not 0 < size <= device.queue_size_max or size & (size - 1):
        raise ConfigError(f"queue size {size} is not a power of two up to {device.queue_size_max}")
    return size


def check_saved_registers(
    saved: RegistersState, device: VirtioDevice, *, packed: bool, queue_size: int
) -> None:
    """Check that registers with these options can go on from a state; see DriverRegisters for them.

    Raises StateError that names what does not fit, ConfigError: an impossible ``queue_size``.
    """
    check_registers(
        saved,
        num_queues=device.num_queues,
        size_max=queue_size_of(device, queue_size),
        offered=offered_features(device, packed=packed, notification_data=True),
        legacy=offered_legacy_features(device),
    )


class DriverRegisters:
    """The state and behaviour behind the registers of a device, in any layout.

    Methods take any value that a guest writes: impossible ones are ignored, answered as the
    specification says, or set NEEDS_RESET.

    Args:
        device: any virtio device; its callbacks are set until :meth:`close`.
        queue_size: of every queue, unless the driver chooses less; 0: the device's own largest, up
            to QUEUE_SIZE.
        packed: offer packed rings.
        notification_data: offer NOTIFICATION_DATA.
        host: runs what the device's methods do.
        legacy: the layout is one of legacy drivers alone.
        queue_called: must interrupt the driver of the queue with this index.
        config_changed: must interrupt the driver for a changed configuration or status.
        was_reset: must forget events; called after the driver has reset the device.
        saved: the registers to go on from; taken over. The device is in its own state of then.
        records, kick_fds: see QueueTable.

    Attributes:
        saved: all registers; kept up to date here and in the parts, but for positions of rings.
        state: what the driver has set, apart from the queues.
        features: the negotiation of feature bits.
        queues: the queues, running or not.
        selected: the registers of the queue that queue_select names.
        notifiers: by queue: call it with the value that the driver wrote to notify the queue; in
            any thread.

    Raises:
        ConfigError: more queues than registers can name, an impossible ``queue_size``, or the
            registers of another device.
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
        saved: RegistersState | None = None,
        records: Sequence[memoryview] | None = None,
        kick_fds: Mapping[int, int] = NO_KICKS,
    ) -> None:
        check_unserved(device)
        if device.num_queues > MAX_QUEUES:
            raise ConfigError(f"the device has {device.num_queues} queues, at most {MAX_QUEUES}")
        size = queue_size_of(device, queue_size)
        self.device = device
        self.saved = saved or RegistersState(DriverState(legacy=legacy))
        self.state = self.saved.driver
        self._always_legacy = legacy
        self._log = RateLimitedLog(log)
        self.features = FeatureNegotiation(
            device,
            self.state,
            packed=packed,
            notification_data=notification_data,
            log=self._log,
        )
        self.queues = QueueTable(
            device,
            self.state,
            size,
            queue_called,
            self._queue_failed,
            self.saved.queues,
            records,
            kick_fds,
        )
        self.selected = SelectedQueue(self.queues, self.state, host.run)
        self._run = host.run
        self.notifiers = tuple(
            self.queues.notifier(index, self._not_set_up, host.notified)
            for index in range(len(self.queues))
        )
        self._config_changed = config_changed
        self._was_reset = was_reset
        self._may_run = True
        self._config: bytes | None = None
        self._config_seen = device.config_generation
        device.on_config_change = self._device_config_changed
        device.on_needs_reset = self._device_broken
        self._update_live()

    # --- legacy drivers

    def write_legacy_features(self, word: int) -> None:
        """Accept features for a legacy driver, which has no FEATURES_OK; others are ignored."""
        if self.queues.live:
            return
        self.state.legacy = True
        self.features.write_legacy(word)
        self._run(self.features.accept_legacy)

    # --- status

    def read_status(self) -> int:
        """Return the device status (2.1)."""
        return int(self.device.status)

    def write_status(self, value: int) -> None:
        """Set the device status; 0 resets the device before this returns."""
        if value & 0xFF:
            self._run(lambda: self._set_status(value & 0xFF))
        else:
            self.reset()

    def _set_status(self, value: int) -> None:
        old = self.device.status
        value &= ~int(Status.DEVICE_NEEDS_RESET)
        if self.state.legacy:
            if value & Status.DRIVER_OK and not old & Status.DRIVER_OK:
                self.features.accept_legacy()
        else:
            # A process may have died between the device's having the features and our noting them.
            known = old & Status.FEATURES_OK and self.state.features
            fresh = value & Status.FEATURES_OK and not known
            if fresh and not self.features.accept():
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
        """Whether the device may access memory, which MSI-X messages do as well.

        Old legacy drivers did not all set Bus Master Enable, so it does not count for them.
        """
        return self._may_run or self.state.legacy

    def _update_live(self) -> None:
        ready = self.device.status & Status.DRIVER_OK
        self.queues.live = bool(ready) and self.bus_master

    def set_memory(self, memory: GuestMemory | None) -> None:
        """Exchange the guest's memory; see QueueTable."""

        def exchange() -> None:
            self.queues.memory = memory

        self._run(exchange)

    def move_memory(self, memory: GuestMemory) -> None:
        """Exchange the guest's memory under running queues; see QueueTable.move."""
        self._run(lambda: self.queues.move(memory))

    def start_waiting(self) -> None:
        """See QueueTable."""
        self._run(self.queues.start_waiting)

    @property
    def driver_ready(self) -> bool:
        """Whether the driver takes notifications."""
        return bool(self.device.status & Status.DRIVER_OK)

    def reset(self) -> None:
        """Reset the device and all registers."""
        self._run(self._reset)

    def _reset(self) -> None:
        self.queues.reset_all()
        self.device.reset()
        state = self.state
        state.legacy = self._always_legacy
        state.device_feature_select = state.driver_feature_select = state.queue_select = 0
        state.features_written = state.features = 0
        self._was_reset()

    def close(self) -> None:
        """Reset the device, let go of it and close all descriptors. Safe to call twice."""
        self._reset()
        self.queues.close()
        self.device.on_config_change = None
        self.device.on_needs_reset = None

    def check(self, saved: RegistersState) -> None:
        """Check registers that somebody else wrote down. Raises StateError that names a fault."""
        check_registers(
            saved,
            num_queues=len(self.queues),
            size_max=self.queues.size_max,
            offered=self.features.offered,
            legacy=self.features.offered_legacy,
        )

    def take(self, saved: RegistersState) -> None:
        """Go on from registers that were checked; the device has its state of then, no memory."""
        for field in dataclasses.fields(DriverState):
            setattr(self.state, field.name, getattr(saved.driver, field.name))
        self.queues.take(saved.queues)
        self._config = None
        self._config_seen = self.device.config_generation
        self._update_live()

    def note_progress(self) -> None:
        """Bring ``saved`` up to date with the device.

        Positions of rings, drivers to be called whom the event loop has not called yet, and the
        generation of the configuration. Exact while nothing is in flight.
        """
        self.queues.take_calls()
        self.queues.note_positions()
        self._see_generation()

    # --- configuration

    def _see_generation(self) -> None:
        """Change the driver's generation if the configuration space is another one than before."""
        generation = self.device.config_generation
        if generation != self._config_seen:
            self._config_seen = generation
            self._config = None
            self.state.config_generation = self.state.config_generation + 1 & 0xFF

    def read_config(self, offset: int, size: int) -> int:
        """Return ``size`` bytes of the configuration space; zero outside."""
        self._see_generation()
        if self._config is None:
            self._config = self.device.read_config(0, self.device.config_size)
        return int.from_bytes(self._config[offset : offset + size], "little")

    def write_config(self, offset: int, value: int, size: int) -> None:
        """Write ``size`` bytes of the configuration space."""
        self._run(lambda: self.device.write_config(offset, value.to_bytes(size, "little")))
        self._config = None

    def _device_config_changed(self) -> None:
        if self.driver_ready:
            self._config_changed()

    # --- notifications

    def notify_queue(self, value: int) -> None:
        """Notify the queue whose index the low 16 bits are (2.9)."""
        index = value & 0xFFFF
        if index >= len(self.notifiers):
            return
        if self.state.legacy:
            self._notified_by_legacy_driver(self.queues[index])
        self.notifiers[index](value)

    def notification_data(self, index: int) -> NotificationData | None:
        """Return what the driver's last notification of a queue carried (2.9), which is a hint.

        None before the first one, or if NOTIFICATION_DATA is not negotiated.
        """
        value = self.queues[index].notified
        if value is None or not self.features.has(Feature.NOTIFICATION_DATA):
            return None
        return NotificationData.unpack(value)

    def _notified_by_legacy_driver(self, queue: QueueSetup) -> None:
        """Start queues for a legacy driver, which may use them before DRIVER_OK (3.1.2)."""
        if queue.enabled and not self.queues.is_running(queue) and not self.driver_ready:
            self._run(self._start_before_ready)

    def _start_before_ready(self) -> None:
        self.features.accept_legacy()
        self.queues.live = True

    # --- what goes wrong

    def _queue_failed(self, index: int, error: Exception) -> None:
        """Set NEEDS_RESET: the driver set a queue up so that it cannot run."""
        self._log.warning("%s: queue %d cannot run: %s", self.device.name, index, error)
        self.device.set_status(self.device.status | Status.DEVICE_NEEDS_RESET)
        self._needs_reset()

    def _device_broken(self, error: RingError) -> None:
        self._log.warning("%s: a ring is broken: %s", self.device.name, error)
        self._needs_reset()

    def _not_set_up(self, index: int) -> None:
        """Log that the driver notified a queue that it has not enabled."""
        self._log.warning(
            "%s: the driver notified queue %d, which it never set up: "
            "was this guest restored from a saved state?",
            self.device.name,
            index,
        )

    def _needs_reset(self) -> None:
        if self.driver_ready:
            self._config_changed()
