"""``vring serve``: devices from a domain XML or options, on vhost-user sockets, until stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from vring import Pump
from vring_serial.cli import logs
from vring_serial.cli.agent_end import AgentEnds
from vring_serial.cli.logs import emit
from vring_serial.cli.signals import stop_on_signals
from vring_serial.config.build import make_controller
from vring_serial.config.draft import check_unix_path
from vring_serial.config.load import load_topology
from vring_serial.config.qemu_options import QemuOptions
from vring_serial.config.topology import ControllerConfig, Topology
from vring_serial.device.controller import Controller
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.transport.vhost_user import VhostUserBackend


@dataclass(frozen=True, slots=True)
class Settings:
    """How to serve, as opposed to what.

    Attributes:
        sockets: one vhost-user socket per controller, in the controllers' order.
        connect: connect to frontends that listen, instead of listening.
        inband_notifications: offer kicks and calls as messages.
        pid_file: where to write the process id while serving, or None.
    """

    sockets: tuple[str, ...]
    connect: bool = False
    inband_notifications: bool = False
    pid_file: str | None = None


@click.command("serve")
@click.option(
    "--vhost-user",
    "sockets",
    metavar="SOCKET",
    multiple=True,
    required=True,
    help="Unix socket to serve a controller on; once per controller, in their order.",
)
@click.option(
    "--connect", is_flag=True, help="Connect to frontends that listen, instead of listening."
)
@click.option("--domain", metavar="FILE", help="libvirt domain XML; - reads standard input.")
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
    "--channel-directory",
    metavar="DIR",
    help="Where sockets of unix channels go that have no path (beside the first --vhost-user).",
)
@click.option(
    "--inband-notifications",
    is_flag=True,
    help="Offer kicks and calls as messages: slow, for simulated time.",
)
@click.option("--pid-file", metavar="FILE", help="Write the process id here while serving.")
@click.option(
    "--log-level",
    type=click.Choice(logs.LEVELS),
    default="info",
    show_default=True,
    help="The least that is logged, to standard error.",
)
@click.option("--json-log", is_flag=True, help="Log one JSON object per line.")
def serve_command(
    sockets: tuple[str, ...],
    connect: bool,
    domain: str | None,
    chardevs: tuple[str, ...],
    ports: tuple[str, ...],
    consoles: tuple[str, ...],
    max_ports: int | None,
    channel_directory: str | None,
    inband_notifications: bool,
    pid_file: str | None,
    log_level: str,
    json_log: bool,
) -> None:
    """Serve virtio-serial devices over vhost-user until SIGINT or SIGTERM.

    The ports come from a libvirt domain XML, from QEMU-style options, or from both.

    \b
      vring serve --vhost-user /run/vring.sock --domain examples/spice-agent.xml
      vring serve --vhost-user /run/vring.sock \\
          --chardev socket,id=agent,path=/run/agent.sock,server=on,wait=off \\
          --port chardev=agent,nr=1,name=com.redhat.spice.0
    """
    if domain is None and not (ports or consoles or chardevs):
        raise click.UsageError("Nothing to serve: give --domain, or --chardev and --port.")
    logs.configure(log_level, as_json=json_log)
    if channel_directory is None:
        channel_directory = os.path.dirname(sockets[0])
    options = QemuOptions(chardevs, ports, consoles, max_ports)
    topology = load_topology(domain, options, channel_directory=channel_directory)
    _check_sockets(topology, sockets)
    for warning in topology.warnings:
        emit(logging.WARNING, "configuration", warning)
    settings = Settings(sockets, connect, inband_notifications, pid_file)
    asyncio.run(serve(topology, settings))


def _check_sockets(topology: Topology, sockets: Sequence[str]) -> None:
    """One socket per controller, none of them twice. Raises ConfigError."""
    needed = len(topology.controllers)
    if len(sockets) != needed:
        names = ", ".join(f"{c.name} ({place(c)})" for c in topology.controllers)
        raise ConfigError(
            f"{len(sockets)} given, {needed} needed: one for each of {names}, in this order",
            "--vhost-user",
        )
    taken: dict[str, str] = {}
    for controller in topology.controllers:
        for port in controller.ports:
            if path := getattr(port.chardev.options, "path", ""):
                taken[os.path.abspath(path)] = port.chardev.where
    for socket in sockets:
        where = f"--vhost-user {socket}"
        check_unix_path(socket, where)
        if other := taken.get(os.path.abspath(socket)):
            raise ConfigError(f"the path is in use already ({other})", where)
        taken[os.path.abspath(socket)] = where


def place(controller: ControllerConfig) -> str:
    """Where the guest sees a controller, and how many ports it has."""
    ports = f"{len(controller.ports)} of {controller.max_ports} ports"
    return f"{controller.address}, {ports}" if controller.address is not None else ports


async def serve(topology: Topology, settings: Settings) -> None:
    """Serve until the first SIGINT or SIGTERM; the second ends the process at once.

    Raises:
        ConfigError: a host end or a device cannot be as it was asked for.
        ResourceError: a socket, file or terminal cannot be opened.
    """
    stop = stop_on_signals()
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_pid_file(settings.pid_file))
        if await _finished_before(stop, _start(topology, settings, stack)):
            emit(logging.INFO, "serving", "serving; SIGINT or SIGTERM stops", pid=os.getpid())
            await stop.wait()
        emit(logging.INFO, "stopping", "stopping")
    emit(logging.INFO, "stopped", "stopped")


async def _start(topology: Topology, settings: Settings, stack: contextlib.AsyncExitStack) -> None:
    """Start everything, host ends first; ``stack`` stops it in the opposite order."""
    pump = stack.enter_context(_running_pump())
    agents = AgentEnds()
    stack.push_async_callback(agents.close)
    controllers = [
        make_controller(config, pump, {"spicevmc": agents.factory})
        for config in topology.controllers
    ]
    backends = [
        _make_backend(controller, socket, settings)
        for controller, socket in zip(controllers, settings.sockets, strict=True)
    ]
    for config, controller in zip(topology.controllers, controllers, strict=True):
        stack.push_async_callback(controller.stop)
        await controller.start()
        _log_ports(config, controller)
    for config, backend, socket in zip(
        topology.controllers, backends, settings.sockets, strict=True
    ):
        stack.push_async_callback(backend.stop)
        await backend.start()
        emit(
            logging.INFO,
            "controller",
            f"{config.name}: {place(config)}, on {socket}",
            controller=config.name,
            address=str(config.address or ""),
            socket=socket,
        )


def _make_backend(controller: Controller, socket: str, settings: Settings) -> VhostUserBackend:
    try:
        return VhostUserBackend(
            controller,
            socket,
            listen=not settings.connect,
            inband_notifications=settings.inband_notifications,
        )
    except ConfigError as error:
        raise ConfigError(str(error), f"--vhost-user {socket}") from None


def _log_ports(config: ControllerConfig, controller: Controller) -> None:
    for port in config.ports:
        end = controller.ports[port.nr].chardev.description
        kind = "console" if port.console else "port"
        emit(
            logging.INFO,
            "port",
            f"{config.name}: {kind} {port.nr} {port.name or '(no name)'} at {end}",
            controller=config.name,
            nr=port.nr,
            name=port.name,
            console=port.console,
            chardev=port.chardev.id,
            end=end,
        )


@contextlib.contextmanager
def _running_pump() -> Iterator[Pump]:
    """A pump whose events the running loop dispatches."""
    loop = asyncio.get_running_loop()
    pump = Pump()
    loop.add_reader(pump.event_fd, pump.dispatch)
    try:
        yield pump
    finally:
        loop.remove_reader(pump.event_fd)
        pump.close()


async def _finished_before(stop: asyncio.Event, work: Coroutine[None, None, None]) -> bool:
    """Do ``work`` unless ``stop`` is set first, which cancels it. Raises what ``work`` raises."""
    working = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


@contextlib.contextmanager
def _pid_file(path: str | None) -> Iterator[None]:
    """A file with our process id, there while we serve. Raises ResourceError if it exists."""
    if path is None:
        yield
        return
    try:
        with open(path, "x", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
    except FileExistsError:
        raise ResourceError(
            f"--pid-file {path} exists: another vring may be serving; remove it if not"
        ) from None
    except OSError as error:
        raise ResourceError(f"--pid-file {path}: {error.strerror}") from None
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)
