"""The server of ``vring serve``: controllers with host ends, over vhost-user or vfio-user."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket as sockets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

from vring import Pump
from vring_serial import activation
from vring_serial.chardev import Chardev
from vring_serial.cli import logs
from vring_serial.cli.agent_end import AgentEnds
from vring_serial.cli.confine import confine
from vring_serial.cli.logs import emit
from vring_serial.cli.pidfile import pid_file
from vring_serial.cli.signals import finished_before, stop_on_signals
from vring_serial.cli.spice_end import SpiceEnds
from vring_serial.config.build import Muxes, make_controller
from vring_serial.config.topology import ControllerConfig, Topology
from vring_serial.config.vms import VmConfig
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.loop_pump import LoopPump
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.keeping import Keeping
from vring_serial.service.answers import Answers, Served
from vring_serial.service.changes import Changes, Setup
from vring_serial.service.link import Answerer, LinkEnd
from vring_serial.service.monitored import listen
from vring_serial.service.qmp.option import parse_qmp
from vring_serial.service.reach import Reach, reach_of
from vring_serial.service.roster import MONITOR_ROLE
from vring_serial.service.sandbox import NO_SANDBOX, Sandbox
from vring_serial.transport.vfio_user.server import VfioUserServer
from vring_serial.transport.vhost_user.backend import VhostUserBackend
from vring_serial.unix_fds import allow_descriptors
from vring_serial.unix_socket import check_can_listen


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a process that serves, apart from what it serves.

    Attributes:
        pid_file: file for the process id while serving, or None.
        log_file: the log, if it is a file that is opened again.
        sandbox: what the process gives up before it serves.
        frontend: the connection of the only frontend, taken over; serving ends when it has gone.
            None: frontends come through the sockets of the VMs.
        monitors: make the sockets of the monitors of single VMs, which the keeper hands to the
            monitor's process.
    """

    pid_file: str | None = None
    log_file: str | None = None
    sandbox: Sandbox = NO_SANDBOX
    frontend: sockets.socket | None = None
    monitors: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """What a process has that a keeper started.

    Attributes:
        keeping: store for what a successor process needs, and for what a predecessor left.
        on_serving: called when everything has started.
        links: to the monitor, by VM, taken over; none if there is no monitor.
        restarts: how many processes served before this one.
        died: the process before died, and did not hand over.
        ask_restart: asks for a process that goes on from this one.
        by_manager: the service manager keeps everything, and SIGTERM is as SIGUSR2.
        handed_over: called when SIGUSR2 has told to stop for a successor, and nothing moves any
            more; ends the process.
    """

    keeping: Keeping
    on_serving: Callable[[], None]
    handed_over: Callable[[], NoReturn]
    links: Mapping[str, LinkEnd] = field(default_factory=dict)
    restarts: int = 0
    died: bool = False
    ask_restart: Callable[[], None] = lambda: None
    by_manager: bool = False


async def serve(vms: Sequence[VmConfig], settings: Settings, kept: Kept | None = None) -> None:
    """Serve until the first SIGINT or SIGTERM; the second ends the process at once.

    With a frontend of the settings, its end is the end of serving too.

    With a keeper, only SIGTERM counts: the keeper hears SIGINT too.

    Args:
        vms: the machines with their controllers and ports.
        settings: of this process.
        kept: what a keeper gave; None without one.

    Raises:
        ConfigError: the configuration of a host end or a device is invalid.
        ResourceError: a socket, file or terminal cannot be opened.
    """
    allow_descriptors()
    served: list[_Machine] = []
    interrupt = kept is None or kept.by_manager
    stop = stop_on_signals(lambda: _reload(served), interrupt=interrupt)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(pid_file(settings.pid_file))
        starting = _start(vms, settings, served, stack, kept, stop.set)
        if await finished_before(stop, starting):
            if kept is not None:
                hand_over = partial(_hand_over, served, kept.handed_over)
                for number in (signal.SIGUSR2, *([signal.SIGTERM] if kept.by_manager else ())):
                    asyncio.get_running_loop().add_signal_handler(number, hand_over)
                kept.on_serving()
                for one in served:
                    one.serving(kept)
            emit(logging.INFO, "serving", "serving; SIGINT or SIGTERM stops", pid=os.getpid())
            await stop.wait()
        emit(logging.INFO, "stopping", "stopping")
    emit(logging.INFO, "stopped", "stopped")


def _hand_over(served: Sequence[_Machine], handed_over: Callable[[], NoReturn]) -> None:
    """Leave everything as it is for the process that follows."""
    emit(logging.INFO, "handing_over", "another process goes on from here")
    for vm in served:
        vm.hand_over()
    logs.flush()
    handed_over()


