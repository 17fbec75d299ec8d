"""The step from the user's input to a :class:`Topology`: collect, complete, check.

Both readers (:mod:`.domain_xml`, :mod:`.qemu_options`) add to one :class:`Draft`. Then
:meth:`Draft.finish` does what libvirt does with a domain: it adds missing controllers, assigns free
numbers, names, paths and PCI addresses, and refuses invalid combinations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from vring_serial.chardev.options import FRONTS_MAX, base_id
from vring_serial.chardev.protocol import SpiceportOptions
from vring_serial.config.pci import PciSlots, Plug
from vring_serial.config.topology import (
    DEFAULT_MAX_PORTS,
    LARGEST_MAX_PORTS,
    SPICEVMC_NAME,
    ChardevConfig,
    ControllerConfig,
    PciAddress,
    PortConfig,
    SpiceConfig,
    Topology,
)
from vring_serial.errors import ConfigError
from vring_serial.proto.console import MAX_NAME
from vring_serial.unix_socket import MAX_PATH

#: Kinds of host ends that belong to the SPICE server.
_SPICE_KINDS = {"spicevmc", "spiceport"}
#: More controllers than any machine has slots.
MAX_CONTROLLER_INDEX = 255


@dataclass(slots=True)
class DraftController:
    """A controller as requested, not yet complete.

    Attributes:
        index: its controller index.
        where: place in the configuration that requested it, for errors.
        max_ports: number of ports, port 0 included; 0 if still to be chosen.
        address: its PCI address; None if still to be chosen.
        pci: whether it gets a PCI address at all; None if unspecified.
        rank: its place in libvirt's list of controllers; None if it was not declared.
        transitional, packed, vectors: as in ControllerConfig.
    """

    index: int
    where: str
    max_ports: int = 0
    address: PciAddress | None = None
    pci: bool | None = None
    rank: int | None = None
    transitional: bool | None = None
    packed: bool | None = None
    vectors: int | None = None


@dataclass(slots=True)
class DraftPort:
    """A port as requested, not yet complete.

    Attributes:
        where: place in the configuration that requested it, for errors.
        chardev: its host end.
        console: whether it is a console.
        name: its name; "" for none.
        controller: index of its controller; None if still to be chosen.
        nr: its port number; None if still to be chosen.
    """

    where: str
    chardev: ChardevConfig
    console: bool = False
    name: str = ""
    controller: int | None = None
    nr: int | None = None


@dataclass(slots=True)
class _Numbers:
    """The port numbers of one controller: their owners, and where to search for a free one."""

    max_ports: int
    owners: dict[int, DraftPort] = field(default_factory=dict)
    next_free: int = 1

    def take_free(self, port: DraftPort) -> int | None:
        """Assign the first free number to ``port`` and return it; None if all are taken."""
        if port.console and 0 not in self.owners:
            nr = 0
        else:
            while self.next_free in self.owners:
                self.next_free += 1
            nr = self.next_free
        if nr >= self.max_ports:
            return None
        self.owners[nr] = port
        return nr


class Draft:
    """Controllers, host ends and ports collected so far; see the module.

    Attributes:
        where: place that errors about the whole configuration name.
        name: the domain's name.
        max_ports: number of ports of controllers that do not say.
        pci: the used addresses, or None if no controller gets one.
        warnings: lines for the topology.
        sockets: where the domain says that its controllers are served.
        spice: the SPICE server of an option.
        read_spice: reads the domain's SPICE server; called if a host end needs a server and no
            option declares one.
    """

    def __init__(self, *, max_ports: int = 0) -> None:
        self.where = ""
        self.name = "vring"
        self.max_ports = max_ports or DEFAULT_MAX_PORTS
        self.pci: PciSlots | None = None
        self.warnings: list[str] = []
        self.sockets: tuple[str, ...] = ()
        self.spice: SpiceConfig | None = None
        self.read_spice: Callable[[], SpiceConfig | None] | None = None
        self._controllers: dict[int, DraftController] = {}
        self._ports: list[DraftPort] = []
        self._chardev_ids: dict[str, str] = {}

    def add_controller(self, controller: DraftController) -> None:
        """Add a controller; raise ConfigError if its index is taken or it has too many ports."""
        other = self._controllers.get(controller.index)
        if other is not None:
            raise ConfigError(
                f"controller {controller.index} is there already ({other.where})", controller.where
            )
        if controller.index > MAX_CONTROLLER_INDEX:
            raise ConfigError(
                f"controller {controller.index} is above {MAX_CONTROLLER_INDEX}", controller.where
            )
        check_max_ports(controller.max_ports or self.max_ports, controller.where)
        self._controllers[controller.index] = controller

    def claim_chardev_id(self, id: str, where: str) -> None:
        """Reserve the id of a host end; raise ConfigError if another has it."""
        if id in self._chardev_ids:
            raise ConfigError(
                f"chardev id {id!r} is taken already ({self._chardev_ids[id]})", where
            )
        self._chardev_ids[id] = where

    def claim_chardev(self, chardev: ChardevConfig) -> None:
        """Reserve what a host end is called; raise ConfigError as :meth:`claim_chardev_id`."""
        self.claim_chardev_id(chardev.id, chardev.where)
        if chardev.mux:
            self.claim_chardev_id(base_id(chardev.id), chardev.where)

    def add_port(self, port: DraftPort) -> None:
        """Add a port.

        Raises ConfigError: its name is invalid, or wrong for a spicevmc end, or too many ports
        share its end.
        """
        if sum(other.chardev is port.chardev for other in self._ports) >= FRONTS_MAX:
            id = port.chardev.id
            raise ConfigError(f"{FRONTS_MAX} ports share chardev {id} already", port.where)
        if port.chardev.kind == "spicevmc":
            if port.console:
                raise ConfigError("a console cannot be spicevmc", port.where)
            port.name = port.name or SPICEVMC_NAME
            if port.name != SPICEVMC_NAME:
                raise ConfigError(
                    f"a spicevmc channel is named {SPICEVMC_NAME}, not {port.name!r}", port.where
                )
        if port.chardev.kind == "spiceport" and port.console:
            raise ConfigError("a console cannot be spiceport", port.where)
        _check_name(port.name, port.where)
        self._ports.append(port)

    def finish(self) -> Topology:
        """Choose all omitted values and check the whole.

        Raises:
            ConfigError: numbers, names, addresses or paths collide, or there is nothing to serve.
        """
        self._check_names()
        self._add_missing_controllers()
        numbers = self._assign_numbers()
        if not self._controllers:
            raise ConfigError(
                "nothing to serve: no virtio-serial controller, channel or console", self.where
            )
        addresses = self._assign_addresses()
        controllers = tuple(
            ControllerConfig(
                index,
                numbers[index].max_ports,
                addresses.get(index),
                tuple(
                    PortConfig(nr, port.name, port.chardev, port.console)
                    for nr, port in sorted(numbers[index].owners.items())
                ),
                transitional=controller.transitional,
                packed=controller.packed,
                vectors=controller.vectors,
            )
            for index, controller in sorted(self._controllers.items())
        )
        _check_host_ends(port.chardev for controller in controllers for port in controller.ports)
        kinds = {port.chardev.kind for port in self._ports}
        if self.spice is None and self.read_spice is not None and kinds & _SPICE_KINDS:
            self.spice = self.read_spice()
        self._check_spice_ports()
        return Topology(controllers, tuple(self.warnings), self.name, self.spice, self.sockets)

    def _check_spice_ports(self) -> None:
        """Check that spiceports have a server, and different names to tell them apart."""
        named: dict[str, ChardevConfig] = {}
        for port in self._ports:
            if not isinstance(port.chardev.options, SpiceportOptions):
                continue
            name, where = port.chardev.options.name, port.chardev.where
            if self.spice is None:
                raise ConfigError(
                    "spiceport needs a SPICE server: --spice, or <graphics type='spice'> that "
                    "listens",
                    where,
                )
            if (other := named.setdefault(name, port.chardev)) is not port.chardev:
                raise ConfigError(f"SPICE port {name!r} is taken already ({other.where})", where)

    def _check_names(self) -> None:
        named: dict[str, DraftPort] = {}
        for port in self._ports:
            if port.name and (other := named.setdefault(port.name, port)) is not port:
                raise ConfigError(
                    f"name {port.name!r} is taken already ({other.where}): "
                    "a name is unique over all controllers",
                    port.where,
                )

    def _add_missing_controllers(self) -> None:
        for port in self._ports:
            index = port.controller or 0
            if index not in self._controllers:
                self.add_controller(DraftController(index, port.where))

    def _assign_numbers(self) -> dict[int, _Numbers]:
        """Assign given numbers first, then free ones to consoles, then to the other ports."""
        numbers = {
            index: _Numbers(controller.max_ports or self.max_ports)
            for index, controller in self._controllers.items()
        }
        open_ports: list[DraftPort] = []
        for port in self._ports:
            if port.nr is None:
                open_ports.append(port)
            else:
                _reserve(numbers[port.controller or 0], port)
        for port in sorted(open_ports, key=lambda port: not port.console):
            self._assign_number(port, numbers)
        return numbers

    def _assign_number(self, port: DraftPort, numbers: dict[int, _Numbers]) -> None:
        candidates = sorted(numbers) if port.controller is None else [port.controller]
        for index in candidates:
            if numbers[index].take_free(port) is not None:
                return
        if port.controller is not None:
            raise ConfigError(
                f"controller {port.controller} has no free port number below "
                f"{numbers[port.controller].max_ports}",
                port.where,
            )
        index = next(i for i in range(len(numbers) + 1) if i not in numbers)
        self.add_controller(DraftController(index, port.where))
        numbers[index] = _Numbers(self.max_ports)
        if numbers[index].take_free(port) is None:
            raise ConfigError(
                f"no free port number: a controller of {self.max_ports} ports has only port 0, "
                "which is a console's",
                port.where,
            )

    def _assign_addresses(self) -> dict[int, PciAddress]:
        """Return PCI addresses by controller index, given or chosen; none without a machine.

        A controller for which there is no room has none: the emulator decides.
        """
        addresses: dict[int, PciAddress] = {}
        if self.pci is None:
            return addresses
        default = self.pci.ours_by_default
        on_pci = [c for c in self._in_libvirts_order() if (default if c.pci is None else c.pci)]
        for controller in on_pci:
            if controller.address is not None:
                self.pci.take(controller.address, controller.where)
                addresses[controller.index] = controller.address
        missing = [c for c in on_pci if c.address is None]
        plugs = [Plug.CONVENTIONAL if c.transitional else Plug.EXPRESS for c in missing]
        for controller, address in zip(missing, self.pci.assign(plugs), strict=True):
            if address is not None:
                addresses[controller.index] = address
        return addresses

    def _in_libvirts_order(self) -> list[DraftController]:
        controllers = sorted(self._controllers.values(), key=lambda c: c.index)
        ordered = sorted((c for c in controllers if c.rank is not None), key=lambda c: c.rank or 0)
        for controller in controllers:
            if controller.rank is None:
                place = place_of(controller.index, [other.index for other in ordered])
                ordered.insert(place, controller)
        return ordered


def place_of(index: int | None, others: Sequence[int | None]) -> int:
    """Return where libvirt inserts a controller into its list of those of the same type.

    Before the first with a larger index; at the end if there is none, or if it has no index yet.
    """
    if index is not None:
        for place, other in enumerate(others):
            if other is not None and other > index:
                return place
    return len(others)


def check_unix_path(path: str, where: str) -> None:
    """Raise ConfigError unless ``path`` can be the path of a unix socket."""
    if "\0" in path:
        raise ConfigError("the socket's path holds a NUL", where)
    try:
        size = len(os.fsencode(path))
    except UnicodeEncodeError:
        raise ConfigError(f"{path!r} cannot be a socket's path", where) from None
    if not 1 <= size <= MAX_PATH:
        raise ConfigError(
            f"socket path {path} has {size} bytes; a unix socket's has 1 to {MAX_PATH}",
            where,
        )


def check_max_ports(max_ports: int, where: str) -> None:
    """Raise ConfigError unless a controller can have ``max_ports`` ports."""
    if not 1 <= max_ports <= LARGEST_MAX_PORTS:
        raise ConfigError(
            f"a controller has 1 to {LARGEST_MAX_PORTS} ports, not {max_ports}", where
        )


def _reserve(numbers: _Numbers, port: DraftPort) -> None:
    nr = port.nr
    assert nr is not None
    if nr >= numbers.max_ports:
        raise ConfigError(
            f"port number {nr} is not below {numbers.max_ports}, "
            f"the number of ports of controller {port.controller or 0}",
            port.where,
        )
    if nr == 0 and not port.console:
        raise ConfigError("port number 0 is reserved for a console", port.where)
    other = numbers.owners.setdefault(nr, port)
    if other is not port:
        raise ConfigError(
            f"port number {nr} of controller {port.controller or 0} is taken already "
            f"({other.where})",
            port.where,
        )


def _check_name(name: str, where: str) -> None:
    if len(name.encode(errors="surrogateescape")) > MAX_NAME:
        raise ConfigError(f"a port's name has at most {MAX_NAME} bytes", where)
    if not name.isprintable():
        raise ConfigError(f"port name {name!r} has characters that cannot be shown", where)


def _check_host_ends(chardevs: Iterable[ChardevConfig]) -> None:
    """Raise ConfigError if two ends create the same path or use the standard input."""
    makers: dict[str, ChardevConfig] = {}
    chardevs = list(chardevs)
    logged = {path: chardev for chardev in chardevs for path in log_paths(chardev)}
    for chardev in chardevs:
        path = getattr(chardev.options, "path", "")
        if chardev.kind in ("socket", "console") and path:
            check_unix_path(path, chardev.where)
        if chardev.kind == "file" and os.path.abspath(path) in logged:
            where = logged[os.path.abspath(path)].where
            raise ConfigError(f"{path} is a log already ({where})", chardev.where)
        made = path_made(chardev)
        for path in (made, *log_paths(chardev)):
            if path and (other := makers.setdefault(path, chardev)) is not chardev:
                raise ConfigError(f"{path} is in use already ({other.where})", chardev.where)


def log_paths(chardev: ChardevConfig) -> list[str]:
    """Return the paths of the chardev's log and of what it is renamed to: its alone."""
    log = chardev.log
    if not log.logfile:
        return []
    path = os.path.abspath(log.logfile)
    renamed = [f"{path}.{number}" for number in range(log.logbackups if log.logsize else 0)]
    return [path, *renamed]


def path_made(chardev: ChardevConfig) -> str:
    """Return what only one chardev can own: the path it creates, or ``stdio``; else ""."""
    options = chardev.options
    if chardev.kind == "stdio":
        return "stdio"
    path: str = getattr(options, "path", "")
    if getattr(options, "abstract", False):
        path = f"abstract {path}"
    elif path:
        path = os.path.abspath(path)
    makes_path = chardev.kind in ("pty", "console") or getattr(options, "server", False)
    return path if makes_path else ""
