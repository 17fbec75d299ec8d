"""PCI addresses of a domain: those in use, and those that libvirt would choose.

libvirt makes two passes over the devices, in its own order. In the first, it adds a bus whenever
none has room for a device: a PCI Express root port, or a bridge to conventional PCI. In the second,
it assigns all addresses again, those of the added bridges first. So a device after ours can change
our address, and both passes have to be simulated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from vring_serial.config.topology import PciAddress
from vring_serial.errors import ConfigError

_LAST_BUS = 255


class Plug(Enum):
    """The kind of slot that a device needs."""

    CONVENTIONAL = auto()
    EXPRESS = auto()
    BRIDGE = auto()
    TO_CONVENTIONAL = auto()
    UPSTREAM = auto()


_CONVENTIONAL_BUS = (frozenset({Plug.CONVENTIONAL, Plug.BRIDGE}), range(1, 32))
_EXPRESS_PORT = (frozenset({Plug.EXPRESS, Plug.TO_CONVENTIONAL, Plug.UPSTREAM}), range(1))
#: Devices that libvirt places on the bus of a controller of this model, and the usable slots.
_BUSES = {
    "pci-root": _CONVENTIONAL_BUS,
    "pci-bridge": _CONVENTIONAL_BUS,
    "pcie-to-pci-bridge": _CONVENTIONAL_BUS,
    "dmi-to-pci-bridge": (frozenset({Plug.BRIDGE}), range(32)),
    "pcie-root-port": _EXPRESS_PORT,
    "pcie-switch-downstream-port": _EXPRESS_PORT,
}
#: Needs of the controllers themselves, if they take a slot that ours could have had.
_PLUGS = {
    "pci-bridge": Plug.BRIDGE,
    "pcie-to-pci-bridge": Plug.TO_CONVENTIONAL,
    "pcie-switch-upstream-port": Plug.UPSTREAM,
}


@dataclass(frozen=True, slots=True)
class PciMachine:
    """The PCI properties of a kind of machine.

    Attributes:
        root: the model of its bus 0, ``pci-root`` or ``pcie-root``.
        multi_root: it is extended by further roots instead of bridges (pseries).
        chipset: addresses used by the chipset.
        video_slot: slot of bus 0 for the first display; None if there is no fixed one.
    """

    root: str = "pci-root"
    multi_root: bool = False
    chipset: tuple[PciAddress, ...] = ()
    video_slot: int | None = None

    @property
    def express(self) -> bool:
        """Whether the root bus is PCI Express."""
        return self.root == "pcie-root"


PC = PciMachine(chipset=tuple(PciAddress(slot=1, function=f) for f in (0, 1, 2, 3)), video_slot=2)
Q35 = PciMachine(
    "pcie-root", chipset=tuple(PciAddress(slot=0x1F, function=f) for f in (0, 2, 3)), video_slot=1
)
VIRT = PciMachine("pcie-root")
PSERIES = PciMachine(multi_root=True)
CONVENTIONAL = PciMachine()
#: Slots of q35's bus 0 where libvirt puts certain devices that come without an address: USB, sound,
#: a bridge to conventional PCI.
_Q35_HOME = {0x1A, 0x1B, 0x1D, 0x1E, 0x1F}


class PciSlots:
    """The used addresses of a domain, and the devices still without one.

    Args:
        machine: the kind of machine.

    Attributes:
        video: whether there is a first display without an address.
        before, after: needs of the emulator's devices without an address, in libvirt's order:
            those before our controllers, and those after.
        ours_by_default: whether our controllers are on PCI if the domain does not say.
    """

    def __init__(self, machine: PciMachine = PC) -> None:
        self.machine = machine
        self.video = False
        self.before: list[Plug] = []
        self.after: list[Plug] = []
        self.ours_by_default = True
        self._models: dict[int, str] = {0: machine.root}
        self._fixed: set[int] = set()
        self._owners: dict[PciAddress, str] = {}
        self._slots: set[int] = set()  # of bus 0, in use
        for address in machine.chipset:
            self.note(address, "the chipset")

    def add_bus(self, index: int, model: str, *, fixed: bool) -> None:
        """Add a bus that the domain has; ``fixed`` if its controller has an address."""
        if 0 < index <= _LAST_BUS:
            self._models[index] = model
            if fixed:
                self._fixed.add(index)

    def note(self, address: PciAddress, where: str) -> None:
        """Record the address of an emulator's device, without checking it."""
        self._owners.setdefault(address, where)
        if address.domain == address.bus == 0:
            self._slots.add(address.slot)

    def take(self, address: PciAddress, where: str) -> None:
        """Assign ``address`` to one of our controllers. Raises ConfigError if it is taken."""
        if (other := self._owners.get(address)) is not None:
            raise ConfigError(f"PCI address {address} is taken already ({other})", where)
        self.note(address, where)

    def has(self, slot: int) -> bool:
        """Return whether a slot of bus 0 is in use."""
        return slot in self._slots

    def assign(self, ours: Sequence[Plug]) -> list[PciAddress | None]:
        """Return addresses for our controllers without one; None where there is no room left."""
        return self._settle(ours)[1]

    def last_free(self, avoid: Iterable[int]) -> int | None:
        """Return the last slot of bus 0 that libvirt leaves free, and reaches last of all.

        Args:
            avoid: slots that somebody else has.
        """
        buses, _ = self._settle([])
        taken = {*buses.used_of_root, *self._slots, *avoid}
        if self.machine is Q35:
            taken |= _Q35_HOME
        return next((slot for slot in range(31, 0, -1) if slot not in taken), None)

    def _settle(self, ours: Sequence[Plug]) -> tuple[_Buses, list[PciAddress | None]]:
        """Return the buses when all devices have a place, and the places of ours."""
        growing = _Buses(self.machine, self._models, self._owners, grows=True)
        self._place_video(growing)
        if not self.machine.express and growing.has_room:
            growing.place(Plug.CONVENTIONAL)  # libvirt keeps room for a bridge that may come
        self._place_all(growing, self._models, ours)
        settled = _Buses(self.machine, growing.models, self._owners, grows=False)
        self._place_video(settled)
        return settled, self._place_all(settled, growing.models, ours)

    def _place_video(self, buses: _Buses) -> None:
        slot = self.machine.video_slot
        if self.video and slot is not None and not buses.take(slot):
            buses.place(Plug.CONVENTIONAL)

    def _place_all(
        self, buses: _Buses, models: Mapping[int, str], ours: Sequence[Plug]
    ) -> list[PciAddress | None]:
        for index, model in sorted(models.items()):
            if index and index not in self._fixed and model in _PLUGS:
                bridge = buses.place(_PLUGS[model])
                if bridge is None or bridge.bus >= index:
                    return [None] * len(ours)  # libvirt refuses a bridge that is behind itself
        for plug in self.before:
            buses.place(plug)
        placed = [buses.place(plug) for plug in ours]
        for plug in self.after:
            buses.place(plug)
        return placed


