"""``vring serve``: devices from a domain XML or options, on vhost-user sockets, until stopped."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import click

from vring_serial.cli import PATH, interrupts_end_at_once, logs
from vring_serial.cli.access import parse_access
from vring_serial.cli.signals import run
from vring_serial.config.draft import check_unix_path
from vring_serial.config.load import load_topology
from vring_serial.config.qemu_options import QemuOptions
from vring_serial.config.topology import Topology
from vring_serial.errors import ConfigError
from vring_serial.service.qmp.option import parse_qmp
from vring_serial.service.sandbox import Sandbox
from vring_serial.unix_socket import set_access


@click.command("serve")
@click.option(
    "--vhost-user",
    "sockets",
    type=PATH,
    metavar="SOCKET",
    multiple=True,
    help="Unix socket to serve a controller on; once per controller, in their order.",
)
@click.option(
    "--vfio-user",
    "vfio_sockets",
    type=PATH,
    metavar="SOCKET",
    multiple=True,
    help="The same for vfio-user: a whole PCI function, for QEMU's vfio-user-pci.",
)
@click.option("--packed", is_flag=True, help="Offer packed rings.")
@click.option(
    "--transitional",
    is_flag=True,
    help="With --vfio-user: a PCI function for drivers of before virtio 1.0 too.",
)
@click.option(
    "--vectors",
    type=click.IntRange(min=0),
    metavar="N",
    help="With --vfio-user: MSI-X vectors of a controller that does not say how many it has "
    "(one for each queue and one more); 0: INTx alone.",
)
@click.option(
    "--connect", is_flag=True, help="Connect to frontends that listen, instead of listening."
)
@click.option(
    "--domain", type=PATH, metavar="FILE", help="libvirt domain XML; - reads standard input."
)
@click.option(
    "--chardev",
    "chardevs",
    metavar="KIND,id=ID,KEY=VALUE,...",
    multiple=True,
    help="A host end, as QEMU's -chardev.",
)
@click.option(
    "--port",
    "ports",
    metavar="chardev=ID,nr=N,name=NAME",
    multiple=True,
    help="A port; nr and name may be left out.",
)
@click.option(
    "--console",
    "consoles",
    metavar="chardev=ID[,nr=0]",
    multiple=True,
    help="A console port.",
)
@click.option(
    "--max-ports",
    type=int,
    metavar="N",
    help="Ports of a controller that does not say how many it has, port 0 included (31).",
)
@click.option(
    "--spice",
    metavar="port=N,addr=A,password-file=F,...",
    help="A SPICE server for spicevmc and spiceport ends, as QEMU's -spice (libspice-server).",
)
@click.option(
    "--channel-directory",
    type=PATH,
    metavar="DIR",
    help="Where sockets of unix channels go that have no path (beside the first socket).",
)
@click.option(
    "--inband-notifications",
    is_flag=True,
    help="Offer kicks and calls as messages: slow, for simulated time.",
)
@click.option(
    "--busy-poll",
    type=click.IntRange(0, 1_000_000),
    default=0,
    metavar="MICROSECONDS",
    help="Look for more work so long before sleeping: lower latency, at the price of a processor.",
)
@click.option(
    "--agent-socket",
    type=PATH,
    metavar="PATH",
    help="Share the agent behind the spicevmc port with `vring agent` on this unix socket.",
)
@click.option(
    "--keeper",
    is_flag=True,
    help="Hold sockets, files and state in a process of its own, so that the one that serves may "
    "die, and another one goes on (docs/restart.md).",
)
@click.option(
    "--qmp",
    metavar="unix:PATH|tcp:[HOST]:PORT,server=on,wait=off",
    multiple=True,
    help="With --keeper: a monitor that speaks QMP there, as QEMU's -qmp (docs/management.md).",
)
@click.option(
    "--sandbox",
    metavar="on|off|LAYER=on|off,...",
    default="on",
    show_default=True,
    envvar="VRING_SANDBOX",
    help="What the process gives up before it serves: capabilities, landlock, seccomp; "
    "memory=SIZE and descriptors=N limit it.",
)
@click.option(
    "--user",
    metavar="NAME[:GROUP]",
    help="Become this user when everything is open.",
)
@click.option(
    "--socket-mode",
    metavar="OCTAL",
    help="Permissions of all unix sockets that are made (what the umask leaves).",
)
@click.option("--socket-owner", metavar="USER", help="Owner of all unix sockets that are made.")
@click.option("--socket-group", metavar="GROUP", help="Group of all unix sockets that are made.")
@click.option(
    "--pid-file", type=PATH, metavar="FILE", help="Write the process id here while serving."
)
@click.option(
    "--log-level",
    type=click.Choice(logs.LEVELS),
    default="info",
    show_default=True,
    help="The least that is logged, to standard error.",
)
@click.option(
    "--log-file",
    type=PATH,
    metavar="FILE",
    help="Append the log to this file, which SIGHUP opens anew, instead of standard error.",
)
@click.option("--json-log", is_flag=True, help="Log one JSON object per line.")
def serve_command(
    sockets: tuple[str, ...],
    vfio_sockets: tuple[str, ...],
    packed: bool,
    transitional: bool,
    vectors: int | None,
    connect: bool,
    domain: str | None,
    chardevs: tuple[str, ...],
    ports: tuple[str, ...],
    consoles: tuple[str, ...],
    max_ports: int | None,
    spice: str | None,
    channel_directory: str | None,
    inband_notifications: bool,
    busy_poll: int,
    keeper: bool,
    qmp: tuple[str, ...],
    sandbox: str,
    user: str | None,
    socket_mode: str | None,
    socket_owner: str | None,
    socket_group: str | None,
    pid_file: str | None,
    agent_socket: str | None,
    log_level: str,
    log_file: str | None,
    json_log: bool,
) -> None:
    """Serve virtio-serial devices over vhost-user or vfio-user until SIGINT or SIGTERM.

    The ports come from a libvirt domain XML, from QEMU-style options, or from both.

    \b
      vring serve --vhost-user /run/vring.sock --domain examples/spice-agent.xml
      vring serve --vhost-user /run/vring.sock \\
          --chardev socket,id=agent,path=/run/agent.sock,server=on,wait=off \\
          --port chardev=agent,nr=1,name=com.redhat.spice.0
      vring serve --vhost-user /run/vring.sock --chardev spicevmc,id=agent --port chardev=agent \\
          --spice port=5930,addr=127.0.0.1,disable-ticketing=on
      vring serve --vfio-user /run/vring.sock --chardev socket,id=c,path=/run/c.sock,server=on \\
          --port chardev=c,nr=1,name=org.example.data
    """
    of_vhost = {"--connect": connect, "--inband-notifications": inband_notifications}
    of_vfio = {"--transitional": transitional, "--vectors": vectors is not None}
    _check_protocol(sockets, vfio_sockets, of_vhost, of_vfio)
    if domain is None and not (ports or consoles or chardevs):
        raise click.UsageError("Nothing to serve: give --domain, or --chardev and --port.")
    if qmp and not keeper:
        raise click.UsageError(
            "--qmp goes with --keeper: a monitor is a process beside the worker."
        )
    monitors = [parse_qmp(text) for text in qmp]
    confinement = Sandbox.parse(sandbox, user)
    set_access(parse_access(socket_mode, socket_owner, socket_group))
    with interrupts_end_at_once():
        from vring_serial.cli.origin import find_origin
    origin = find_origin()
    logs.configure(log_level, as_json=json_log, path=log_file)
    if channel_directory is None:
        channel_directory = os.path.dirname((sockets or vfio_sockets)[0])
    options = QemuOptions(chardevs, ports, consoles, max_ports, spice)
    topology = load_topology(
        domain, options, channel_directory=channel_directory, read=origin.inputs.read
    )
    option = "--vfio-user" if vfio_sockets else "--vhost-user"
    _check_sockets(topology, option, sockets or vfio_sockets)
    warnings = [*topology.warnings, *(_pci_wishes(topology) if sockets else ())]
    if not keeper:
        for warning in warnings:
            logs.emit(logging.WARNING, "configuration", warning)

    # Imported only now, so that mistakes are reported without loading the device.
    with interrupts_end_at_once():
        from vring_serial.cli.server import Settings, serve

    settings = Settings(
        sockets or vfio_sockets,
        connect,
        inband_notifications,
        pid_file,
        busy_poll,
        agent_socket,
        vfio_user=bool(vfio_sockets),
        transitional=transitional,
        packed=packed,
        vectors=vectors,
        sandbox=confinement,
        log_file=log_file,
    )
    if keeper:
        from vring_serial.cli.kept import serve_kept

        log = logs.LogSettings(log_level, json_log, log_file)
        raise SystemExit(serve_kept(topology, settings, log, warnings, monitors, origin))
    run(serve(topology, settings))


def _pci_wishes(topology: Topology) -> list[str]:
    """Return warnings about PCI settings, which only the frontend can apply over vhost-user."""
    names = ", ".join(
        controller.name
        for controller in topology.controllers
        if controller.transitional or controller.vectors is not None
    )
    if not names:
        return []
    return [f"model= and vectors= are the frontend's to know over vhost-user: {names}"]


def _check_protocol(
    sockets: Sequence[str],
    vfio_sockets: Sequence[str],
    of_vhost: Mapping[str, bool],
    of_vfio: Mapping[str, bool],
) -> None:
    """Check that all controllers use one protocol and only its options. Raises UsageError."""
    if not sockets and not vfio_sockets:
        raise click.UsageError("Missing option '--vhost-user' or '--vfio-user'.")
    if sockets and vfio_sockets:
        raise click.UsageError("Give either --vhost-user or --vfio-user, and not both.")
    for option, given in (of_vfio if sockets else of_vhost).items():
        if given:
            other = "--vfio-user" if sockets else "--vhost-user"
            raise click.UsageError(f"{option} is for {other}.")


def _check_sockets(topology: Topology, option: str, sockets: Sequence[str]) -> None:
    """Check that there is one socket per controller, none twice. Raises ConfigError."""
    needed = len(topology.controllers)
    if len(sockets) != needed:
        names = ", ".join(f"{c.name} ({c.summary})" for c in topology.controllers)
        raise ConfigError(
            f"{len(sockets)} given, {needed} needed: one for each of {names}, in this order",
            option,
        )
    taken: dict[str, str] = {}
    for controller in topology.controllers:
        for port in controller.ports:
            if path := getattr(port.chardev.options, "path", ""):
                taken[os.path.abspath(path)] = port.chardev.where
    for socket in sockets:
        where = f"{option} {socket}"
        check_unix_path(socket, where)
        if other := taken.get(os.path.abspath(socket)):
            raise ConfigError(f"the path is in use already ({other})", where)
        taken[os.path.abspath(socket)] = where
