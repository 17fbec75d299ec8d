"""What a transport sees of a device, whatever the device is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from vring import RingError
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.errors import LocalProtocolError


def check_unserved(device: VirtioDevice) -> None:
    """Raise LocalProtocolError if a transport serves the device: it has one at a time."""
    if device.on_config_change is not None or device.on_needs_reset is not None:
        raise LocalProtocolError(
            f"{device.name}: a front or server has this device already; close or stop that first"
        )


class VirtioDevice(Protocol):
    """A virtio device as its transport drives it: every call in the event loop's thread.

    Attributes:
        name: for logs.
        device_id: the virtio device type (virtio 1.3, 5), 3 for a console.
        device_features: the offered feature bits; those of the ring (VERSION_1, EVENT_IDX,
            INDIRECT_DESC) are kept by the queues that the transport makes.
        num_queues: how many queues there are; indices are below it.
        queue_size_max: largest size of a queue, in descriptors.
        config_size: bytes of the configuration space.
        config_generation: changes whenever the configuration space does (2.5.1).
        on_config_change: set by the transport; called after the configuration space changed, for
            the configuration change notification.
        on_needs_reset: set by the transport; called after DEVICE_NEEDS_RESET was set in ``status``
            because a ring is broken.
    """

    on_config_change: Callable[[], None] | None
    on_needs_reset: Callable[[RingError], None] | None

    @property
    def name(self) -> str: ...
    @property
    def device_id(self) -> int: ...
    @property
    def device_features(self) -> int: ...
    @property
    def num_queues(self) -> int: ...
    @property
    def queue_size_max(self) -> int: ...
    @property
    def config_size(self) -> int: ...
    @property
    def config_generation(self) -> int: ...

    @property
    def status(self) -> int:
        """Return the device status (2.1) as the driver last wrote it, with what the device set."""
        ...

    def set_status(self, status: int) -> None:
        """Take over the device status that the driver, or a frontend for it, wrote.

        0 is no :meth:`reset` by itself: vhost-user frontends write it for a paused VM as well. What
        the device knows of the driver goes when rings start anew.
        """
        ...

    def set_driver_features(self, bits: int) -> None:
        """Take the features that the driver accepted; raise RemoteProtocolError on others."""
        ...

    def read_config(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of the configuration space; what lies outside reads as zero."""
        ...

    def write_config(self, offset: int, data: bytes) -> None:
        """Take what the driver wrote to the configuration space; ignore what it cannot write."""
        ...

    def start_queue(self, index: int, queue: RunningQueue) -> None:
        """Serve a queue that runs now, without waiting for a kick.

        Raises LocalProtocolError if ``index`` is no queue, or runs already.
        """
        ...

    def stop_queue(self, index: int) -> int:
        """Leave the queue alone: when this returns, nothing is in flight and no descriptor in use.

        Returns the available index to resume from; 0 if the queue did not run. Stopping all queues
        and starting them again (a paused VM, a new memory map) keeps the device's state.
        """
        ...

    def reset_queue(self, index: int) -> None:
        """Forget where the queue, which does not run, was stopped: it will start anew (2.6.1).

        The other queues go on, and so does all else that the device knows of the driver.
        """
        ...

    def reset(self) -> None:
        """Stop all queues and forget the driver."""
        ...

    def settled(self) -> AbstractContextManager[None]:
        """Hold all queues inside a ``with`` without await.

        Nothing is in flight there: ``avail_index`` and ``used_index`` of the queues, and the state,
        are exact. On leaving, all go on as if nothing had happened.
        """
        ...

    def save_state(self) -> bytes:
        """Return all that another device, made in the same way, needs to go on from here.

        Called inside :meth:`settled`. Whatever the device owes its host ends goes with the state:
        it stands still then, until a queue is started. Raises LocalProtocolError if the device
        does not say what its state is.
        """
        ...

    def check_state(self, saved: bytes) -> Callable[[], None]:
        """Check what :meth:`save_state` of another device returned; return what takes it over.

        No queue runs, and the device may have been started: its host ends stay then, and it stands
        still until a queue is started. It is as before until the result is called, which does not
        fail. Raises StateError if the state does not fit this device.
        """
        ...

    def release_state(self, *, gone: bool) -> None:
        """End a standstill after :meth:`save_state` or :meth:`check_state` without a queue.

        ``gone``: the state goes on elsewhere, and with it the driver and all that was owed to the
        host ends; otherwise the device goes on with it.
        """
        ...
