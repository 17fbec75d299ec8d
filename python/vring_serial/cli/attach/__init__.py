"""``vring attach``: watch a console together with others, and type to it."""

from __future__ import annotations

from typing import Any

import click

from vring_serial.cli import PATH, STATUS_NOT_FOUND, STATUS_REFUSED, StatusError
from vring_serial.cli.attach.keys import Escape, EscapeKey
from vring_serial.cli.attach.session import Session
from vring_serial.cli.attach.terminal import Terminal
from vring_serial.cli.completion.words import complete_path
from vring_serial.cli.ctl.connection import Connection, ask
from vring_serial.cli.ctl.connection import Session as Monitor
from vring_serial.cli.ctl.look import ports_of
from vring_serial.cli.signals import run
from vring_serial.config.words import suggest

_KIND = "console:"


def _complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the path of a socket, or the name of a console if a server says which there are."""
    consoles = () if _is_path(incomplete) else ask(ctx, _consoles) or ()
    found = [name for name in consoles if name.startswith(incomplete)]
    return found or complete_path(incomplete)


@click.command("attach", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("port", metavar="PORT|PATH", shell_complete=_complete)
@click.option(
    "--qmp",
    "address",
    envvar="VRING_QMP",
    metavar="PATH|HOST:PORT",
    type=PATH,
    help="The monitor of `vring serve --qmp` that knows PORT; or the variable VRING_QMP.",
)
@click.option("-r", "--read-only", is_flag=True, help="Only watch; type nothing.")
@click.option(
    "-e",
    "--escape",
    type=EscapeKey(),
    help="The key before `.`, which leaves: a character, ^X for Ctrl-X, or `none`.  "
    "[default: ^] on a terminal]",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the service may take to answer.",
)
def attach_command(
    port: str, address: str | None, read_only: bool, escape: Escape | None, timeout: float
) -> int:
    """Watch a console of `vring serve`, and type to it, together with others.

    PORT is the name of a port, or of its chardev, of the kind `console`; with several VMs VM/NAME.
    PATH, which begins with `/` or `.`, is that chardev's socket; without --qmp, anything with a
    slash is a path. First comes the scrollback, then what the guest writes. The terminal is left as
    it was found, whatever the guest did to it.

    Exit statuses: 0 left by the escape key, 2 usage, 3 no server, or it ended, 4 no such port, 5
    not a console, or refused, 6 no answer in time, 1 anything else.

    \b
      vring attach /run/vring/con.sock
      vring attach --qmp /run/vring-qmp.sock --read-only con
    """
    named = address is not None and not _is_path(port)
    path = port if "/" in port and not named else _find(port, address, timeout)
    with Terminal() as terminal:
        if escape is None:
            escape = Escape(b"\x1d") if terminal.is_interactive else Escape(b"")
        return run(Session(path, terminal, escape, read_only=read_only, timeout=timeout).run())


def _is_path(word: str) -> bool:
    """Return whether a word is a path also where it could be the name of a VM's port."""
    return word.startswith(("/", "./", "../"))


async def _consoles(monitor: Monitor) -> dict[str, str]:
    """Return every name of every port, with QEMU's name of its host end."""
    vms = await monitor.status()
    prefixes = {vm["name"]: vm["prefix"] for vm in vms}
    return {
        prefixes[vm] + name: port["filename"]
        for vm, _, port in ports_of(vms)
        for name in (port["chardev"], port["name"])
        if name
    }


def _find(port: str, address: str | None, timeout: float) -> str:
    """Return the path of a console's socket. Raises StatusError or UsageError."""
    if not address:
        text = f"{port!r} has no slash, so it is the name of a port, and needs --qmp or VRING_QMP."
        raise click.UsageError(text)
    found: dict[str, Any] = Connection(address, timeout, False).run(_consoles)
    if port not in found:
        consoles = [name for name, filename in found.items() if filename.startswith(_KIND)]
        text = f"there is no port {port!r}; {suggest(port, consoles)}"
        if "/" in port:
            text += f"; a path begins with / or ., as in ./{port}"
        raise StatusError(text, STATUS_NOT_FOUND)
    filename = found[port]
    if not filename.startswith(_KIND):
        text = f"port {port!r} has no chardev of the kind console, but {filename}"
        raise StatusError(text, STATUS_REFUSED)
    return str(filename.removeprefix(_KIND))
