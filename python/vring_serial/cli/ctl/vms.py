"""``vring ctl vm``: VMs that come and go."""

from __future__ import annotations

import tomllib
from pathlib import Path

import click

from vring_serial.cli import PATH
from vring_serial.cli.ctl.connection import Connection, complete_vm
from vring_serial.config import toml_file
from vring_serial.config.words import suggest
from vring_serial.errors import ConfigError


@click.group("vm", context_settings={"help_option_names": ["-h", "--help"]})
def vm_group() -> None:
    """Add VMs to a running service, and remove them.

    What is added outlives workers and `vring upgrade`, and ends with the service.
    """


@vm_group.command("add")
@click.argument("file", type=PATH, metavar="FILE.toml")
@click.argument("name", required=False)
@click.pass_obj
def add_vm_command(connection: Connection, file: str, name: str | None) -> None:
    """Serve a VM that FILE.toml describes as `vring serve --config` would.

    Of several VMs in the file, NAME says which one. Paths are relative to the directory of the
    service. The answer comes when the VM is served, or could not be.
    """
    names = [vm.name for vm in toml_file.load(file).vms]
    if not names or (name is None and len(names) > 1):
        known = f"give the name of one: {', '.join(names)}" if names else "no VM is in it"
        raise ConfigError(known, file)
    chosen = name or names[0]
    if chosen not in names:
        raise ConfigError(f"there is no VM {chosen}; {suggest(chosen, names)}", file)
    table = tomllib.loads(Path(file).read_text())["vm"][chosen]
    connection.run(lambda s: s.execute("x-vring-vm-add", name=chosen, config=table))


@vm_group.command("remove")
@click.argument("name", shell_complete=complete_vm)
@click.pass_obj
def remove_vm_command(connection: Connection, name: str) -> None:
    """Serve a VM no more: its frontends and clients are disconnected, its sockets removed.

    Removed is what was added, or was in the configuration, but not the last one.
    """
    connection.run(lambda s: s.execute("x-vring-vm-remove", name=name))
