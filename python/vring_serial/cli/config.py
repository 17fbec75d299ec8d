"""``vring config``: check and write down what ``vring serve`` would serve."""

from __future__ import annotations

from typing import Any

import click

from vring_serial.cli import PATH
from vring_serial.cli.serve import check
from vring_serial.cli.vm_options import service_of, service_options
from vring_serial.config.toml_text import as_toml


@click.group("config")
def config_command() -> None:
    """Check files of ``vring serve --config``, or write one."""


@config_command.command("check")
@click.argument("file", type=PATH)
@click.pass_context
def check_command(context: click.Context, file: str) -> None:
    """Check FILE, and name each VM with its sockets. Nothing is opened but domain XMLs."""
    service = service_of(_nothing_but(file))
    check(service, keeper=True)
    for vm in service.vms:
        ports = sum(len(controller.ports) for controller in vm.topology.controllers)
        click.echo(f"{vm.name}: {ports} ports, {vm.protocol} {', '.join(vm.sockets)}")
    for warning in service.warnings:
        click.echo(f"warning: {warning}", err=True)


@config_command.command("show")
@service_options
def show_command(**given: Any) -> None:
    """Print as TOML what `vring serve` would serve with these options: one of --config's files.

    Passwords are printed, too.
    """
    click.echo(as_toml(service_of(given)), nl=False)


def _nothing_but(file: str) -> dict[str, Any]:
    """Return the options of a command that was given ``--config`` alone."""
    return show_command.make_context("show", ["--config", file]).params
