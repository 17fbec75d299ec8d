"""``vring ctl top``: what moves now, port by port."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from vring_serial.cli.ctl.connection import Connection, Session
from vring_serial.cli.ctl.look import amount, label, ports_of
from vring_serial.cli.plain import escaped

_COUNTS = ("bytes", "chains", "kicks", "throttled_ns")


@click.command("top")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks.",
)
@click.option("-n", "--count", type=click.IntRange(min=1), help="End after so many looks.")
@click.pass_obj
def top_command(connection: Connection, interval: float, count: int | None) -> None:
    """Show throughput of every port, live: bytes, chains and kicks a second, and who waits.

    With --json, prints an object for each port and look.
    """

    async def watch(session: Session) -> None:
        console = Console(highlight=False)
        before = _counts(await session.status())
        looked = time.monotonic()
        live = None
        if not connection.as_json:
            live = Live(console=console, screen=console.is_terminal and count is None)
            live.start()
        try:
            looks = 0
            while count is None or looks < count:
                await asyncio.sleep(interval)
                vms = await session.status()
                now = time.monotonic()
                counts = _counts(vms)
                rates = _rates(before, counts, now - looked)
                before, looked, looks = counts, now, looks + 1
                if live is None:
                    for line in _lines(vms, rates):
                        click.echo(json.dumps(line))
                else:
                    live.update(_table(vms, rates, console.height), refresh=True)
        finally:
            if live is not None:
                live.stop()
                if not console.is_terminal:
                    console.line()

    connection.run(watch)


_Key = tuple[str, str, int, str]


def _counts(vms: list[dict[str, Any]]) -> dict[_Key, int]:
    return {
        (vm, controller["id"], port["nr"], f"{direction}.{count}"): port[direction][count]
        for vm, controller, port in ports_of(vms)
        for direction in ("out", "in")
        for count in _COUNTS
    }


def _rates(
    before: Mapping[_Key, int], now: Mapping[_Key, int], seconds: float
) -> dict[_Key, float]:
    """Return counts a second; a count that is less than before has begun anew."""
    rates = {}
    for key, count in now.items():
        last = before.get(key, 0)
        rates[key] = (count - last if count >= last else count) / seconds
    return rates


def _lines(vms: list[dict[str, Any]], rates: Mapping[_Key, float]) -> list[dict[str, Any]]:
    return [
        {"vm": vm, "controller": controller["id"], "nr": port["nr"], "chardev": port["chardev"]}
        | {
            f"{direction}_{count}_per_s": rates[vm, controller["id"], port["nr"], name]
            for direction in ("out", "in")
            for count in _COUNTS
            for name in [f"{direction}.{count}"]
        }
        for vm, controller, port in ports_of(vms)
    ]


def _table(vms: list[dict[str, Any]], rates: Mapping[_Key, float], height: int) -> Table:
    """Return the table of the busiest ports, as many as fit."""
    rows = []
    for vm, controller, port in ports_of(vms):
        rate = {
            (direction, count): rates[vm, controller["id"], port["nr"], f"{direction}.{count}"]
            for direction in ("out", "in")
            for count in _COUNTS
        }
        rows.append((rate["out", "bytes"] + rate["in", "bytes"], vm, port, rate))
    rows.sort(key=lambda row: -row[0])
    several = len(vms) > 1
    table = Table(box=None, pad_edge=False)
    for name in (*(["VM"] if several else []), "port", "open"):
        table.add_column(name, no_wrap=True)  # what is too long is cut: a row is a line
    for name in ("out B/s", "in B/s", "chains/s", "kicks/s", "waits"):
        table.add_column(name, justify="right", no_wrap=True)
    for _, vm, port, rate in rows[: max(height - 4, 1)]:
        waits = max(rate["out", "throttled_ns"], rate["in", "throttled_ns"]) / 1e9
        table.add_row(
            *([escaped(vm)] if several else []),
            label(port),
            _open_sides(port),
            amount(rate["out", "bytes"]),
            amount(rate["in", "bytes"]),
            amount(rate["out", "chains"] + rate["in", "chains"]),
            amount(rate["out", "kicks"] + rate["in", "kicks"]),
            f"{min(waits, 1):.0%}",
        )
    return table


def _open_sides(port: Mapping[str, Any]) -> str:
    if port["host_open"] and port["guest_open"]:
        return "both"
    return "host" if port["host_open"] else "guest" if port["guest_open"] else "-"
