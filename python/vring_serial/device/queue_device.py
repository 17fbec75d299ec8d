"""A base for virtio devices whose work is in their queues: all that transports need but that."""

from __future__ import annotations

import abc
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from vring import RingError
from vring_serial.callbacks import Listener, tell
from vring_serial.device.served import ServedQueue
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.errors import LocalProtocolError, RemoteProtocolError, StateError
from vring_serial.proto.virtio import QUEUE_SIZE_MAX, Feature, Status
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.saving import StateFormat, check_range

log = logging.getLogger(__name__)

RING_FEATURES = Feature.VERSION_1 | Feature.EVENT_IDX | Feature.INDIRECT_DESC


@dataclass(slots=True)
class QueueDeviceState:
    """What a QueueDevice remembers itself; a device adds what is its own.

    Attributes:
        status: the device status (2.1), with what the device set itself.
        driver_features: the accepted features; 0 before the driver has said.
        config_generation: counts changes of the configuration space.
        config: the configuration space; None: that which the device was made with.
    """

    status: int = 0
    driver_features: int = 0
    config_generation: int = 0
    config: bytes | None = None


class QueueDevice(abc.ABC):
    """A ``device.base.VirtioDevice`` that serves every queue with :meth:`serve`.

    All methods are called in the event loop's thread.

    Args:
        name: for logs.
        device_id: the virtio device type (virtio 1.3, 5).
        num_queues: how many queues there are.
        features: of the device type; those of the rings are added.
        config: the configuration space; drivers cannot write it.
        queue_size_max: largest size of a queue, in descriptors.
        state: to go on from; taken over. Its configuration space counts, unless it has none.

    Attributes:
        state: kept up to date here alone. Between turns of the event loop nothing is in flight.
        state_format: how ``state`` is written down, for snapshots: a device that has no state of
            its own sets ``StateFormat("my device", 1, QueueDeviceState)``; another derives a
            dataclass of plain values from QueueDeviceState, makes ``state`` one, and keeps what it
            must remember there. None: the device cannot be saved.

    Raises LocalProtocolError if the state has a configuration space of another size.
    """

    state_format: ClassVar[StateFormat[Any] | None] = None

    on_config_change = Listener[Callable[[], None]]()
    on_needs_reset = Listener[Callable[[RingError], None]]()

    def __init__(
        self,
        name: str,
        device_id: int,
        num_queues: int,
        *,
        features: int = 0,
        config: bytes = b"",
        queue_size_max: int = QUEUE_SIZE_MAX,
        state: QueueDeviceState | None = None,
    ) -> None:
        self.name = name
        self.device_id = device_id
        self.num_queues = num_queues
        self.device_features = int(features | RING_FEATURES)
        self.queue_size_max = queue_size_max
        self.state = state or QueueDeviceState()
        self._config = config
        if self.state.config is not None:
            self._check_config(self.state.config)
            self._config = self.state.config
        self._log = RateLimitedLog(log)
        self._served: dict[int, ServedQueue] = {}

    # --- what a device does

    @abc.abstractmethod
    def serve(self, index: int, running: RunningQueue) -> bool:
        """Complete chains of queue ``index``, a bounded number of them.

        Nothing may be in flight when this returns. Returns whether there is more to do; before it
        returns False it has asked the driver for a kick (``running.queue.enable_notifications``),
        and that said that there is nothing. Raises RingError as the queue does.
        """

    def set_config(self, config: bytes) -> None:
        """Change the configuration space, whose size stays, and tell the driver."""
        self._check_config(config)
        if config != self._config:
            self._config = self.state.config = config
            self.state.config_generation += 1
            tell(self._log, f"{self.name}: on_config_change", self.on_config_change)

    def _check_config(self, config: bytes) -> None:
        if len(config) != len(self._config):
            raise LocalProtocolError(f"{self.name}: configuration of {len(config)} bytes")

    # --- for transports: see VirtioDevice

    @property
    def driver_features(self) -> int:
        """What the driver accepted; 0 if it has not yet."""
        return self.state.driver_features

    @property
    def config_generation(self) -> int:
        """See VirtioDevice."""
        return self.state.config_generation

    @property
    def config_size(self) -> int:
        """See VirtioDevice."""
        return len(self._config)

    @property
    def status(self) -> int:
        """See VirtioDevice."""
        return self.state.status

    def set_status(self, status: int) -> None:
        """See VirtioDevice."""
        needs_reset = self.state.status & Status.DEVICE_NEEDS_RESET
        self.state.status = status | needs_reset if status else 0

    def set_driver_features(self, bits: int) -> None:
        """See VirtioDevice; the bits are kept in ``driver_features``."""
        if bits & ~self.device_features:
            raise RemoteProtocolError(f"{self.name}: the driver accepted features {bits:#x}")
        self.state.driver_features = bits

    def read_config(self, offset: int, length: int) -> bytes:
        """See VirtioDevice."""
        return self._config[offset : offset + length].ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:  # noqa: B027 - see the class
        """Ignore what the driver wrote to the configuration space."""

    def start_queue(self, index: int, queue: RunningQueue) -> None:
        """See VirtioDevice; ``serve`` is called for the queue from now on."""
        if not 0 <= index < self.num_queues or index in self._served:
            raise LocalProtocolError(f"{self.name}: queue {index} is none, or runs already")
        self._served[index] = ServedQueue(
            queue, partial(self.serve, index, queue), partial(self._broken, index)
        )

    def stop_queue(self, index: int) -> int:
        """See VirtioDevice."""
        served = self._served.pop(index, None)
        if served is None:
            return 0
        served.stop()
        return served.queue.avail_index

    def reset_queue(self, index: int) -> None:  # noqa: B027 - a device may know nothing of queues
        """Expect the queue to start anew."""

    def reset(self) -> None:
        """See VirtioDevice."""
        for index in list(self._served):
            self.stop_queue(index)
        self.state.status = 0
        self.state.driver_features = 0

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """See VirtioDevice; nothing is in flight between calls of :meth:`serve`."""
        yield

    def save_state(self) -> bytes:
        """See VirtioDevice."""
        return self._format().pack(self.state)

    def check_state(self, saved: bytes) -> Callable[[], None]:
        """See VirtioDevice."""
        state: QueueDeviceState = self._format().unpack(saved)
        check_range("the status", state.status, 8)
        check_range("config_generation", state.config_generation, 64)
        check_range("the features", state.driver_features, 64)
        if extra := state.driver_features & ~self.device_features:
            raise StateError(f"the driver accepted features {extra:#x}, which are not offered")
        if state.config is not None and len(state.config) != len(self._config):
            raise StateError(f"its configuration has {len(state.config)} bytes")

        def take_over() -> None:
            self.state = state
            if state.config is not None:
                self._config = state.config

        return take_over

    def release_state(self, *, gone: bool) -> None:
        """See VirtioDevice; with no queue running nothing moves anyway."""
        if gone:
            self.reset()

    def _format(self) -> StateFormat[Any]:
        if self.state_format is None:
            raise LocalProtocolError(f"{self.name} does not say what its state is: state_format")
        return self.state_format

    def _broken(self, index: int, error: RingError) -> None:
        self._log.warning("%s: queue %d is broken: %s", self.name, index, error)
        self.state.status |= int(Status.DEVICE_NEEDS_RESET)
        tell(self._log, f"{self.name}: on_needs_reset", self.on_needs_reset, error)
