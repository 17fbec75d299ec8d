"""What is to be served, settled and checked: controllers, their ports, and the ports' host ends.

A :class:`Topology` is made by :mod:`.domain_xml`, by :mod:`.qemu_options` or by both (see
:func:`vring_serial.config.load`), and turned into devices by :mod:`.build`. It holds no open thing:
making one touches no file, socket or terminal but the domain XML itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from vring_serial.chardev import Options
from vring_serial.spice.options import SpiceOptions

#: Ports of a controller where nothing else is said: what QEMU and libvirt give (port 0 included).
DEFAULT_MAX_PORTS = 31
#: QEMU's bound: 1024 queues, less the control queues, two for each port.
LARGEST_MAX_PORTS = 511
#: The only name a spicevmc channel may have, and the one it gets.
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
        """``0000:00:05.0`` or ``00:05.0``. Raises ValueError."""
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
        where: the place that asked for it, for errors: ``guest.xml:12: <channel>``.
    """

    kind: str
    id: str
    options: Options
    where: str = field(default="", compare=False)


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
        address: where the guest sees it, or None if that is the frontend's affair.
        ports: by number, ascending.
        vectors: entries of its MSI-X table, 0 for INTx alone; None if nothing is said about it.
        transitional: whether it is there for drivers of before virtio 1.0; None as above.
        packed: whether it offers packed rings; None as above.
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
        """The name that QEMU's options and our logs use."""
        return f"virtio-serial{self.index}"

    @property
    def summary(self) -> str:
        """How many ports it has, and the address asked for; the guest may see another one."""
        ports = f"{len(self.ports)} of {self.max_ports} ports"
        return ports if self.address is None else f"{ports}, {self.address} asked for"


@dataclass(frozen=True, slots=True)
class SpiceConfig:
    """The SPICE server that spicevmc and spiceport ends belong to.

    Attributes:
        options: where and how.
        where: the place that asked for it, for errors.
        explicit: an option asked for it; it is no part of a domain that is there anyhow.
    """

    options: SpiceOptions
    where: str = field(default="", compare=False)
    explicit: bool = False


@dataclass(frozen=True, slots=True)
class Topology:
    """Everything one process serves.

    Attributes:
        controllers: by index, ascending; at least one.
        warnings: one line each, about what was asked for and is not ours to do.
        name: the domain's name.
        spice: the SPICE server, or None if none was asked for.
    """

    controllers: tuple[ControllerConfig, ...]
    warnings: tuple[str, ...] = ()
    name: str = "vring"
    spice: SpiceConfig | None = None
