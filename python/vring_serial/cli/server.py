"""The server of ``vring serve``: controllers with host ends, over vhost-user or vfio-user."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from vring import Pump
from vring_serial.cli import logs
from vring_serial.cli.agent_end import AgentEnds
from vring_serial.cli.logs import emit
from vring_serial.cli.pidfile import pid_file
from vring_serial.cli.signals import finished_before, stop_on_signals
from vring_serial.cli.spice_end import SpiceEnds
from vring_serial.config.build import make_controller
from vring_serial.config.topology import ControllerConfig, Topology
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.loop_pump import LoopPump
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.keeping import Keeping
from vring_serial.service.answers import Answers, Served
from vring_serial.service.link import Answerer, LinkEnd
from vring_serial.service.reach import reach_of
from vring_serial.service.sandbox import NO_SANDBOX, Sandbox, enter
from vring_serial.transport.server import Server
from vring_serial.transport.vfio_user.server import VfioUserServer
from vring_serial.transport.vhost_user.backend import VhostUserBackend
from vring_serial.unix_fds import allow_descriptors
from vring_serial.unix_socket import check_can_listen


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of the server, apart from the topology.

    Attributes:
        sockets: one path per controller, in the controllers' order.
        connect: connect to frontends that listen, instead of listening.
        inband_notifications: offer kicks and calls as messages.
        pid_file: file for the process id while serving, or None.
        busy_poll: microseconds for which the data plane keeps polling after work.
        agent_socket: path on which clients of the spicevmc port's agent connect, or None.
        vfio_user: use vfio-user on the sockets instead of vhost-user.
        transitional: also support legacy (pre-1.0) drivers (vfio-user).
        packed: offer packed rings.
        vectors: entries of the MSI-X table of controllers that do not specify it (vfio-user);
            None: see PciDevice.
        sandbox: what the process gives up before it serves.
        log_file: the log, if it is a file that is opened again.
    """

    sockets: tuple[str, ...]
    connect: bool = False
    inband_notifications: bool = False
    pid_file: str | None = None
    busy_poll: int = 0
    agent_socket: str | None = None
    vfio_user: bool = False
    transitional: bool = False
    packed: bool = False
    vectors: int | None = None
    sandbox: Sandbox = NO_SANDBOX
    log_file: str | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """What a process has that a keeper started.

    Attributes:
        keeping: store for what a successor process needs, and for what a predecessor left.
        on_serving: called when everything has started.
        link: to the monitor, taken over; None if there is none.
        restarts: how many processes served before this one.
        handed_over: called when SIGUSR2 has told to stop for a successor, and nothing moves any
            more; ends the process.
    """

    keeping: Keeping
    on_serving: Callable[[], None]
    handed_over: Callable[[], NoReturn]
    link: LinkEnd | None = None
    restarts: int = 0


async def serve(topology: Topology, settings: Settings, kept: Kept | None = None) -> None:
    """Serve until the first SIGINT or SIGTERM; the second ends the process at once.

    With a keeper, only SIGTERM counts: the keeper hears SIGINT too.

    Args:
        topology: the controllers with their ports.
        settings: how to serve them.
        kept: what a keeper gave; None without one.

    Raises:
        ConfigError: the configuration of a host end or a device is invalid.
        ResourceError: a socket, file or terminal cannot be opened.
    """
    allow_descriptors()
    keeping = None if kept is None else kept.keeping
    controllers: list[Controller] = []
    pumps: list[Pump] = []
    stop = stop_on_signals(lambda: _reload(controllers), interrupt=keeping is None)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(pid_file(settings.pid_file))
        if await finished_before(stop, _start(topology, settings, controllers, pumps, stack, kept)):
            if kept is not None:
                hand_over = partial(_hand_over, controllers, pumps[0], kept.handed_over)
                asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, hand_over)
                kept.on_serving()
            emit(logging.INFO, "serving", "serving; SIGINT or SIGTERM stops", pid=os.getpid())
            await stop.wait()
        emit(logging.INFO, "stopping", "stopping")
    emit(logging.INFO, "stopped", "stopped")


def _hand_over(
    controllers: list[Controller], pump: Pump, handed_over: Callable[[], NoReturn]
) -> None:
    """Leave everything as it is for the process that follows."""
    emit(logging.INFO, "handing_over", "another process goes on from here")
    for controller in controllers:
        controller.hand_over()
    pump.halt()
    logs.flush()
    handed_over()


def _reload(controllers: list[Controller]) -> None:
    """Reopen the files that a log rotation has renamed."""
    reopens = [port.chardev.reopen for c in controllers for port in c.ports.values()]
    for reopen in (logs.reopen, *reopens):
        try:
            reopen()
        except ResourceError as error:
            emit(logging.WARNING, "reload", f"SIGHUP: {error}")
    emit(logging.INFO, "reload", "SIGHUP: files were opened anew")


