"""What ``vring ctl`` shows: VMs, ports, events."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from vring_serial.cli.ctl.connection import Connection, Session
from vring_serial.cli.plain import escaped

_UNITS = ("", "K", "M", "G", "T", "P")


def amount(count: float) -> str:
    """Return a count of bytes in at most five characters, with a power of 1024."""
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f}{unit}" if not unit or count >= 10 else f"{count:.1f}{unit}"


def ports_of(vms: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield the VM's name, the controller and the port of each port."""
    for vm in vms:
        for controller in vm["controllers"]:
            for port in controller["ports"]:
                yield vm["name"], controller, port


def label(port: Mapping[str, Any]) -> str:
    """Return number and name of a port, safe to print."""
    name = "console" if port["console"] and not port["name"] else port["name"]
    return escaped(f"{port['nr']} {name}".strip())


def print_json(value: object) -> None:
    """Print one JSON value."""
    click.echo(json.dumps(value, indent=2))


@click.command("status")
@click.pass_obj
def status_command(connection: Connection) -> None:
    """Show VMs and controllers: who is connected, and how they are."""
    vms = connection.run(Session.status)
    if connection.as_json:
        print_json(vms)
        return
    table = Table("VM", "controller", "frontend", "driver", "open", "restarts", "at", box=None)
    for vm in vms:
        name = escaped(vm["name"])
        if not vm["answers"]:
            table.add_row(name, "", "", "no answer")
        for controller in vm["controllers"]:
            ports = controller["ports"]
            table.add_row(
                name,
                escaped(controller["id"]),
                "connected" if controller["frontend"] else "none",
                _driver(controller),
                f"{sum(port['guest_open'] for port in ports)}/{len(ports)}",
                str(vm["restarts"]),
                f"{controller['protocol']} {escaped(controller['socket'])}",
            )
    _show(table)


def _show(table: Table) -> None:
    """Print a table whose last column takes what room is left."""
    for column in table.columns:
        column.no_wrap = True
    table.columns[-1].no_wrap = False
    table.columns[-1].overflow = "fold"
    Console(highlight=False).print(table, soft_wrap=False)


def _driver(controller: Mapping[str, Any]) -> str:
    if controller["needs_reset"]:
        return "broken"
    return "ready" if any(p["guest_ready"] for p in controller["ports"]) else "-"


@click.command("ports")
@click.pass_obj
def ports_command(connection: Connection) -> None:
    """Show ports: both sides, the host end, and what moved."""
    vms = connection.run(Session.status)
    found = [
        {"vm": vm, "controller": controller["id"], **port} for vm, controller, port in ports_of(vms)
    ]
    if connection.as_json:
        print_json(found)
        return
    several = len({port["vm"] for port in found}) > 1
    table = Table(*(["VM"] if several else []), "port", "guest", "host", box=None)
    for direction in ("out", "in"):
        table.add_column(direction, justify="right")
    table.add_column("chardev")
    table.add_column("at")
    for port in found:
        guest = "open" if port["guest_open"] else "ready" if port["guest_ready"] else "-"
        table.add_row(
            *([escaped(port["vm"])] if several else []),
            label(port),
            guest,
            "open" if port["host_open"] else "-",
            amount(port["out"]["bytes"]),
            amount(port["in"]["bytes"]),
            escaped(port["chardev"]),
            escaped(port["description"]),
        )
    _show(table)


@click.command("events")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@click.pass_obj
def events_command(connection: Connection, as_json: bool) -> None:
    """Follow what happens, until the service stops or an interrupt."""

    async def follow(session: Session) -> None:
        while True:
            event: dict[str, Any] = dict(await session.client.events.get())
            if as_json or connection.as_json:
                click.echo(json.dumps(event))
            else:
                stamp = event["timestamp"]
                when = datetime.datetime.fromtimestamp(stamp["seconds"])
                data = event.get("data", {})
                text = " ".join(f"{key}={value}" for key, value in data.items())
                millis = stamp["microseconds"] // 1000
                line = f"{when:%Y-%m-%d %H:%M:%S}.{millis:03} {event['event']} {text}"
                click.echo(escaped(line.rstrip()))
            if event["event"] == "SHUTDOWN":
                return

    connection.run(follow)
