"""A session and its PCI function, written down part by part for a successor of this process.

A driver accesses registers a thousand times while it starts, so each access writes only what it
changed. The sections (see Keeping), in the order in which they are written:

============  ====================================================================================
section       contents
============  ====================================================================================
queues.N      the setup of 16 queues
msix          the MSI-X table
registers     the rest of the function
regions.N     up to 64 of the client's DMA mappings
session       the rest of the client's setup, and the message that changed it
handled       any other message: its number (8 bytes), its length (8), itself, and its answer
============  ====================================================================================

Of the function there may be less in them, or more, than the last message that is known to have been
handled: it is handled again then. All accesses of registers lead to the same state when they are
done again; what a client sets up does not, and so goes with its message. Of the two messages that
are written down the one with the higher number was the last.

A mapping counts once the section ``session`` says that its number was given, and until it says that
it is gone: so one is added before that is written, and removed after it.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from vring_serial.device.pci import PciDevice
from vring_serial.device.pci.state import FunctionState, MsixState
from vring_serial.device.registers.state import DriverState, RegistersState
from vring_serial.errors import StateError
from vring_serial.keeping import Keeping
from vring_serial.saving import Packer
from vring_serial.transport.repeatable import Handled, check_handled
from vring_serial.transport.session import ENDED, SESSION
from vring_serial.transport.vfio_user.state import (
    CLIENT,
    MAX_DMA_MAPS,
    QUEUES,
    REGIONS,
    REGISTERS,
    TABLE,
    ClientState,
    DmaRegion,
    RemoteRingsState,
    WrittenClient,
    WrittenQueues,
    WrittenRegions,
    WrittenRegisters,
    WrittenTable,
    check_client,
)

#: Queues in one section.
QUEUES_EACH = 16
#: Mappings in one section.
REGIONS_EACH = 64
_REGION_SECTIONS = MAX_DMA_MAPS // REGIONS_EACH
_NUMBERS = struct.Struct("<QQ")
_QUEUES, _TABLE, _REGISTERS, _HANDLED = "queues.{}", "msix", "registers", "handled"
_REGIONS = "regions.{}"


@dataclass(frozen=True, slots=True)
class Left:
    """What a predecessor of this process left of a session.

    Attributes:
        client: the client's setup.
        function: the PCI function.
        rings: its rings in memory that only the client has.
        handled: the message that it had handled last.
        running: indices of the queues that it served.
        mappings: what stands in the sections of mappings, by number of the section.
    """

    client: ClientState
    function: FunctionState
    rings: RemoteRingsState
    handled: Handled
    running: tuple[int, ...]
    mappings: dict[int, list[DmaRegion]]


def read_left(keeping: Keeping, queues: int, vectors: int) -> Left | None:
    """Return what a predecessor left of a session; None if it had not begun, or has ended.

    Raises StateError: it is damaged, or of another device than one of so many queues and
    MSI-X vectors.
    """
    written = keeping.read(SESSION)
    if written is None or written == ENDED:
        return None
    client = CLIENT.unpack(written)
    mappings = _read_regions(keeping)
    _add_regions(client, mappings)
    check_client(client.client, vectors)
    registers = REGISTERS.unpack(_part(keeping, _REGISTERS))
    if registers.num_queues != queues:
        raise StateError(f"it has {registers.num_queues} queues, and the device has {queues}")
    setups = []
    for number in range(-(-queues // QUEUES_EACH)):
        setups += QUEUES.unpack(_part(keeping, _QUEUES.format(number))).queues
    if [setup.index for setup in setups] != list(range(queues)):
        raise StateError(f"its queues are not 0 to {queues - 1}")
    if not set(registers.owed) <= set(range(queues)):
        raise StateError(f"drivers of queues {registers.owed} are to be interrupted")
    table = TABLE.unpack(_part(keeping, _TABLE)).table
    handled = client.handled
    if (other := keeping.read(_HANDLED)) is not None:
        handled = max(handled, _unpack_handled(other), key=lambda each: each.number)
    check_handled(handled)
    return Left(
        client.client,
        FunctionState(
            RegistersState(registers.driver, setups), registers.config_space, MsixState(table)
        ),
        RemoteRingsState(registers.owed),
        handled,
        tuple(setup.index for setup in setups if setup.running),
        mappings,
    )


def _part(keeping: Keeping, section: str) -> bytes:
    if (written := keeping.read(section)) is None:
        raise StateError(f"the section {section} is missing")
    return written


def _read_regions(keeping: Keeping) -> dict[int, list[DmaRegion]]:
    """Return what stands in the sections of mappings, by number of the section."""
    found = {}
    for number in range(_REGION_SECTIONS):
        if written := keeping.read(_REGIONS.format(number)):
            found[number] = REGIONS.unpack(written).regions
            if len(found[number]) > REGIONS_EACH:
                raise StateError(f"{len(found[number])} mappings in one section")
    return found


def _add_regions(written: WrittenClient, sections: dict[int, list[DmaRegion]]) -> None:
    """Give the client the mappings that count. Raises StateError if two begin at one place."""
    client, gone = written.client, set(written.gone)
    for region in (each for section in sections.values() for each in section):
        if region.serial < client.next_serial and region.serial not in gone:
            if region.address in client.regions:
                raise StateError(f"two mappings begin at {region.address:#x}")
            client.regions[region.address] = region


def _pack_handled(handled: Handled) -> bytes:
    head = _NUMBERS.pack(handled.number, len(handled.message))
    return head + handled.message + handled.answer


def _unpack_handled(data: bytes) -> Handled:
    if len(data) < _NUMBERS.size:
        raise StateError(f"{len(data)} bytes are no message")
    number, length = _NUMBERS.unpack_from(data)
    end = _NUMBERS.size + length
    return Handled(number, data[_NUMBERS.size : end], data[end:])


class Writer:
    """Writes one session down.

    Args:
        keeping: where to.
        pci: the function.
        rings: its rings in memory that only the client has.
        left: what a predecessor left of this session; None: nothing.
    """

    def __init__(
        self, keeping: Keeping, pci: PciDevice, rings: RemoteRingsState, left: Left | None = None
    ) -> None:
        self._keeping = keeping
        self._pci = pci
        self._rings = rings
        self._new = True
        self._driver = DriverState()
        self._config_space = b""
        self._table = b""
        self._owed: list[int] = []
        # The mappings that are written down, by number, in each section; and where each of them is.
        self._sections: list[dict[int, DmaRegion]] = [{} for _ in range(_REGION_SECTIONS)]
        self._places: dict[int, int] = {}
        self._packers = [Packer(REGIONS) for _ in self._sections]
        if left is not None:
            for number, regions in left.mappings.items():
                self._sections[number] = {each.serial: each for each in regions}
                self._places |= dict.fromkeys(self._sections[number], number)
        else:
            keeping.write(_HANDLED, b"")  # of the session before
            for number in range(_REGION_SECTIONS):
                if keeping.read(_REGIONS.format(number)):
                    keeping.write(_REGIONS.format(number), b"")

    def write(self, handled: Handled, client: ClientState | None) -> None:
        """Write what a message changed, and that it was handled.

        Args:
            handled: the message, and its answer.
            client: what the client has set up, if that has changed; None: it has not.
        """
        # Both, and in this order: the client's setup is of no use without the function.
        self.write_function()
        if client is None:
            self._keeping.write(_HANDLED, _pack_handled(handled))
            return
        mapped = {region.serial: region for region in client.regions.values()}
        gone = sorted(self._places.keys() - mapped.keys())
        self._add_mappings([mapped[serial] for serial in mapped.keys() - self._places.keys()])
        written = WrittenClient(dataclasses.replace(client, regions={}), gone, handled)
        self._keeping.write(SESSION, CLIENT.pack(written))
        self._remove_mappings(gone)

    def _add_mappings(self, regions: Iterable[DmaRegion]) -> None:
        changed = set()
        for region in regions:
            number = next(i for i, each in enumerate(self._sections) if len(each) < REGIONS_EACH)
            self._sections[number][region.serial] = region
            self._places[region.serial] = number
            changed.add(number)
        self._write_mappings(changed)

    def _remove_mappings(self, serials: Iterable[int]) -> None:
        changed = set()
        for serial in serials:
            number = self._places.pop(serial)
            del self._sections[number][serial]
            changed.add(number)
        self._write_mappings(changed)

    def _write_mappings(self, sections: Iterable[int]) -> None:
        for number in sections:
            regions = WrittenRegions(list(self._sections[number].values()))
            packed = self._packers[number].pack(regions)
            self._keeping.write(_REGIONS.format(number), packed)

    def write_function(self) -> None:
        """Write what has changed in the function."""
        state = self._pci.state
        setups = state.registers.queues
        queues = self._pci.take_changed_queues()
        if self._new:
            queues = set(range(len(setups)))
        for number in sorted({index // QUEUES_EACH for index in queues}):
            part = setups[number * QUEUES_EACH : (number + 1) * QUEUES_EACH]
            self._keeping.write(_QUEUES.format(number), QUEUES.pack(WrittenQueues(part)))
        if self._new or self._table != state.msix.table:
            self._table = bytes(state.msix.table)
            self._keeping.write(_TABLE, TABLE.pack(WrittenTable(state.msix.table)))
        driver = state.registers.driver
        if (
            self._new
            or self._driver != driver
            or self._config_space != state.config_space
            or self._owed != self._rings.owed
        ):
            self._driver = dataclasses.replace(driver)
            self._config_space = bytes(state.config_space)
            self._owed = list(self._rings.owed)
            written = WrittenRegisters(len(setups), driver, state.config_space, self._owed)
            self._keeping.write(_REGISTERS, REGISTERS.pack(written))
        self._new = False
