"""The exceptions of `vring`: one class per cause.

:class:`LocalMisuseError` is a bug of the calling program; :class:`RingError` is a fault of the
driver on the other side of the ring. Handle them separately: the first needs a fix, the second only
containment (the queue stops, the device asks for a reset, everything else continues).
"""

from __future__ import annotations


class Error(Exception):
    """Base class of all exceptions defined by `vring` and `vring_serial`."""


class VringError(Error):
    """Base class of all exceptions of this package."""


class LocalMisuseError(VringError):
    """The calling program used an interface in a way its documentation forbids."""


class MemoryMapError(VringError):
    """An invalid region table: regions overlap, wrap around 2**64, or are empty."""


class AddressError(VringError):
    """A guest address that no region of the table covers.

    Attributes:
        address: first guest address of the access, in bytes.
        length: length of the access in bytes.
    """

    def __init__(self, address: int, length: int, why: str = "not in guest memory") -> None:
        super().__init__(f"guest address {address:#x}, {length} bytes: {why}")
        self.address = address
        self.length = length


class RingError(VringError):
    """The driver broke the ring; the queue is unusable until it is set up again.

    Attributes:
        queue: name of the queue, as given when it was made.
        index: the invalid descriptor index, head or ring index; `cause` says which.
        cause: the fault, in the specification's terms.
    """

    def __init__(self, queue: str, index: int, cause: str) -> None:
        super().__init__(f"{queue}: index {index}: {cause}")
        self.queue = queue
        self.index = index
        self.cause = cause


class AvailableIndexError(RingError):
    """The available index moved by more than the queue size (virtio 1.3, 2.7.6)."""


class HeadError(RingError):
    """The available ring names a descriptor outside the table (virtio 1.3, 2.7.6)."""


class ChainError(RingError):
    """A chain that loops, is too long, or names a descriptor outside its table (2.7.5)."""


class ChainOrderError(RingError):
    """A device-readable descriptor after a device-writable one (2.7.4.2)."""


class IndirectError(RingError):
    """An indirect table that is nested, mis-sized, outside memory or not negotiated (2.7.5.3)."""


class BufferAddressError(RingError):
    """A descriptor whose buffer is not wholly in guest memory."""


class DescriptorFlagsError(RingError):
    """Descriptor flags not allowed by the negotiated features."""


class MemoryLostError(RingError):
    """The file behind guest memory was truncated while the ring was in use (Region.lost)."""


class QueueFullError(LocalMisuseError):
    """The driver's side has not enough free descriptors for a chain."""


class UsedRingError(RingError):
    """The device broke the ring: it used a chain that is not in flight, or jumped (2.7.8)."""
