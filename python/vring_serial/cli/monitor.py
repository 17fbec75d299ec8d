"""The monitor's process of ``vring serve``: it looks at the workers, and may die without harm."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import vring
from vring_serial.chardev.socket import SocketOptions
from vring_serial.cli import logs, status_of
from vring_serial.cli.confine import confine
from vring_serial.cli.logs import LogSettings, emit
from vring_serial.cli.signals import run, stop_on_signals
from vring_serial.config.vms import VmConfig
from vring_serial.keeping import Keeping
from vring_serial.service.link import Links
from vring_serial.service.monitored import Monitored, listen
from vring_serial.service.qmp.monitor import Monitor
from vring_serial.service.qmp.monitors import Monitors
from vring_serial.service.qmp.vm import Vm
from vring_serial.service.reach import reach_of
from vring_serial.service.roster import Changed
from vring_serial.service.sandbox import Sandbox
from vring_serial.service.shelf import open_shelf
from vring_serial.service.vms import Vms
from vring_serial.service.worker import Inheritance

NAME = "monitor"


@dataclass(frozen=True, slots=True)
class MonitorSettings:
    """What the monitor serves.

    Attributes:
        name: of the service; QMP's ``query-name`` answers it.
        vms: the VMs of the configuration.
        changed: how those differ that there are now.
        monitored: where it listens.
        log: how it logs.
        sandbox: what the process gives up before it serves.
    """

    name: str
    vms: tuple[VmConfig, ...]
    changed: Changed
    monitored: Monitored
    log: LogSettings
    sandbox: Sandbox


def work(settings: MonitorSettings, links: Links, inheritance: Inheritance) -> int:
    """Be the monitor, in its process; return the exit status."""

    def serve() -> None:
        log = settings.log
        logs.configure(log.level, as_json=log.as_json, path=log.path)
        shelf = open_shelf(inheritance.journal, inheritance.notifier, inheritance.descriptors)
        with shelf:
            ends = links.for_monitor()

            def hand_over() -> NoReturn:
                logs.flush()
                shelf.stopped()
                os._exit(0)

            keeping = shelf.scoped(NAME)
            run(_serve(settings, ends, keeping, inheritance, shelf.serving, hand_over))

    return status_of(serve)


async def _serve(
    settings: MonitorSettings,
    ends: dict[str, socket.socket],
    keeping: Keeping,
    inheritance: Inheritance,
    on_serving: Any,
    hand_over: Callable[[], NoReturn],
) -> None:
    stop = stop_on_signals(logs.reopen, interrupt=False)
    # Without the keeper there is nobody who would start workers again, or this.
    asyncio.get_running_loop().add_reader(inheritance.keeper, stop.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, hand_over)
    package = f"vring {vring.__version__}"
    confined = asyncio.Event()  # clients that come earlier are not served before
    async with contextlib.AsyncExitStack() as stack:
        tell = partial(emit, logging.INFO, "monitor")
        monitors = await stack.enter_async_context(Monitors(package, confined, keeping, tell))
        make = partial(Vm, tell=monitors.tell_of)
        vms = stack.enter_context(Vms(settings.vms, settings.changed, inheritance.notifier, make))
        vms.known += [make(name, end) for name, end in ends.items()]
        vms.on_change = monitors.vm_changed
        only = settings.vms[0].name if len(settings.vms) == 1 else ""
        for number, options in enumerate(settings.monitored.qmp):
            monitor = Monitor(settings.name, package, vms, only)
            await monitors.serve(monitor, options, f"qmp-{number}")
        for place, vm in enumerate(settings.vms):
            if vm.name in settings.changed.removed:
                continue
            for number, options in enumerate(settings.monitored.vms.get(vm.name, ())):
                monitor = Monitor(vm.name, package, vms, only, vm.name)
                role = f"vm-{place}-qmp-{number}"
                await monitors.serve(monitor, options, role, vm.where("qmp"))

        async def serve_added(name: str, sockets: list[socket.socket]) -> None:
            monitor = Monitor(name, package, vms, only, name)
            addresses = ", ".join(vms.configs[name].qmp)
            await monitors.serve_on(monitor, sockets, addresses, f"added-{name}-qmp")

        vms.on_sockets = serve_added
        for name in settings.changed.added:
            if vms.configs[name].qmp:
                await serve_added(name, [])
        if addresses := settings.monitored.metrics:
            await _serve_metrics(addresses, vms.known, confined, keeping, stack)
        listening = settings.monitored.all
        made = [options.path for options in listening if options.path and not options.abstract]
        log = settings.log.path
        reach = reach_of([], removes=made, appends_to=[log] if log else [])
        reach.listens = True  # on those that workers of VMs make that are added
        confine(settings.sandbox, reach)
        confined.set()
        on_serving()
        await stop.wait()
        await monitors.aclose()  # while the VMs are there that clients ask for


async def _serve_metrics(
    addresses: Sequence[SocketOptions],
    vms: Sequence[Vm],
    confined: asyncio.Event,
    keeping: Keeping,
    stack: contextlib.AsyncExitStack,
) -> None:
    # Loaded by those alone who want metrics.
    from vring_serial.service.metrics.families import render
    from vring_serial.service.metrics.server import PATH, MetricsServer, Readings

    for openmetrics in (False, True):
        render([], vring.__version__, openmetrics=openmetrics)  # loads all, before the sandbox
    readings = Readings(vms, vring.__version__)
    stack.push_async_callback(readings.aclose)
    for number, options in enumerate(addresses):
        listener = await listen("--metrics", options, keeping.scoped(f"metrics-{number}"))
        stack.callback(listener.close)
        for sock in listener.sockets:
            url = f"unix:{options.path}"
            if not options.path:
                host, port = sock.getsockname()[:2]
                url = f"http://{f'[{host}]' if ':' in host else host}:{port}{PATH}"
            server = MetricsServer(readings, sock, f"metrics at {url}", confined)
            stack.push_async_callback(server.aclose)
            await server.start()
            emit(logging.INFO, "monitor", f"metrics at {url}")
