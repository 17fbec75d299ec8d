"""The keeper of ``vring serve``, and its workers, which may be killed without anybody noticing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NoReturn

from vring import __version__
from vring_serial import activation
from vring_serial.chardev import stdio
from vring_serial.cli import logs, monitor, status_of
from vring_serial.cli.logs import LogSettings, emit
from vring_serial.cli.monitor import MonitorSettings
from vring_serial.cli.origin import Origin
from vring_serial.cli.pidfile import pid_file
from vring_serial.cli.sandboxes import sandbox_of
from vring_serial.cli.server import Kept, Settings, serve
from vring_serial.cli.signals import run
from vring_serial.config.toml_file import vm_from_text
from vring_serial.config.topology import ChardevConfig, Topology
from vring_serial.config.vms import VmConfig
from vring_serial.errors import ResourceError, VringSerialError
from vring_serial.service.candidate import Candidate
from vring_serial.service.descriptor_store import Notifier
from vring_serial.service.formats import FORMATS, check_journal
from vring_serial.service.keeper import SIGNALS, Keeper
from vring_serial.service.link import Links
from vring_serial.service.monitored import Monitored
from vring_serial.service.roster import REASON_MAX, Changed, Roster
from vring_serial.service.sandbox import Sandbox
from vring_serial.service.shelf import open_shelf
from vring_serial.service.succession import KeeperState
from vring_serial.service.systemd import ServiceManager
from vring_serial.service.upgrade import Upgrading
from vring_serial.service.watchdog import ANSWERS
from vring_serial.service.worker import Inheritance, WorkerSpec

#: What a death of a worker does to ports, and the kinds of chardevs where it does so.
_NOTICED = (
    (("ringbuf", "udp"), "bytes on their way may be lost"),
    (("console",), "whoever watches is cut off, and connects again"),
    (("spicevmc", "spiceport"), "its connection ends, and a new one begins"),
)


def serve_kept(
    shares: Sequence[Sequence[VmConfig]],
    settings: Sequence[Settings],
    pid_path: str | None,
    log: LogSettings,
    warnings: Sequence[str],
    monitored: Monitored,
    origin: Origin,
) -> int:
    """Serve with a keeper until the first SIGINT or SIGTERM; return the exit status.

    Args:
        shares: the VMs of each worker.
        settings: of each worker's process.
        pid_path: file for the keeper's process id, or None.
        log: where to log.
        warnings: about the configuration; the first worker logs them.
        monitored: where the monitor's process listens.
        origin: of the configuration and of this process.

    Raises ResourceError: the log's reader has stopped already, or the pid file cannot be owned.
    """
    if not logs.end():
        raise ResourceError("the log is not read, and a keeper cannot begin with a thread")
    configured = [vm for vms in shares for vm in vms]
    is_only = len(configured) == 1
    arrival = origin.arrival
    manager = ServiceManager.from_environment(os.environ, may_be_gone=arrival is not None)
    before = None if arrival is None else arrival.state
    changed = Changed() if before is None else Changed(before.added, before.removed)
    names = [vm.name for vm in configured if vm.name not in changed.removed]
    names += changed.added
    with contextlib.ExitStack() as stack:
        links = stack.enter_context(
            Links(names if monitored else [], None if before is None else before.links)
        )
        specs = []
        for vms, of_process in zip(shares, settings, strict=True):
            label = "" if is_only else vms[0].name
            said, warnings = warnings, ()
            if len(vms) == 1 and vms[0].name in changed.removed:
                continue
            worker = partial(_work, vms, of_process, log, said, label, links, manager.watchdog)
            specs.append(WorkerSpec(vms[0].name if len(vms) == 1 else "all VMs", worker))
        if monitored:
            layers = frozenset[str]().union(*(each.sandbox.layers for each in settings))
            served = MonitorSettings(
                configured[0].name, tuple(configured), changed, monitored, log, Sandbox(layers)
            )
            work = partial(monitor.work, served, links)
            specs.append(WorkerSpec(monitor.NAME, work, serves=False))
        add = partial(_added, log, links, manager.watchdog)
        specs += [add(name, text) for name, text in changed.added.items()]
        if before is not None:
            order = [worker.name for worker in before.workers]
            specs.sort(key=lambda spec: order.index(spec.name) if spec.name in order else -1)
        chardevs = [chardev for vm in configured for chardev in _chardevs(vm)]
        if any(chardev.kind == "stdio" for chardev in chardevs):
            put_back = stdio.remember(None if before is None else before.streams)
            if arrival is None or not arrival.is_candidate:
                stack.callback(put_back)
        if arrival is not None and arrival.is_candidate:
            manager.close()
            return Candidate(
                arrival, specs, check_journal, version=__version__, formats=FORMATS
            ).run()
        # Until the keeper has its handlers, signals wait, or one would leave the pid file there.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        stack.callback(signal.pthread_sigmask, signal.SIG_UNBLOCK, SIGNALS)
        lock = stack.enter_context(pid_file(pid_path, -1 if before is None else before.pid_file))
        say = partial(logs.write_now, as_json=log.as_json, path=log.path)
        upgrading = Upgrading(__version__, FORMATS, partial(_state, origin, lock, links, changed))
        stack.callback(manager.close)
        return Keeper(
            specs,
            say,
            upgrading=upgrading,
            manager=manager,
            before=before,
            roster=Roster(changed, add, links) if monitored else None,
        ).run()


def _state(origin: Origin, pid_file: int, links: Links, changed: Changed) -> KeeperState:
    """Return what the code that follows the keeper's must know, but for its workers."""
    return KeeperState(
        __version__,
        inputs=origin.inputs.known,
        added=changed.added,
        removed=changed.removed,
        pid_file=pid_file,
        streams=stdio.remembered(),
        links=links.descriptors,
        sockets=activation.descriptors(),
    )


