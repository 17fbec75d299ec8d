"""``vring guest``: the embedded guest as a process, for any vhost-user console device."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vring_serial.cli import PATH, STATUS_INTERRUPTED, logs
from vring_serial.cli.plain import escaped
from vring_serial.cli.signals import finished_before, run, stop_on_signals
from vring_serial.cli.tables import show
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.guest.bulk import serve_bulk
from vring_serial.guest.guest import EmbeddedGuest, GuestEvent
from vring_serial.guest.port import GuestPort
from vring_serial.guest.services import Service, keep_serving, serve_echo
from vring_serial.proto.console import ConsoleFeature
from vring_serial.proto.control import (
    PortAdded,
    PortClosed,
    PortIsConsole,
    PortNamed,
    PortOpened,
    PortRemoved,
    PortResized,
)
from vring_serial.proto.virtio import feature_names

#: Bytes per read, between a port and the standard streams.
RELAY_SIZE = 1 << 16

_SECONDS = click.FloatRange(min=0, min_open=True)


@click.command("guest", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--vhost-user",
    "path",
    type=PATH,
    required=True,
    metavar="SOCKET",
    help="The socket of the vhost-user backend.",
)
@click.option("--list", "list_ports", is_flag=True, help="Show the ports and leave.")
@click.option(
    "--open",
    "open_port",
    metavar="PORT",
    help="Connect a port, by name or number, with the standard streams.",
)
@click.option("--no-input", is_flag=True, help="With --open: do not read the standard input.")
@click.option("--echo", multiple=True, metavar="PORT", help="Send back what arrives on this port.")
@click.option(
    "--bulk",
    multiple=True,
    metavar="PORT",
    help="Answer requests for bulk data on this port (`send N`, `receive N`).",
)
@click.option("--agent", is_flag=True, help="Run the SPICE guest agent on com.redhat.spice.0.")
@click.option(
    "--downloads",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    help="With --agent: take files from the host into this directory.",
)
@click.option(
    "--wait",
    default=10.0,
    type=_SECONDS,
    metavar="SECONDS",
    help="How long a port may take to appear.",
    show_default=True,
)
@click.option("--memory", default=128, metavar="MIB", help="The guest's RAM.", show_default=True)
@click.option("--queue-size", default=256, help="Descriptors per queue.", show_default=True)
@click.option(
    "--receive-size", default=4096, help="Bytes of one receive buffer.", show_default=True
)
@click.option(
    "--packed/--split",
    default=True,
    help="Take packed rings where the device offers them, or split ones all the same.",
)
@click.option(
    "--timeout", default=10.0, type=_SECONDS, metavar="SECONDS", help="How long an answer may take."
)
@click.option("--log-level", default="info", type=click.Choice(logs.LEVELS), show_default=True)
@click.option("--json-log", is_flag=True, help="Log lines as JSON objects.")
def guest_command(
    path: str,
    list_ports: bool,
    open_port: str | None,
    no_input: bool,
    echo: tuple[str, ...],
    bulk: tuple[str, ...],
    agent: bool,
    downloads: Path | None,
    wait: float,
    memory: int,
    queue_size: int,
    receive_size: int,
    packed: bool,
    timeout: float,
    log_level: str,
    json_log: bool,
) -> None:
    """Run the embedded guest: RAM, a virtio-console driver and services on its ports.

    It drives the device behind the backend's socket as Linux's virtio_console does, logs what the
    device says, and runs until it is interrupted or the backend leaves.
    """
    services: list[tuple[str, Service]] = [(port, serve_echo) for port in echo]
    services += [(port, serve_bulk) for port in bulk]
    if downloads is not None and not agent:
        raise click.UsageError("--downloads goes with --agent")
    if agent:
        services.append(_agent(downloads))
    if list_ports + bool(open_port) + bool(services) > 1:
        raise ConfigError("--list, --open and services on ports exclude one another")
    # Standard output and error are used by the port and the table there.
    quiet = list_ports or open_port is not None
    logs.configure("warning" if quiet else log_level, as_json=json_log)
    guest = EmbeddedGuest(
        path,
        memory=memory << 20,
        queue_size=queue_size,
        receive_size=receive_size,
        packed=packed,
        timeout=timeout,
    )
    if list_ports:
        work = functools.partial(_list, guest)
    elif open_port is not None:
        work = functools.partial(_relay, guest, open_port, wait, read_input=not no_input)
    else:
        work = functools.partial(_serve, guest, services, wait)
    if not run(_run(guest, work)) and (list_ports or not guest.features):
        raise SystemExit(STATUS_INTERRUPTED)  # services are there to be ended so


def _agent(downloads: Path | None) -> tuple[str, Service]:
    from vring_serial.agent.guest import AGENT_PORT, serve_agent

    return AGENT_PORT, functools.partial(serve_agent, downloads=downloads)


async def _run(guest: EmbeddedGuest, work: Callable[[], Coroutine[Any, Any, None]]) -> bool:
    """Run ``work`` on a started guest until it is done, a signal arrives or the backend leaves.

    Return whether it was done.
    """
    guest.on_event = _log_event
    return await finished_before(stop_on_signals(), _drive(guest, work))


async def _drive(guest: EmbeddedGuest, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    await guest.start()
    features = feature_names(guest.features, ConsoleFeature)
    _emit("guest_started", f"drives {guest.path} with {features}", path=guest.path)
    tasks: list[asyncio.Task[Any]] = [
        asyncio.create_task(job) for job in (work(), guest.wait_lost())
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        lost = guest.lost
        await guest.aclose()
    if tasks[0] in done:
        await tasks[0]
    elif lost is not None:
        raise lost


async def _find(guest: EmbeddedGuest, port: str, wait: float | None) -> GuestPort:
    if port.isascii() and port.isdigit():
        return await guest.wait_port(nr=int(port), timeout=wait)
    return await guest.wait_port(name=port, timeout=wait)


# --- --list


async def _list(guest: EmbeddedGuest) -> None:
    await guest.settle()
    table = Table("port", "name", "kind", "host end")
    for port in sorted(guest.ports.values(), key=lambda port: port.nr):
        kind = "console" if port.is_console else "port"
        table.add_row(
            str(port.nr),
            escape(escaped(port.name)),
            kind,
            "open" if port.host_connected else "closed",
        )
    show(Console(emoji=False), table)  # a name with colons stays as it is


# --- services


async def _serve(guest: EmbeddedGuest, services: list[tuple[str, Service]], wait: float) -> None:
    async def serve(name: str, service: Service) -> None:
        await keep_serving(await _find(guest, name, wait), service)
        while True:  # a port that went may come back
            await keep_serving(await _find(guest, name, None), service)

    try:
        async with asyncio.TaskGroup() as group:
            for name, service in services:
                group.create_task(serve(name, service))
            if not services:
                await guest.wait_lost()
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


def _log_event(event: GuestEvent) -> None:
    match event:
        case PortAdded(nr):
            _emit("port_added", f"port {nr} added", nr=nr)
        case PortNamed(nr, name):
            text = name.decode("utf-8", "backslashreplace")
            _emit("port_named", f"port {nr} is called {text}", nr=nr, name=text)
        case PortIsConsole(nr):
            _emit("port_console", f"port {nr} is a console", nr=nr)
        case PortResized(nr, cols, rows):
            size = f"{cols} columns and {rows} rows"
            _emit("port_resized", f"port {nr} has {size}", nr=nr, cols=cols, rows=rows)
        case PortOpened(nr):
            _emit("port_opened", f"port {nr} opened by the host", nr=nr)
        case PortClosed(nr):
            _emit("port_closed", f"port {nr} closed by the host", nr=nr)
        case PortRemoved(nr):
            _emit("port_removed", f"port {nr} removed", nr=nr)


def _emit(event: str, message: str, **fields: object) -> None:
    logs.emit(logging.INFO, event, f"guest: {message}", **fields)


# --- --open


async def _relay(guest: EmbeddedGuest, name: str, wait: float, *, read_input: bool) -> None:
    """Relay until the host end closes or standard input ends and all of it is written."""
    port = await _find(guest, name, wait)
    reader, writer = await port.open()
    tasks = [asyncio.ensure_future(_to_stdout(reader))]
    if read_input:
        tasks.append(asyncio.ensure_future(_from_stdin(writer)))
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        await task
    if not port.host_connected and not port.is_console and port.undelivered:
        raise ResourceError(
            f"{port.label}: the host end closed before it took all that was sent to it"
        )
    writer.close()
    await writer.wait_closed()


async def _to_stdout(reader: asyncio.StreamReader) -> None:
    while data := await reader.read(RELAY_SIZE):
        await asyncio.to_thread(_write_all, data)


def _write_all(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


async def _from_stdin(writer: asyncio.StreamWriter) -> None:
    async with _stdin_chunks() as next_chunk:
        while data := await next_chunk():
            writer.write(data)
            await writer.drain()


@contextlib.asynccontextmanager
async def _stdin_chunks() -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
    """Yield a function that returns the next piece of standard input, a file of any kind.

    A thread reads it, since a read of a terminal cannot be interrupted; a daemon thread, so that it
    does not keep the process alive.
    """
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[bytes | OSError] = asyncio.Queue(maxsize=4)

    def read() -> None:
        data: bytes | OSError = b"more"
        while data and not isinstance(data, OSError):
            try:
                data = os.read(0, RELAY_SIZE)
            except OSError as error:
                data = error
            try:
                asyncio.run_coroutine_threadsafe(chunks.put(data), loop).result()
            except (RuntimeError, asyncio.CancelledError):
                return  # the loop is over

    async def next_chunk() -> bytes:
        data = await chunks.get()
        if isinstance(data, OSError):
            raise ResourceError(f"standard input: {data.strerror}")
        return data

    threading.Thread(target=read, name="stdin", daemon=True).start()
    yield next_chunk
