"""What a client has set up, apart from descriptors, mappings and requests on their way."""

from __future__ import annotations

from dataclasses import dataclass, field

from vring_serial.device.registers.state import DriverState, QueueSetup
from vring_serial.errors import StateError
from vring_serial.proto.framing import MAX_FDS
from vring_serial.proto.vfio_user_dma import DmaFlag
from vring_serial.proto.vfio_user_features import MigrationState
from vring_serial.proto.vfio_user_version import Capabilities
from vring_serial.proto.vfio_user_wire import DEFAULT_DATA_XFER_SIZE, IrqIndex
from vring_serial.saving import Fields, StateFormat, check_range
from vring_serial.transport.repeatable import Handled
from vring_serial.transport.state_memory import MAX_STATE

#: Regions that a client may map; each with a descriptor is a mapping of this process.
MAX_DMA_MAPS = 4096
#: Smallest max_data_xfer_size of a client: memory that it does not share is read and written in
#: pieces of this size.
MIN_DATA_XFER_SIZE = 4096
#: The migration states that a client can ask for: from each of them to each other the way is
#: direct, or by STOP ("Direct State Transitions"; PRE_COPY is not supported).
PHASES = frozenset(
    {
        MigrationState.STOP,
        MigrationState.RUNNING,
        MigrationState.STOP_COPY,
        MigrationState.RESUMING,
    }
)
#: Those in which the function's state is on its way.
MOVING = frozenset({MigrationState.STOP_COPY, MigrationState.RESUMING})


@dataclass(frozen=True, slots=True)
class DmaRegion:
    """One DMA mapping.

    Attributes:
        address: first DMA address.
        size: bytes.
        flags: DmaFlag.
        offset: bytes from the start of the descriptor's file to the region.
        shared: the client gave a descriptor for it.
        serial: the number under which that, or a copy's, is kept for a successor of this process.
        file: the serial of an older mapping of the same file, whose descriptor serves; -1: its own.
    """

    address: int
    size: int
    flags: int
    offset: int
    shared: bool
    serial: int = 0
    file: int = -1

    @property
    def descriptor(self) -> int:
        """The number under which its descriptor is kept."""
        return self.serial if self.file < 0 else self.file

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
        next_serial: the number of the next descriptor of a region, or of a state's memory.
        life: how many processes have served the client before this one.
        logging: DMA logging was started.
        phase: where the function is on its way to or from another server.
        memory: the number under which that of its state is kept, which the client reads or writes;
            None: there is none.
        length: bytes of the state in it.
        moved: those of them which the client has read.
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
    memory: int | None = None
    length: int = 0
    moved: int = 0
    elsewhere: bool = False


def check_client(state: ClientState, vectors: int) -> None:
    """Check a client's setup that somebody else wrote down, for a function of so many vectors.

    What a client may not do is not in it either. Raises StateError that names what does not fit.
    """
    if state.agreed is not None:
        _check_agreed(state.agreed)
    _check_regions(state.regions)
    interrupts: dict[int, int] = {IrqIndex.INTX: 1, IrqIndex.MSIX: vectors}
    for index, numbers in state.irqs.items():
        there = interrupts.get(index, 0)
        if numbers != sorted(set(numbers)):
            raise StateError(f"interrupts of type {index} are not in ascending order")
        for number in numbers:
            if not 0 <= number < there:
                raise StateError(f"interrupt {number} of type {index}; the function has {there}")
    check_range("next_serial", state.next_serial, 64)
    check_range("life", state.life, 32)
    # ERROR is where a state that does not fit leaves the function.
    if state.phase not in PHASES | {MigrationState.ERROR}:
        raise StateError(f"no function is in the migration state {state.phase.name}")
    if not 0 <= state.moved <= state.length <= MAX_STATE:
        raise StateError(
            f"{state.moved} bytes of a state of {state.length} were moved; "
            f"at most {MAX_STATE} are possible"
        )
    if (state.memory is not None) != (state.phase in MOVING):
        raise StateError(f"in state {state.phase.name}, the memory of a device state is another")


def _check_agreed(agreed: Capabilities) -> None:
    for name, least, most in (
        ("max_msg_fds", 0, MAX_FDS),
        ("max_data_xfer_size", MIN_DATA_XFER_SIZE, DEFAULT_DATA_XFER_SIZE),
    ):
        if not least <= (value := getattr(agreed, name)) <= most:
            raise StateError(f"{name} is {value}; {least} to {most} are possible")


def _check_regions(regions: dict[int, DmaRegion]) -> None:
    if len(regions) > MAX_DMA_MAPS:
        raise StateError(f"{len(regions)} mappings; {MAX_DMA_MAPS} are possible")
    end, serials = 0, set()
    for at, region in sorted(regions.items()):
        name = f"the mapping at {at:#x}"
        if region.address != at:
            raise StateError(f"{name} is said to begin at {region.address:#x}")
        check_range(f"{name}: offset", region.offset, 63)
        if at < end or region.size <= 0 or region.end > 1 << 64:
            raise StateError(f"{name} has {region.size:#x} bytes, which cannot be")
        if not region.flags or region.flags & ~int(DmaFlag.READ | DmaFlag.WRITE):
            raise StateError(f"{name} has flags {region.flags:#x}")
        end = region.end
        check_range(f"{name}: serial", region.serial, 64)
        check_range(f"{name}: file", region.file + 1, 64)
        serials.add(region.serial)
    if len(serials) != len(regions):
        raise StateError("two mappings have the same serial")


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
        client: the setup, without regions.
        gone: numbers of regions that are still written down, and were unmapped.
        handled: the message; all this is written down at once, for it must not be handled twice.
    """

    client: ClientState = field(default_factory=ClientState)
    gone: list[int] = field(default_factory=list)
    handled: Handled = field(default_factory=Handled)


@dataclass(slots=True)
class WrittenRegions:
    """Some of a client's DMA mappings.

    Attributes:
        regions: in no order. One whose number has not been given yet is not mapped yet either.
    """

    regions: list[DmaRegion] = field(default_factory=list)


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


def _separate_regions(written: Fields) -> Fields:
    """Make version 2 of a client of version 1, which had a moved state's bytes in itself.

    Regions may be in it: they are read there, and written elsewhere.
    """
    client = written["client"]
    if MigrationState(client["phase"]) in MOVING:
        raise ValueError("the function's state is on its way")
    del client["content"]
    client |= {"memory": None, "length": 0, "moved": 0}
    return written | {"gone": []}


#: How all that is written down for a successor of this process.
CLIENT = StateFormat("vfio-user client", 2, WrittenClient, {1: _separate_regions})
REGIONS = StateFormat("DMA mappings", 1, WrittenRegions)
REGISTERS = StateFormat("PCI registers", 1, WrittenRegisters)
TABLE = StateFormat("MSI-X table", 1, WrittenTable)
QUEUES = StateFormat("PCI queues", 1, WrittenQueues)
