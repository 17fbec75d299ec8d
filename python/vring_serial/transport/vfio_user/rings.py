"""A device whose rings may be in memory that only the client can access."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from vring import DirtyLog, RingError
from vring.errors import VringError
from vring_serial.device.base import VirtioDevice
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.proto.virtio import Feature, Status
from vring_serial.transport.vfio_user.shadow import ClientMemory, ShadowRing
from vring_serial.transport.vfio_user.state import RemoteRingsState


class ClientMemoryError(RingError):
    """The client does not let the device have a ring, or a buffer, of its memory."""

    def __init__(self, queue: str, cause: str) -> None:
        super().__init__(queue, 0, cause)
        self.args = (f"{queue}: {cause}",)


class RemoteRings:
    """Stands between a device and its registers, and is both their other end (VirtioDevice).

    Rings in shared memory go to the device as they are; others are served through a ShadowRing.

    Args:
        device: the device itself.
        state: to go on from; taken over.

    Attributes:
        state: exact while no ring runs, and after :meth:`note_owed`.
        client: the client's memory while there is a client.
        log: gets the device's writes, of rings that start from then on; None: nothing does. What
            the client writes at our request counts as well.
        puts_off: the device gets rings by :meth:`begin` alone: it is to be written down before that
            they run, for what the device has moved cannot be taken back. Not those of a
            predecessor, which are :meth:`resuming`.
        name, device_id, device_features: the device's; see VirtioDevice.
        num_queues, queue_size_max, config_size, config_generation, status: likewise.
        on_config_change, on_needs_reset: likewise; setting them sets the device's.
    """

    def __init__(self, device: VirtioDevice, state: RemoteRingsState | None = None) -> None:
        self.state = state or RemoteRingsState()
        self.client: ClientMemory | None = None
        self.log: DirtyLog | None = None
        self.puts_off = False
        self._waiting: dict[int, RunningQueue] = {}  # which the device is to get,
        self._refused: dict[int, RunningQueue] = {}  # or could not serve
        self._device = device
        self._shadows: dict[int, ShadowRing] = {}
        self._resuming = False
        self._unsettled: set[int] = set()  # whose predecessors' chains are not all known yet

    # --- queues

    @contextmanager
    def resuming(self) -> Iterator[None]:
        """Have the rings that start inside go on in the copies that a predecessor left."""
        self._resuming = True
        try:
            yield
        finally:
            self._resuming = False
            self._free_unused()

    def _settled(self, index: int) -> None:
        self._unsettled.discard(index)
        self._free_unused()

    def _free_unused(self) -> None:
        """Free what a predecessor left in the copies and no ring uses, once all have said."""
        if not self._unsettled and not self._resuming and self.client is not None:
            self.client.dma.free_unused()

    def start_queue(self, index: int, queue: RunningQueue) -> None:
        """See VirtioDevice."""
        if self.puts_off and not self._resuming:
            self._waiting[index] = queue
        else:
            self._start(index, queue)

    def begin(self) -> None:
        """Hand the device the rings that wait for it."""
        waiting, self._waiting = self._waiting, {}
        for index, queue in waiting.items():
            try:
                self._start(index, queue)
            except (VringError, OSError) as error:
                self._refused[index] = queue
                self._break(index, error)

    def _start(self, index: int, queue: RunningQueue) -> None:
        client = self.client
        if client is None or not any(map(client.dma.is_remote, queue.queue.rings)):
            if client is not None:
                # In the copies there is nothing: buffers there would be read as zeros.
                queue.queue.memory = client.dma.mapped
                if self.log is not None:
                    queue.queue.set_log(self.log)
            self._device.start_queue(index, queue)
            return
        shadow = ShadowRing(
            queue,
            client,
            lambda error: self._failed(index, error),
            owed=index in self.state.owed,
            resumed=self._resuming,
            behind=index in self._unsettled,
            settled=partial(self._settled, index),
            written=self._written,
        )
        if shadow.behind:
            self._unsettled.add(index)
        self._set_owed(index, False)
        try:
            self._device.start_queue(index, shadow.queue)
        except BaseException:
            shadow.stop()
            raise
        self._shadows[index] = shadow

    def stop_queue(self, index: int) -> int:
        """See VirtioDevice."""
        not_served = self._waiting.pop(index, None) or self._refused.pop(index, None)
        if not_served is not None:
            return int(not_served.queue.avail_index)
        position = self._device.stop_queue(index)
        shadow = self._shadows.pop(index, None)
        if shadow is not None:
            self._set_owed(index, shadow.stop())
        return position

    @property
    def any_remote(self) -> bool:
        """Whether a ring runs that is in memory which only the client has."""
        return bool(self._shadows)

    def note_owed(self) -> None:
        """Write into the state which drivers of rings that run are owed an interrupt now."""
        for index, shadow in self._shadows.items():
            self._set_owed(index, shadow.owed)

    def _set_owed(self, index: int, owed: bool) -> None:
        others = {each for each in self.state.owed if each != index}
        self.state.owed = sorted(others | {index} if owed else others)

    def reset_queue(self, index: int) -> None:
        """See VirtioDevice."""
        self._set_owed(index, False)
        self._unsettled.discard(index)
        self._device.reset_queue(index)

    def _written(self, address: int, length: int) -> None:
        if self.log is not None:
            self.log.mark(address, length)

    def _failed(self, index: int, error: Exception) -> None:
        if index in self._shadows and not isinstance(error, ConnectionError):
            self._break(index, error)

    def _break(self, index: int, error: Exception) -> None:
        self._device.set_status(self._device.status | Status.DEVICE_NEEDS_RESET)
        if self._device.on_needs_reset is not None:
            self._device.on_needs_reset(ClientMemoryError(f"queue {index}", str(error)))

    # --- all else is the device's

    def settled(self) -> AbstractContextManager[None]:
        """See VirtioDevice."""
        return self._device.settled()

    def save_state(self) -> bytes:
        """See VirtioDevice."""
        return self._device.save_state()

    def check_state(self, saved: bytes) -> Callable[[], None]:
        """See VirtioDevice."""
        return self._device.check_state(saved)

    def release_state(self, *, gone: bool) -> None:
        """See VirtioDevice."""
        self._device.release_state(gone=gone)

    @property
    def on_config_change(self) -> Callable[[], None] | None:
        return self._device.on_config_change

    @on_config_change.setter
    def on_config_change(self, function: Callable[[], None] | None) -> None:
        self._device.on_config_change = function

    @property
    def on_needs_reset(self) -> Callable[[RingError], None] | None:
        return self._device.on_needs_reset

    @on_needs_reset.setter
    def on_needs_reset(self, function: Callable[[RingError], None] | None) -> None:
        self._device.on_needs_reset = function

    @property
    def name(self) -> str:
        return self._device.name

    @property
    def device_id(self) -> int:
        return self._device.device_id

    @property
    def device_features(self) -> int:
        return self._device.device_features | Feature.ACCESS_PLATFORM

    @property
    def num_queues(self) -> int:
        return self._device.num_queues

    @property
    def queue_size_max(self) -> int:
        return self._device.queue_size_max

    @property
    def config_size(self) -> int:
        return self._device.config_size

    @property
    def config_generation(self) -> int:
        return self._device.config_generation

    @property
    def status(self) -> int:
        return self._device.status

    def set_status(self, status: int) -> None:
        """See VirtioDevice."""
        self._device.set_status(status)

    def set_driver_features(self, bits: int) -> None:
        """See VirtioDevice."""
        self._device.set_driver_features(bits & self._device.device_features)

    def read_config(self, offset: int, length: int) -> bytes:
        """See VirtioDevice."""
        return self._device.read_config(offset, length)

    def write_config(self, offset: int, data: bytes) -> None:
        """See VirtioDevice."""
        self._device.write_config(offset, data)

    def reset(self) -> None:
        """See VirtioDevice."""
        self.state.owed.clear()
        self._unsettled.clear()
        self._waiting.clear()
        self._refused.clear()
        self._device.reset()