async def _start(
    topology: Topology,
    settings: Settings,
    controllers: list[Controller],
    pumps: list[Pump],
    stack: contextlib.AsyncExitStack,
    kept: Kept | None,
) -> None:
    """Start everything, host ends first; ``stack`` stops it in reverse order.

    All controllers are appended to ``controllers``, and their pump to ``pumps``.
    """
    keeping = None if kept is None else kept.keeping
    if keeping is None and (settings.vfio_user or not settings.connect):
        for socket in settings.sockets:  # before the log tells of ports that nobody will reach
            check_can_listen(socket)
    pump = stack.enter_context(LoopPump(settings.busy_poll)).pump
    pumps.append(pump)
    agents = AgentEnds(settings.agent_socket)
    stack.push_async_callback(agents.aclose)
    spice = SpiceEnds(topology, agent_shared=settings.agent_socket is not None)
    stack.push_async_callback(spice.aclose)
    await spice.start()
    controllers += [
        make_controller(
            config,
            pump,
            {"spicevmc": agents.factory},
            spice.makers,
            None if keeping is None else keeping.scoped(f"controller-{number}"),
        )
        for number, config in enumerate(topology.controllers)
    ]
    backends = [
        _make_backend(
            config,
            controller,
            socket,
            settings,
            None if keeping is None else keeping.scoped(f"frontend-{number}"),
        )
        for number, (config, controller, socket) in enumerate(
            zip(topology.controllers, controllers, settings.sockets, strict=True)
        )
    ]
    if kept is not None and kept.link is not None:
        _answer(kept.link, kept.restarts, controllers, backends, settings, stack)
    agents.start()
    if (device := spice.agent_device()) is not None:
        agents.share_with_server(device)
    for controller in controllers:
        stack.push_async_callback(controller.aclose)
        await controller.start()
    for backend in backends:
        stack.push_async_callback(backend.aclose)
        await backend.start()
    # Peers that are there already are not served before this returns to the event loop.
    _enter_sandbox(topology, settings)
    for config, controller, socket in zip(
        topology.controllers, controllers, settings.sockets, strict=True
    ):
        _log_ports(config, controller)
        emit(
            logging.INFO,
            "controller",
            f"{config.name}: {config.summary}, on {socket}",
            controller=config.name,
            address=str(config.address or ""),
            socket=socket,
        )


def _answer(
    link: LinkEnd,
    restarts: int,
    controllers: Sequence[Controller],
    backends: Sequence[Server[Any]],
    settings: Settings,
    stack: contextlib.AsyncExitStack,
) -> None:
    """Answer the monitor from now on, and tell it of events."""
    protocol = "vfio-user" if settings.vfio_user else "vhost-user"
    served = [
        Served(controller, backend, path, protocol)
        for controller, backend, path in zip(controllers, backends, settings.sockets, strict=True)
    ]
    answers = Answers(served, restarts, logs.set_level)
    answerer = stack.enter_context(Answerer(link, answers.handlers(), "the monitor"))
    answers.listen(answerer.tell)


def _enter_sandbox(topology: Topology, settings: Settings) -> None:
    """Give up what serving does not need, and log what that came to."""
    if settings.sandbox == NO_SANDBOX:
        emit(logging.INFO, "sandbox", "sandbox: off")
        return
    made = [] if settings.connect else list(settings.sockets)
    made += [path for path in (settings.agent_socket, settings.pid_file) if path is not None]
    reach = reach_of(
        topology,
        removes=made,
        appends_to=[settings.log_file] if settings.log_file is not None else [],
        unix=settings.connect,
    )
    text = f"sandbox: system call {logs.NAME} is not allowed; the process ends here"
    entered = enter(settings.sandbox, reach, logs.last_words(text))
    missing = f"; not to be had: {', '.join(entered.missing)}" if entered.missing else ""
    emit(
        logging.INFO,
        "sandbox",
        f"sandbox: {', '.join(entered.on)}{missing}",
        on=entered.on,
        missing=entered.missing,
    )
    if entered.unwritable:
        text = f"sandbox: files here cannot be made or removed any more: {entered.unwritable}"
        emit(logging.WARNING, "sandbox_unwritable", text, directories=entered.unwritable)


def _make_backend(
    config: ControllerConfig,
    controller: Controller,
    socket: str,
    settings: Settings,
    keeping: Keeping | None,
) -> VhostUserBackend | VfioUserServer:
    packed = settings.packed if config.packed is None else config.packed
    try:
        if settings.vfio_user:
            transitional = config.transitional
            return VfioUserServer(
                controller,
                socket,
                transitional=settings.transitional if transitional is None else transitional,
                packed=packed,
                vectors=settings.vectors if config.vectors is None else config.vectors,
                keeping=keeping,
            )
        return VhostUserBackend(
            controller,
            socket,
            listen=not settings.connect,
            inband_notifications=settings.inband_notifications,
            packed=packed,
            keeping=keeping,
        )
    except ConfigError as error:
        option = "--vfio-user" if settings.vfio_user else "--vhost-user"
        raise ConfigError(str(error), f"{option} {socket}") from None


def _log_ports(config: ControllerConfig, controller: Controller) -> None:
    for port in config.ports:
        end = controller.ports[port.nr].chardev.description
        kind = "console" if port.console else "port"
        emit(
            logging.INFO,
            "port",
            f"{config.name}: {kind} {port.nr}{f' ({port.name})' if port.name else ''} at {end}",
            controller=config.name,
            nr=port.nr,
            name=port.name,
            console=port.console,
            chardev=port.chardev.id,
            end=end,
        )
