"""The complete, checked configuration: controllers, their ports, and the ports' host ends.

A :class:`Topology` is made by :mod:`.domain_xml`, by :mod:`.qemu_options` or by both (see
:func:`vring_serial.config.load`), and turned into devices by :mod:`.build`. It holds no open
resource: making one opens no file, socket or terminal except the domain XML.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from vring_serial.chardev import LogOptions, Options
from vring_serial.chardev.options import UNSHARED
from vring_serial.config.words import shorten
from vring_serial.errors import ConfigError
from vring_serial.spice.options import SpiceOptions

#: Default number of ports of a controller, as in QEMU and libvirt (port 0 included).
DEFAULT_MAX_PORTS = 31
#: QEMU's limit: 1024 queues, less the control queues, two per port.
LARGEST_MAX_PORTS = 511
#: The only valid name of a spicevmc channel, and its default.
SPICEVMC_NAME = "com.redhat.spice.0"

_PCI_ADDRESS = re.compile(
    r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])", re.IGNORECASE
)


@dataclass(frozen=True, slots=True, order=True)
class PciAddress:
    """The address at which the guest sees a controller, as libvirt writes it.

    Attributes:
        domain: PCI domain, 16 bits.
        bus: bus number, 8 bits.
        slot: device number on the bus, 5 bits.
        function: function number, 3 bits.
    """

    domain: int = 0
    bus: int = 0
    slot: int = 0
    function: int = 0

    def __post_init__(self) -> None:
        for name, bound in (
            ("domain", 1 << 32),
            ("bus", 1 << 8),
            ("slot", 1 << 5),
            ("function", 8),
        ):
            value = getattr(self, name)
            if not 0 <= value < bound:
                raise ValueError(f"PCI {name} {value:#x} is not below {bound:#x}")

    @classmethod
    def parse(cls, text: str) -> PciAddress:
        """Parse ``0000:00:05.0`` or ``00:05.0``. Raises ValueError."""
        match = _PCI_ADDRESS.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no PCI address such as 0000:00:05.0")
        domain, bus, slot, function = match.groups(default="0")
        return cls(int(domain, 16), int(bus, 16), int(slot, 16), int(function, 16))

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.slot:02x}.{self.function}"


@dataclass(frozen=True, slots=True)
class ChardevConfig:
    """One host end.

    Attributes:
        kind: QEMU's name of the backend, one of ``vring_serial.chardev.kinds()``.
        id: unique in the topology; logs use it.
        options: an instance of ``vring_serial.chardev.options_type(kind)``.
        where: its place in the configuration, for errors: ``guest.xml:12: <channel>``.
        log: where what the guest writes is logged; without a ``logfile``, nowhere.
        mux: whether several ports may share it.
    """

    kind: str
    id: str
    options: Options
    where: str = field(default="", compare=False)
    log: LogOptions = field(default_factory=LogOptions)
    mux: bool = False


@dataclass(frozen=True, slots=True)
class PortConfig:
    """One port.

    Attributes:
        nr: port number on its controller; 0 only for a console.
        name: name that the guest sees; "" for none.
        chardev: its host end.
        console: whether it is a console.
    """

    nr: int
    name: str
    chardev: ChardevConfig
    console: bool = False


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """One virtio-serial device.

    Attributes:
        index: libvirt's number of the controller.
        max_ports: number of ports, port 0 included; a port's number is below it.
        address: its PCI address in the guest, or None if the frontend decides.
        ports: its ports by number, ascending.
        vectors: entries of its MSI-X table, 0 for INTx only; None if unspecified.
        transitional: whether it also supports legacy (pre-1.0) drivers; None if unspecified.
        packed: whether it offers packed rings; None if unspecified.
    """

    index: int
    max_ports: int
    address: PciAddress | None
    ports: tuple[PortConfig, ...]
    vectors: int | None = None
    transitional: bool | None = None
    packed: bool | None = None

    @property
    def name(self) -> str:
        """Name in QEMU's options and in logs."""
        return f"virtio-serial{self.index}"

    @property
    def summary(self) -> str:
        """Number of ports, and the requested address, for logs; the guest may see another one."""
        ports = f"{len(self.ports)} of {self.max_ports} ports"
        return ports if self.address is None else f"{ports}, {self.address} asked for"


@dataclass(frozen=True, slots=True)
class SpiceConfig:
    """The SPICE server that spicevmc and spiceport ends belong to.

    Attributes:
        options: addresses and settings of the server.
        where: its place in the configuration, for errors.
        explicit: whether an option declares it, as opposed to the domain XML.
    """

    options: SpiceOptions
    where: str = field(default="", compare=False)
    explicit: bool = False


def check_mux(kind: str, where: str) -> None:
    """Raise ConfigError if ports cannot share a host end of this kind."""
    if kind in UNSHARED:
        raise ConfigError(f"ports cannot share {kind}", where)


@dataclass(frozen=True, slots=True)
class Topology:
    """Everything that one process serves.

    Attributes:
        controllers: by index, ascending; at least one.
        warnings: one line each, about settings without effect.
        name: the domain's name.
        spice: the SPICE server, or None.
        sockets: where a converted domain says that its controllers are served, over vfio-user.
    """

    controllers: tuple[ControllerConfig, ...]
    warnings: tuple[str, ...] = ()
    name: str = "vring"
    spice: SpiceConfig | None = None
    sockets: tuple[str, ...] = ()


def check_domain_name(name: str, where: str) -> None:
    """Raise ConfigError for what cannot be a domain's name: paths are made of it."""
    if not name or "/" in name or not name.isprintable():
        raise ConfigError(f"{shorten(name)} cannot be a domain's name", where)