@dataclass(slots=True)
class _Bus:
    takes: frozenset[Plug]
    slots: range
    used: set[int] = field(default_factory=set)

    def free_slot(self) -> int | None:
        return next((slot for slot in self.slots if slot not in self.used), None)


class _Buses:
    """The buses of one of libvirt's two passes; see the module.

    Args:
        models: models of the existing buses, by number; omitted numbers get the usual model.
        taken: used addresses.
        grows: whether buses are added when there is no room.

    Attributes:
        models: models of all buses, added ones included.
    """

    def __init__(
        self,
        machine: PciMachine,
        models: Mapping[int, str],
        taken: Iterable[PciAddress],
        *,
        grows: bool,
    ) -> None:
        self.models: dict[int, str] = {}
        self._machine = machine
        self._grows = grows
        self._buses: list[_Bus] = []
        self._first: dict[Plug, int] = dict.fromkeys(Plug, 0)  # buses before it have no room
        taken = [address for address in taken if address.domain == 0]
        usual = "pcie-root-port" if machine.express else "pci-bridge"
        if machine.multi_root:
            usual = "pci-root"
        for number in range(1 + max([*models, *(address.bus for address in taken)])):
            self._add(models.get(number, usual))
        for address in taken:
            self._buses[address.bus].used.add(address.slot)

    @property
    def has_room(self) -> bool:
        return any(bus.free_slot() is not None for bus in self._buses)

    @property
    def used_of_root(self) -> set[int]:
        """Slots of bus 0 that are in use."""
        return self._buses[0].used

    def take(self, slot: int) -> bool:
        """Take this slot of bus 0 unless it is in use."""
        used = self._buses[0].used
        if slot in used:
            return False
        used.add(slot)
        return True

    def place(self, plug: Plug) -> PciAddress | None:
        """Take and return the first suitable slot; None if there is no room."""
        if plug is Plug.EXPRESS and not self._machine.express:
            plug = Plug.CONVENTIONAL
        while True:
            for number in range(self._first[plug], len(self._buses)):
                bus = self._buses[number]
                if plug in bus.takes and (slot := bus.free_slot()) is not None:
                    bus.used.add(slot)
                    self._first[plug] = number
                    return PciAddress(bus=number, slot=slot)
            self._first[plug] = len(self._buses)
            if not self._grow(plug):
                return None

    def _grow(self, plug: Plug) -> bool:
        if not self._grows or len(self._buses) >= _LAST_BUS:
            return False
        if plug not in _CONVENTIONAL_BUS[0]:
            self._add("pcie-root-port")
        elif self._machine.multi_root:
            self._add("pci-root")
        elif any(Plug.BRIDGE in bus.takes for bus in self._buses):
            self._add("pci-bridge")
        else:
            # With the first conventional bus of such a machine, the port that its bridge will need
            # is added as well; nothing else is placed there in this pass.
            self._add("pcie-root-port").takes = frozenset({Plug.TO_CONVENTIONAL})
            self._add("pcie-to-pci-bridge")
        return True

    def _add(self, model: str) -> _Bus:
        bus = _Bus(*_BUSES.get(model, (frozenset(), range(0))))
        self.models[len(self._buses)] = model
        self._buses.append(bus)
        return bus