def _reload(served: list[_Machine]) -> None:
    """Reopen the files that a log rotation has renamed."""
    reopens = [chardev.reopen for vm in served for chardev in vm.chardevs]
    logs_of_ports = [chardev.log for vm in served for chardev in vm.chardevs]
    reopens += [log.reopen for log in logs_of_ports if log is not None]
    for reopen in (logs.reopen, *reopens):
        try:
            reopen()
        except ResourceError as error:
            emit(logging.WARNING, "reload", f"SIGHUP: {error}")
    emit(logging.INFO, "reload", "SIGHUP: files were opened anew")


async def _start(
    vms: Sequence[VmConfig],
    settings: Settings,
    served: list[_Machine],
    stack: contextlib.AsyncExitStack,
    kept: Kept | None,
    stop: Callable[[], None],
) -> None:
    """Start everything, host ends first; ``stack`` stops it in reverse order.

    All machines are appended to ``served``. The end of the only frontend calls ``stop``, and so
    does who asks for it on a host end that is the standard input.
    """
    if settings.frontend is None and (kept is None or not kept.restarts):
        for vm in vms:
            if vm.vfio_user or not vm.connect:
                for socket in vm.sockets:  # before the log tells of ports that nobody will reach
                    check_can_listen(socket)
    for number, vm in enumerate(vms):
        keeping = None if kept is None else kept.keeping
        if keeping is not None and len(vms) > 1:
            keeping = keeping.scoped(str(number))
        setup = Setup(vm.topology, keeping, resumed=kept is not None and kept.restarts > 0)
        one = _Machine(vm, setup, keeping, vm.name if len(vms) > 1 else "")
        stack.push_async_callback(one.aclose)
        served.append(one)
        await one.open_host_ends(kept, settings.frontend, stop)
    for one in served:
        await one.listen()
        if settings.monitors:
            await one.listen_for_monitors()
    # Peers that are there already are not served before this returns to the event loop.
    topologies = [one.setup.topology for one in served]
    confine(settings.sandbox, _reach(vms, topologies, settings))
    for one in served:
        one.log()


