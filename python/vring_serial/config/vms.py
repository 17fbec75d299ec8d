"""Virtual machines, each with its devices and how they are served: what one service serves.

They come from a file (:mod:`.toml_file`), from options, or both, and :mod:`.toml_text` writes them
down as a file. Nothing is opened here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vring_serial.config.draft import check_unix_path, log_paths, path_made
from vring_serial.config.topology import ChardevConfig, Topology
from vring_serial.config.words import shorten
from vring_serial.errors import ConfigError

WORKERS = ("vm", "shared")


@dataclass(frozen=True, slots=True)
class VmConfig:
    """One virtual machine.

    Attributes:
        topology: its controllers with their ports, and its name.
        sockets: one path per controller, in the controllers' order.
        vfio_user: use vfio-user on the sockets instead of vhost-user.
        connect: connect to frontends that listen, instead of listening.
        inband_notifications: offer kicks and calls as messages.
        busy_poll: microseconds for which the data plane keeps polling after work.
        agent_socket: path on which clients of the spicevmc port's agent connect, or None.
        transitional: also support legacy (pre-1.0) drivers (vfio-user).
        packed: offer packed rings.
        vectors: entries of the MSI-X table of controllers that do not specify it (vfio-user);
            None: see PciDevice.
        sandbox: what the process that serves it gives up, as ``--sandbox`` has it; None: the
            default.
        user: the user that it becomes, as ``--user`` has it; None: it stays who it is.
        reach: directories in which its sandbox lets host ends be made while it runs.
        qmp: addresses of monitors that see it alone, as ``--qmp`` has them.
        places: where settings stand, by their options' names, for errors; others are options.
    """

    topology: Topology
    sockets: tuple[str, ...]
    vfio_user: bool = False
    connect: bool = False
    inband_notifications: bool = False
    busy_poll: int = 0
    agent_socket: str | None = None
    transitional: bool = False
    packed: bool = False
    vectors: int | None = None
    sandbox: str | None = None
    user: str | None = None
    reach: tuple[str, ...] = ()
    qmp: tuple[str, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """Its name: in logs, and for clients of its SPICE server."""
        return self.topology.name

    @property
    def protocol(self) -> str:
        """The option of its sockets."""
        return "vfio-user" if self.vfio_user else "vhost-user"

    def where(self, option: str, value: str | None = None) -> str:
        """Return the place of a setting, for errors."""
        place = self.places.get(option, f"--{option}")
        return place if value is None else f"{place} {value}"


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """Everything that one service serves, and how it runs. None stands for what is not said.

    Attributes:
        vms: the machines; at least one.
        qmp: addresses of monitors, as ``--qmp`` has them.
        metrics: where metrics are served, as ``--metrics`` has it.
        workers: whether each has a process of its own (``vm``), or all share one (``shared``).
        socket_mode, socket_owner, socket_group: of all unix sockets that are made, as the options
            have them.
        pid_file: file for the service's process id while it serves.
        log_level: the least that is logged.
        log_file: the log, instead of standard error.
        json_log: log one JSON object per line.
        places: where the addresses of ``qmp`` and ``metrics`` stand, by option and number, for
            errors; others are options.
    """

    vms: tuple[VmConfig, ...]
    qmp: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    workers: str | None = None
    socket_mode: str | None = None
    socket_owner: str | None = None
    socket_group: str | None = None
    pid_file: str | None = None
    log_level: str | None = None
    log_file: str | None = None
    json_log: bool | None = None
    places: Mapping[tuple[str, int], str] = field(default_factory=dict, compare=False)

    def where(self, option: str, number: int) -> str:
        """Return the place of an address, for errors."""
        text = shorten(getattr(self, option)[number])[1:-1]
        return self.places.get((option, number), f"--{option} {text}")

    @property
    def warnings(self) -> list[str]:
        """About settings without effect, one line each."""
        found = []
        for vm in self.vms:
            lines = [*vm.topology.warnings, *_pci_wishes(vm)]
            found += [f"{vm.name}: {line}" if len(self.vms) > 1 else line for line in lines]
        return found


def check_vm(vm: VmConfig) -> None:
    """Check that a VM's settings fit its protocol, and that each controller has a socket.

    Raises ConfigError.
    """
    of_vhost = {"connect": vm.connect, "inband-notifications": vm.inband_notifications}
    of_vfio = {"transitional": vm.transitional, "vectors": vm.vectors is not None}
    for option, given in (of_vhost if vm.vfio_user else of_vfio).items():
        if given:
            other = "vhost-user" if vm.vfio_user else "vfio-user"
            raise ConfigError(f"is for {other}", vm.where(option))
    if len(vm.sockets) != len(vm.topology.controllers):
        names = ", ".join(f"{c.name} ({c.summary})" for c in vm.topology.controllers)
        raise ConfigError(
            f"{len(vm.sockets)} given, {len(vm.topology.controllers)} needed: "
            f"one for each of {names}, in this order",
            vm.where(vm.protocol),
        )


def check_vms(vms: Sequence[VmConfig]) -> None:
    """Check each VM, and that no two have one name, one path or the standard input.

    Raises ConfigError.
    """
    named: dict[str, VmConfig] = {}
    makers: dict[str, str] = {}
    for vm in vms:
        check_vm(vm)
        if (other := named.setdefault(vm.name, vm)) is not vm:
            raise ConfigError(f"there is a VM {vm.name} already ({other.where('name')})", "--name")
        for chardev in _chardevs(vm):
            for path in (path_made(chardev), *log_paths(chardev)):
                if path:
                    _claim(makers, path, chardev.where)
        if vm.agent_socket is not None:
            path = os.path.abspath(vm.agent_socket)
            _claim(makers, path, vm.where("agent-socket", vm.agent_socket))
    used = dict(makers)
    for vm in vms:
        for chardev in _chardevs(vm):
            if path := getattr(chardev.options, "path", ""):
                used.setdefault(os.path.abspath(path), chardev.where)
    for vm in vms:
        for socket in vm.sockets:
            where = vm.where(vm.protocol, socket)
            check_unix_path(socket, where)
            _claim(used, os.path.abspath(socket), where, "the path")


def _chardevs(vm: VmConfig) -> Iterable[ChardevConfig]:
    ports = [port for controller in vm.topology.controllers for port in controller.ports]
    return {port.chardev.id: port.chardev for port in ports}.values()  # ports may share one


def _claim(taken: dict[str, str], path: str, where: str, what: str = "") -> None:
    if path in taken:
        raise ConfigError(f"{what or path} is in use already ({taken[path]})", where)
    taken[path] = where


def _pci_wishes(vm: VmConfig) -> list[str]:
    """Return warnings about PCI settings, which only the frontend can apply over vhost-user."""
    names = ", ".join(
        controller.name
        for controller in vm.topology.controllers
        if controller.transitional or controller.vectors is not None
    )
    if vm.vfio_user or not names:
        return []
    return [f"model= and vectors= are the frontend's to know over vhost-user: {names}"]
