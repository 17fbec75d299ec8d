"""What a client has set up, apart from descriptors, mappings and requests on their way."""

from __future__ import annotations

from dataclasses import dataclass, field

from vring_serial.device.registers.state import DriverState, QueueSetup
from vring_serial.proto.vfio_user_features import MigrationState
from vring_serial.proto.vfio_user_version import Capabilities
from vring_serial.saving import StateFormat
from vring_serial.transport.repeatable import Handled


@dataclass(frozen=True, slots=True)
class DmaRegion:
    """One DMA mapping.

    Attributes:
        address: first DMA address.
        size: bytes.
        flags: DmaFlag.
        offset: bytes from the start of the descriptor's file to the region.
        shared: the client gave a descriptor for it.
        serial: the number under which that is kept for a successor of this process.
    """

    address: int
    size: int
    flags: int
    offset: int
    shared: bool
    serial: int = 0

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
        next_serial: the number of the next descriptor of a region.
        life: how many processes have served the client before this one.
        logging: DMA logging was started.
        phase: where the function is on its way to or from another server.
        content: its state, as the client reads or writes it.
        moved: bytes of that which the client has read.
        elsewhere: the client has all of the state, or brought it, and the function has not run
            here since.
    """

    agreed: Capabilities | None = None
    regions: dict[int, DmaRegion] = field(default_factory=dict)
    intx_masked: bool = False
    irqs: dict[int, list[int]] = field(default_factory=dict)
    unmask_event: bool = False
    next_serial: int = 0
    life: int = 0
    logging: bool = False
    phase: MigrationState = MigrationState.RUNNING
    content: bytes = b""
    moved: int = 0
    elsewhere: bool = False


@dataclass(slots=True)
class RemoteRingsState:
    """What is left of rings in memory that only the client can access, when they stop.

    Attributes:
        owed: queues whose drivers are to be interrupted, in ascending order.
    """

    owed: list[int] = field(default_factory=list)


@dataclass(slots=True)
class WrittenClient:
    """What a client has set up, and the message that did it.

    Attributes:
        client: the setup.
        handled: the message; both are written down at once, for it must not be handled twice.
    """

    client: ClientState = field(default_factory=ClientState)
    handled: Handled = field(default_factory=Handled)


@dataclass(slots=True)
class WrittenRegisters:
    """A function's registers but for those of its queues, and for the MSI-X table.

    Events that the driver has not seen need not be right: it is told of everything again.

    Attributes:
        num_queues: how many it has.
        driver: the registers that belong to no single queue.
        config_space: 256 bytes.
        owed: see RemoteRingsState.
    """

    num_queues: int = 0
    driver: DriverState = field(default_factory=DriverState)
    config_space: bytearray = field(default_factory=bytearray)
    owed: list[int] = field(default_factory=list)


@dataclass(slots=True)
class WrittenTable:
    """The MSI-X table.

    Attributes:
        table: see MsixState.
    """

    table: bytearray = field(default_factory=bytearray)


@dataclass(slots=True)
class WrittenQueues:
    """Some of a function's queues.

    Attributes:
        queues: by index, ascending and without a gap.
    """

    queues: list[QueueSetup] = field(default_factory=list)


#: How all that is written down for a successor of this process.
CLIENT = StateFormat("vfio-user client", 1, WrittenClient)
REGISTERS = StateFormat("PCI registers", 1, WrittenRegisters)
TABLE = StateFormat("MSI-X table", 1, WrittenTable)
QUEUES = StateFormat("PCI queues", 1, WrittenQueues)