class _Machine:
    """A VM that is served.

    Args:
        vm: how to serve it.
        setup: what to serve.
        keeping: see :func:`serve`, of this VM alone.
        label: its name in the log; "" if the process serves no other, or is named otherwise.

    Attributes:
        controllers: its devices.
        setup: what is served, as it is now.
    """

    def __init__(self, vm: VmConfig, setup: Setup, keeping: Keeping | None, label: str) -> None:
        self.controllers: list[Controller] = []
        self.setup = setup
        self._vm = vm
        self._changes: Changes | None = None
        self._answers: Answers | None = None
        self._keeping = keeping
        self._label = label
        self._backends: list[VhostUserBackend | VfioUserServer] = []
        self._pump: Pump | None = None
        self._stack = contextlib.AsyncExitStack()

    @property
    def chardevs(self) -> list[Chardev]:
        """Return the host ends, those without a port included."""
        ends = [port.chardev for c in self.controllers for port in c.ports.values()]
        return ends if self._changes is None else [*ends, *self._changes.spare.values()]

    async def open_host_ends(
        self,
        kept: Kept | None,
        frontend: sockets.socket | None,
        stop: Callable[[], None],
    ) -> None:
        """Make all, answer the monitor, and start the controllers with the ends of their ports."""
        with self._about():
            topology, stack = self.setup.topology, self._stack
            pump = self._pump = stack.enter_context(LoopPump(self._vm.busy_poll)).pump
            agents = AgentEnds(self._vm.agent_socket)
            stack.push_async_callback(agents.aclose)
            spice = SpiceEnds(topology, agent_shared=self._vm.agent_socket is not None)
            stack.push_async_callback(spice.aclose)
            await spice.start()
            muxes = Muxes(stop)
            self.controllers += [
                make_controller(
                    config,
                    pump,
                    {"spicevmc": agents.factory},
                    spice.makers,
                    self._kept(f"controller-{number}"),
                    self.setup.keeping,
                    muxes,
                )
                for number, config in enumerate(topology.controllers)
            ]
            self._backends += [
                _make_backend(
                    self._vm, config, controller, socket, self._kept(f"frontend-{number}"), frontend
                )
                for number, (config, controller, socket) in enumerate(
                    zip(topology.controllers, self.controllers, self._vm.sockets, strict=True)
                )
            ]
            if frontend is not None:
                self._backends[0].on_peer = lambda what: stop() if what == "gone" else None
            self._changes = Changes(self.setup, self.controllers, muxes)
            stack.push_async_callback(self._changes.aclose)
            await self._changes.start()
            if kept is not None and (link := kept.links.get(self._vm.name)) is not None:
                self._answer(link, kept.restarts, self._changes)
            agents.start()
            if (device := spice.agent_device()) is not None:
                agents.share_with_server(device)
            for controller in self.controllers:
                stack.push_async_callback(controller.aclose)
                await controller.start()

    async def listen(self) -> None:
        """Start what frontends connect to."""
        with self._about():
            for backend in self._backends:
                self._stack.push_async_callback(backend.aclose)
                await backend.start()

    async def listen_for_monitors(self) -> None:
        """Make the sockets of its monitors; somebody else accepts on them."""
        with self._about():
            for number, text in enumerate(self._vm.qmp):
                options = parse_qmp(text, self._vm.where("qmp", text))
                keeping = self._kept(f"{MONITOR_ROLE}{number}")
                assert keeping is not None  # there is a keeper
                listener = await listen(self._vm.where("qmp"), options, keeping)
                self._stack.callback(listener.close)

    def serving(self, kept: Kept) -> None:
        """Tell the monitor that everything of the whole process has started."""
        if self._answers is not None:
            self._answers.serving(kept.ask_restart, died=kept.died)

    def hand_over(self) -> None:
        """Leave everything as it is: nothing moves any more."""
        for controller in self.controllers:
            controller.hand_over()
        if self._pump is not None:
            self._pump.halt()

    async def aclose(self) -> None:
        """Stop all of it, in reverse order."""
        with self._about():
            await self._stack.aclose()

    def log(self) -> None:
        """Say which ports there are, and where."""
        with self._about():
            for config, controller, socket in zip(
                self.setup.topology.controllers, self.controllers, self._vm.sockets, strict=True
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

    def _answer(self, link: LinkEnd, restarts: int, changes: Changes) -> None:
        """Answer the monitor from now on, and tell it of events."""
        served = [
            Served(controller, backend, path, self._vm.protocol)
            for controller, backend, path in zip(
                self.controllers, self._backends, self._vm.sockets, strict=True
            )
        ]
        answers = self._answers = Answers(served, restarts, changes, logs.set_level)
        handlers = answers.handlers() | changes.handlers()
        answerer = self._stack.enter_context(Answerer(link, handlers, "the monitor"))
        answers.listen(answerer.tell)
        changes.on_deleted = lambda id: answerer.tell("deleted", {"device": id})

    def _kept(self, name: str) -> Keeping | None:
        return None if self._keeping is None else self._keeping.scoped(name)

    def _about(self) -> contextlib.AbstractContextManager[None]:
        return logs.about(self._label) if self._label else contextlib.nullcontext()


def _reach(vms: Sequence[VmConfig], topologies: Sequence[Topology], settings: Settings) -> Reach:
    made = [
        socket
        for vm in vms
        if not vm.connect and settings.frontend is None
        for socket in vm.sockets
        if not activation.is_provided(socket)  # never removed
    ]
    made += [path for path in (settings.pid_file, *(vm.agent_socket for vm in vms)) if path]
    if settings.monitors:
        monitors = [parse_qmp(text, "") for vm in vms for text in vm.qmp]
        made += [options.path for options in monitors if options.path]
    return reach_of(
        topologies,
        removes=made,
        appends_to=[settings.log_file] if settings.log_file is not None else [],
        unix=any(vm.connect for vm in vms),
        changes_in=[directory for vm in vms for directory in vm.reach],
    )


def _make_backend(
    vm: VmConfig,
    config: ControllerConfig,
    controller: Controller,
    socket: str,
    keeping: Keeping | None,
    frontend: sockets.socket | None,
) -> VhostUserBackend | VfioUserServer:
    packed = vm.packed if config.packed is None else config.packed
    try:
        if vm.vfio_user:
            transitional = config.transitional
            return VfioUserServer(
                controller,
                socket,
                transitional=vm.transitional if transitional is None else transitional,
                packed=packed,
                vectors=vm.vectors if config.vectors is None else config.vectors,
                keeping=keeping,
            )
        return VhostUserBackend(
            controller,
            socket,
            listen=not vm.connect,
            inband_notifications=vm.inband_notifications,
            packed=packed,
            connected=frontend,
            keeping=keeping,
        )
    except ConfigError as error:
        raise ConfigError(str(error), vm.where(vm.protocol, socket)) from None


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