def _added(
    log: LogSettings, links: Links, watchdog: float | None, name: str, text: str
) -> WorkerSpec:
    """Return the worker of a VM that is added while the service runs."""

    def work(inheritance: Inheritance) -> int:
        found: list[int] = []

        def serve_it() -> None:
            with _telling(inheritance):
                vm = vm_from_text(text)
                settings = Settings(None, log.path, sandbox_of((vm,)), monitors=True)
            found.append(_work((vm,), settings, log, (), name, links, watchdog, inheritance))

        return status_of(serve_it) or found[0]

    return WorkerSpec(name, work)


def _work(
    vms: Sequence[VmConfig],
    settings: Settings,
    log: LogSettings,
    warnings: Sequence[str],
    label: str,
    links: Links,
    watchdog: float | None,
    inheritance: Inheritance,
) -> int:
    """Serve in the worker's process; the log's lines are about the VM ``label``, if it is one."""

    def keeper_ended() -> None:
        asyncio.get_running_loop().remove_reader(inheritance.keeper)
        text = "the keeper has ended; this process serves on, and none will go on after it"
        emit(logging.ERROR, "keeper_ended", text)

    def work() -> None:
        logs.configure(log.level, as_json=log.as_json, path=log.path, vm=label)
        shelf = open_shelf(inheritance.journal, inheritance.notifier, inheritance.descriptors)

        def serving() -> None:
            asyncio.get_running_loop().add_reader(inheritance.keeper, keeper_ended)
            if forgotten := shelf.drop_untaken():
                text = f"the worker before left what nobody knows: {', '.join(forgotten)}"
                emit(logging.WARNING, "forgotten", text)
            if not inheritance.restarts:
                for text in (line for vm in vms for line in _noticed(vm.topology)):
                    emit(logging.INFO, "restart_noticed", text)
            shelf.serving()
            if watchdog is not None:
                say_well(inheritance.notifier, watchdog / ANSWERS)

        def handed_over() -> NoReturn:
            shelf.stopped()
            os._exit(0)

        with shelf:
            ends = links.for_worker([vm.name for vm in vms])
            kept = Kept(
                shelf,
                serving,
                handed_over,
                ends,
                inheritance.restarts,
                inheritance.died,
                shelf.ask_restart,
            )
            for warning in () if inheritance.restarts else warnings:
                emit(logging.WARNING, "configuration", warning)
            with _telling(inheritance):
                run(serve(vms, settings, kept))

    return status_of(work)


@contextlib.contextmanager
def _telling(inheritance: Inheritance) -> Iterator[None]:
    """Tell the keeper why the first worker of a VM cannot begin."""
    try:
        yield
    except VringSerialError as error:
        if not inheritance.restarts:
            with contextlib.suppress(ResourceError):
                why = " ".join(str(error).split())[:REASON_MAX]
                inheritance.notifier.notify(f"FAILED={why}")
        raise


def say_well(notifier: Notifier, seconds: float) -> None:
    """Say every so many seconds that the event loop runs."""
    with contextlib.suppress(ResourceError):
        notifier.notify("WATCHDOG=1")
    asyncio.get_running_loop().call_later(seconds, say_well, notifier, seconds)


def _chardevs(vm: VmConfig) -> Iterator[ChardevConfig]:
    for controller in vm.topology.controllers:
        yield from (port.chardev for port in controller.ports)


def _noticed(topology: Topology) -> list[str]:
    """Say, by name, what is noticed when a worker dies."""
    ports = [port for controller in topology.controllers for port in controller.ports]
    found = []
    for kinds, what in _NOTICED:
        ends = [port.chardev for port in ports if port.chardev.kind in kinds]
        names = dict.fromkeys(f"{end.id} ({end.kind})" for end in ends)  # ports may share one
        if names:
            found.append(f"when a worker dies, {what}: {', '.join(names)}")
    return found
