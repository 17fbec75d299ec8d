"""``vring ctl chardev`` and ``vring ctl port``: host ends and ports that come and go."""

from __future__ import annotations

from functools import partial
from typing import Any

import click
from click.shell_completion import CompletionItem

from vring_serial.cli.completion.words import complete_chardev, complete_item
from vring_serial.cli.ctl.connection import Connection, ask, complete_name
from vring_serial.cli.ctl.look import print_json
from vring_serial.config.qemu_options import parse_chardev, split
from vring_serial.config.qmp_backend import KINDS, backend_of
from vring_serial.config.words import parse_bool, parse_int, shorten, suggest
from vring_serial.errors import ConfigError

_KEYS = ("chardev", "controller", "name", "nr", "id", "console")


@click.group("chardev", context_settings={"help_option_names": ["-h", "--help"]})
def chardev_group() -> None:
    """Make, exchange and remove host ends while the service runs.

    Directories in which sockets, files and links are made are named by `vring serve --reach`, if
    it has its sandbox.
    """


@chardev_group.command("add")
@click.argument(
    "option",
    metavar="KIND,id=ID,KEY=VALUE,...",
    shell_complete=partial(complete_chardev, known=KINDS),
)
@click.pass_obj
def add_chardev_command(connection: Connection, option: str) -> None:
    """Make a host end, as `vring serve --chardev` does; `port add` gives it a port.

    Of several VMs, ID says which one has it: VM/ID.
    """
    config = parse_chardev(option, of_any_vm=True)
    backend = backend_of(config)
    _report(connection, lambda s: s.execute("chardev-add", id=config.id, backend=backend))


@chardev_group.command("change")
@click.argument(
    "option",
    metavar="KIND,id=ID,KEY=VALUE,...",
    shell_complete=lambda c, p, i: complete_chardev(c, p, i, known=KINDS, ids=partial(_ids, c)),
)
@click.pass_obj
def change_chardev_command(connection: Connection, option: str) -> None:
    """Exchange the host end ID, whose port goes on with the new one."""
    config = parse_chardev(option, of_any_vm=True)
    backend = backend_of(config)
    _report(connection, lambda s: s.execute("chardev-change", id=config.id, backend=backend))


@chardev_group.command("remove")
@click.argument("id", shell_complete=lambda c, _p, i: _complete_id(c, i))
@click.pass_obj
def remove_chardev_command(connection: Connection, id: str) -> None:
    """Remove a host end that has no port."""
    connection.run(lambda session: session.execute("chardev-remove", id=id))


@click.group("port", context_settings={"help_option_names": ["-h", "--help"]})
def port_group() -> None:
    """Plug and unplug ports while the guest runs."""


@port_group.command("add")
@click.argument(
    "option",
    metavar="chardev=ID,nr=N,name=NAME,id=ID,console=on",
    shell_complete=lambda c, _p, i: _complete_properties(c, i),
)
@click.pass_obj
def add_port_command(connection: Connection, option: str) -> None:
    """Plug a port; only chardev is needed."""
    properties = _properties(option)
    connection.run(lambda session: session.execute("device_add", **properties))


@port_group.command("remove")
@click.argument("id", shell_complete=lambda c, p, i: _complete_port(c, p, i))
@click.pass_obj
def remove_port_command(connection: Connection, id: str) -> None:
    """Unplug a port: its id, or that of the chardev that it began with. The host end stays."""
    connection.run(lambda session: session.execute("device_del", id=id))


def _complete_port(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    return [item for item in complete_name(ctx, param, incomplete) if item.help == "chardev"]


def _ids(ctx: click.Context) -> list[str]:
    """Return the chardevs that the service has, with and without a port."""
    found = ask(ctx, lambda session: session.execute("query-chardev"))
    return [chardev["label"] for chardev in found or ()]


def _complete_id(ctx: click.Context, incomplete: str) -> list[str]:
    return [id for id in _ids(ctx) if id.startswith(incomplete)]


def _complete_properties(ctx: click.Context, incomplete: str) -> list[str]:
    def value(key: str, _typed: str) -> list[str]:
        if key == "chardev":
            return _ids(ctx)
        return ["on", "off"] if key == "console" else []

    return complete_item(incomplete, _KEYS, value)


def _report(connection: Connection, work: Any) -> None:
    """Do ``work``; print what it made that has a name of its own."""
    made = connection.run(work)
    if connection.as_json:
        print_json(made)
    elif "pty" in made:
        click.echo(made["pty"])


def _properties(option: str) -> dict[str, Any]:
    where = f"port add {shorten(option)[1:-1]}"
    try:
        given = dict(split(option))
        for key, value in given.items():
            if key not in _KEYS:
                raise ConfigError(f"there is no {shorten(key)}; {suggest(key, _KEYS)}")
            if value is None and key != "console":
                raise ConfigError(f"{key} needs a value: {key}=…")
        if "chardev" not in given:
            raise ConfigError("needs chardev=ID")
        console = parse_bool(given.pop("console", "off") or "on")
        properties: dict[str, Any] = dict(given)
        if "nr" in properties:
            properties["nr"] = parse_int(properties["nr"])
        if (controller := properties.pop("controller", None)) is not None:
            properties["bus"] = f"{controller}.0"
    except (ConfigError, ValueError) as error:
        raise ConfigError(str(error), where) from None
    return {"driver": "virtconsole" if console else "virtserialport", **properties}
