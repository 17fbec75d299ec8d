"""What a client has set up, apart from descriptors, mappings and requests on their way."""

from __future__ import annotations

from dataclasses import dataclass, field

from vring_serial.proto.vfio_user_version import Capabilities


@dataclass(frozen=True, slots=True)
class DmaRegion:
    """One DMA mapping.

    Attributes:
        address: first DMA address.
        size: bytes.
        flags: DmaFlag.
        offset: bytes from the start of the descriptor's file to the region.
        shared: the client gave a descriptor for it.
    """

    address: int
    size: int
    flags: int
    offset: int
    shared: bool

    @property
    def end(self) -> int:
        """First address after it."""
        return self.address + self.size


@dataclass(slots=True)
class ClientState:
    """The setup of one session.

    Attributes:
        agreed: capabilities that VERSION settled; None before it.
        regions: DMA mappings by address.
        intx_masked: INTx is not to be told until the client unmasks it.
        irqs: numbers of the interrupts for which the client has given an event descriptor, by type
            (IrqIndex), in ascending order.
        unmask_event: the client has given an event that unmasks INTx.
    """

    agreed: Capabilities | None = None
    regions: dict[int, DmaRegion] = field(default_factory=dict)
    intx_masked: bool = False
    irqs: dict[int, list[int]] = field(default_factory=dict)
    unmask_event: bool = False


@dataclass(slots=True)
class RemoteRingsState:
    """What is left of rings in memory that only the client can access, when they stop.

    Attributes:
        owed: queues whose drivers are to be interrupted, in ascending order.
    """

    owed: list[int] = field(default_factory=list)
