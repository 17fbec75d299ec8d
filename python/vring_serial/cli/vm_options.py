"""The options of ``vring serve`` that say what is served and how."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from vring_serial.cli import PATH, logs
from vring_serial.cli.completion.words import (
    complete_chardev,
    complete_monitor,
    complete_port,
    complete_sandbox,
    complete_spice,
)
from vring_serial.config import toml_file
from vring_serial.config.domain_xml import read_file
from vring_serial.config.load import load_topology
from vring_serial.config.qemu_options import QemuOptions
from vring_serial.config.topology import check_domain_name
from vring_serial.config.vms import (
    WORKERS,
    ServiceConfig,
    VmConfig,
    check_vms,
)

F = TypeVar("F", bound=Callable[..., Any])

_NO_SOCKET = "Missing option '--vhost-user' or '--vfio-user'."

#: Of one VM: where it is served, and what only a service with a monitor has.
_PLACE_OPTIONS = (
    click.option(
        "--vhost-user",
        "sockets",
        type=PATH,
        metavar="SOCKET",
        multiple=True,
        help="Unix socket to serve a controller on; once per controller, in their order.",
    ),
    click.option(
        "--vfio-user",
        "vfio_sockets",
        type=PATH,
        metavar="SOCKET",
        multiple=True,
        help="The same for vfio-user: a whole PCI function, for QEMU's vfio-user-pci.",
    ),
    click.option(
        "--transitional",
        is_flag=True,
        help="With --vfio-user: a PCI function for drivers of before virtio 1.0 too.",
    ),
    click.option(
        "--vectors",
        type=click.IntRange(min=0),
        metavar="N",
        help="With --vfio-user: MSI-X vectors of a controller that does not say how many it has "
        "(one for each queue and one more); 0: INTx alone.",
    ),
    click.option(
        "--connect", is_flag=True, help="Connect to frontends that listen, instead of listening."
    ),
    click.option(
        "--reach",
        type=PATH,
        metavar="DIR",
        multiple=True,
        help="With --qmp: a directory in which the sandbox lets chardevs be made while it runs.",
    ),
)
#: Of one VM, wherever it is served.
_VM_OPTIONS = (
    click.option("--packed", is_flag=True, help="Offer packed rings."),
    click.option(
        "--domain", type=PATH, metavar="FILE", help="libvirt domain XML; - reads standard input."
    ),
    click.option(
        "--chardev",
        "chardevs",
        metavar="KIND,id=ID,KEY=VALUE,...",
        multiple=True,
        shell_complete=complete_chardev,
        help="A host end, as QEMU's -chardev.",
    ),
    click.option(
        "--port",
        "ports",
        metavar="chardev=ID,nr=N,name=NAME",
        multiple=True,
        shell_complete=complete_port,
        help="A port; nr and name may be left out.",
    ),
    click.option(
        "--console",
        "consoles",
        metavar="chardev=ID[,nr=0]",
        multiple=True,
        shell_complete=complete_port,
        help="A console port.",
    ),
    click.option(
        "--max-ports",
        type=int,
        metavar="N",
        help="Ports of a controller that does not say how many it has, port 0 included (31).",
    ),
    click.option(
        "--spice",
        metavar="port=N,addr=A,password-file=F,...",
        shell_complete=complete_spice,
        help="A SPICE server for spicevmc and spiceport ends, as QEMU's -spice (libspice-server).",
    ),
    click.option(
        "--channel-directory",
        type=PATH,
        metavar="DIR",
        help="Where sockets of unix channels go that have no path (beside the first socket).",
    ),
    click.option(
        "--inband-notifications",
        is_flag=True,
        help="Offer kicks and calls as messages: slow, for simulated time.",
    ),
    click.option(
        "--busy-poll",
        type=click.IntRange(0, 1_000_000),
        metavar="MICROSECONDS",
        help="Look for more work so long before sleeping: lower latency, at the price of a "
        "processor.",
    ),
    click.option(
        "--agent-socket",
        type=PATH,
        metavar="PATH",
        help="Share the agent behind the spicevmc port with `vring agent` on this unix socket.",
    ),
    click.option(
        "--sandbox",
        metavar="on|off|LAYER=on|off,...",
        shell_complete=complete_sandbox,
        help="What the process gives up before it serves: capabilities, landlock, seccomp; "
        "memory=SIZE and descriptors=N limit it (on).",
    ),
    click.option(
        "--user",
        metavar="NAME[:GROUP]",
        help="Become this user when everything is open.",
    ),
    click.option(
        "--name",
        metavar="NAME",
        help="Name of the VM, in logs and for SPICE clients (the domain's, or vring).",
    ),
)
#: Of a service, which may have several VMs.
_SERVICE_OPTIONS = (
    click.option(
        "--config",
        type=PATH,
        metavar="FILE",
        help="VMs and settings from a TOML file; options add another VM (docs/configuration.md).",
    ),
    click.option(
        "--workers",
        type=click.Choice(WORKERS),
        help="A process for each VM, or one that all share: less memory, and less apart (vm).",
    ),
    click.option(
        "--qmp",
        metavar="unix:PATH|tcp:[HOST]:PORT,server=on,wait=off",
        multiple=True,
        shell_complete=complete_monitor,
        help="A monitor that speaks QMP there, as QEMU's -qmp (docs/management.md).",
    ),
    click.option(
        "--metrics",
        metavar="[ADDR:]PORT|unix:PATH",
        multiple=True,
        help="Metrics for Prometheus, at http://ADDR:PORT/metrics (127.0.0.1; docs/management.md).",
    ),
)
#: Of the process.
_PROCESS_OPTIONS = (
    click.option(
        "--socket-mode",
        metavar="OCTAL",
        help="Permissions of all unix sockets that are made (what the umask leaves).",
    ),
    click.option("--socket-owner", metavar="USER", help="Owner of all unix sockets that are made."),
    click.option(
        "--socket-group", metavar="GROUP", help="Group of all unix sockets that are made."
    ),
    click.option(
        "--pid-file", type=PATH, metavar="FILE", help="Write the process id here while serving."
    ),
    click.option(
        "--log-level",
        type=click.Choice(logs.LEVELS),
        help="The least that is logged, to standard error (info).",
    ),
    click.option(
        "--log-file",
        type=PATH,
        metavar="FILE",
        help="Append the log to this file, which SIGHUP opens anew, instead of standard error.",
    ),
    click.option("--json-log", is_flag=True, help="Log one JSON object per line."),
)


def service_options(command: F) -> F:
    """Give a command all options that :func:`service_of` reads."""
    options = (*_PLACE_OPTIONS, *_VM_OPTIONS, *_SERVICE_OPTIONS, *_PROCESS_OPTIONS)
    for option in reversed(options):
        command = option(command)
    return command


def backend_options(command: F) -> F:
    """Give a command those options of :func:`service_options` that do not say where to serve."""
    for option in reversed((*_VM_OPTIONS, *_PROCESS_OPTIONS)):
        command = option(command)
    return command


def backend_of(option: str, socket: str, given: Mapping[str, Any]) -> ServiceConfig:
    """Return the service of one VM on ``socket``, over vhost-user.

    Args:
        option: the one that says where it is served, for errors.
        socket: its path, or the name of what is given instead.
        given: the values of :func:`backend_options`, by parameter.

    Raises: see :func:`service_of`.
    """
    unsaid = dict.fromkeys(("config", "workers", "vectors"))
    off = dict.fromkeys(("connect", "transitional"), False)
    none = dict.fromkeys(("vfio_sockets", "reach", "qmp", "metrics"), ())
    said = {**given, "sockets": (socket,), "places": {"vhost-user": option}}
    return service_of({**unsaid, **off, **none, **said})


def service_of(given: Mapping[str, Any], read: Callable[[str], bytes] = read_file) -> ServiceConfig:
    """Return what options and the file of ``--config`` declare together, checked.

    Options that belong to a VM are those of one more; others take precedence over the file.

    Args:
        given: the values of the options, by parameter.
        read: returns what is in a file; see :class:`vring_serial.config.inputs.Inputs`.

    Raises:
        UsageError: options do not go together.
        ConfigError: something is invalid; the message names the place.
        ResourceError: a file cannot be read.
    """
    service = ServiceConfig(())
    if given["config"] is not None:
        service = toml_file.load(given["config"], read)
    vms = service.vms
    if (vm := _vm_of(given, read)) is not None:
        vms = (*vms, vm)
    if not vms:
        raise click.UsageError(f"{given['config']} declares no VM: [vm.NAME], and no option does.")
    check_vms(vms)
    return ServiceConfig(
        vms,
        workers=given["workers"] or service.workers,
        qmp=(*service.qmp, *given["qmp"]),
        metrics=(*service.metrics, *given["metrics"]),
        socket_mode=given["socket_mode"] or service.socket_mode,
        socket_owner=given["socket_owner"] or service.socket_owner,
        socket_group=given["socket_group"] or service.socket_group,
        pid_file=given["pid_file"] or service.pid_file,
        log_level=given["log_level"] or service.log_level,
        log_file=given["log_file"] or service.log_file,
        json_log=given["json_log"] or service.json_log,
        places=service.places,
    )


def _vm_of(given: Mapping[str, Any], read: Callable[[str], bytes]) -> VmConfig | None:
    """Return the VM of the options; None if there is a file and no option says anything of one."""
    sockets, vfio_sockets = given["sockets"], given["vfio_sockets"]
    if given["config"] is not None and not (sockets or vfio_sockets):
        for parameter in _vm_parameters():
            if given[parameter.name or ""] not in (None, False, ()):
                raise click.UsageError(
                    f"{parameter.opts[0]} is of a VM of its own, which needs --vhost-user or "
                    "--vfio-user; VMs of --config have their settings there."
                )
        return None
    _check_protocol(given)
    if given["domain"] is None and not (sockets or vfio_sockets):
        raise click.UsageError(_NO_SOCKET)
    if given["domain"] is None and not (given["ports"] or given["consoles"] or given["chardevs"]):
        raise click.UsageError("Nothing to serve: give --domain, or --chardev and --port.")
    directory = given["channel_directory"]
    if directory is None and (sockets or vfio_sockets):
        directory = os.path.dirname((sockets or vfio_sockets)[0])
    options = QemuOptions(
        given["chardevs"], given["ports"], given["consoles"], given["max_ports"], given["spice"]
    )
    topology = load_topology(given["domain"], options, channel_directory=directory, read=read)
    if not (sockets or vfio_sockets):
        vfio_sockets = topology.sockets
        if not vfio_sockets:
            raise click.UsageError(f"{_NO_SOCKET} The domain was not converted and names none.")
    if given["name"] is not None:
        check_domain_name(given["name"], "--name")
        topology = dataclasses.replace(topology, name=given["name"])
    return VmConfig(
        topology,
        sockets or vfio_sockets,
        vfio_user=bool(vfio_sockets),
        connect=given["connect"],
        inband_notifications=given["inband_notifications"],
        busy_poll=given["busy_poll"] or 0,
        agent_socket=given["agent_socket"],
        transitional=given["transitional"],
        packed=given["packed"],
        vectors=given["vectors"],
        sandbox=given["sandbox"],
        user=given["user"],
        reach=given["reach"],
        places=given.get("places", {}),
    )


def _vm_parameters() -> list[click.Parameter]:
    def nothing() -> None:
        """Do nothing: options are added to a function."""

    for option in reversed((*_PLACE_OPTIONS, *_VM_OPTIONS)):
        option(nothing)
    return click.command(nothing).params


def _check_protocol(given: Mapping[str, Any]) -> None:
    """Check that all controllers use one protocol and only its options. Raises UsageError."""
    sockets, vfio_sockets = given["sockets"], given["vfio_sockets"]
    if sockets and vfio_sockets:
        raise click.UsageError("Give either --vhost-user or --vfio-user, and not both.")
    for option in ("transitional", "vectors") if sockets else ("connect", "inband-notifications"):
        value = given[option.replace("-", "_")]
        if value is not None and value is not False:
            other = "--vfio-user" if sockets else "--vhost-user"
            raise click.UsageError(f"--{option} is for {other}.")
