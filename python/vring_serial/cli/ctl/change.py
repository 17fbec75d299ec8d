"""What ``vring ctl`` changes."""

from __future__ import annotations

import click

from vring_serial.cli import STATUS_NOT_FOUND, StatusError
from vring_serial.cli.ctl.connection import (
    Connection,
    Session,
    complete_name,
    complete_vm,
)
from vring_serial.config.words import suggest


async def _kind_of(session: Session, name: str) -> str:
    """Return whether a name is a chardev's or a controller's. Raises StatusError."""
    names = await session.names()
    if name not in names:
        text = f"there is no chardev or controller {name!r}; {suggest(name, names)}"
        raise StatusError(text, STATUS_NOT_FOUND)
    return names[name]


@click.command("disconnect")
@click.argument("name", shell_complete=complete_name)
@click.pass_obj
def disconnect_command(connection: Connection, name: str) -> None:
    """Send away the peer of a chardev, or the frontend of a controller."""

    async def disconnect(session: Session) -> None:
        kind = await _kind_of(session, name)
        await session.execute("x-vring-disconnect", **{kind: name})

    connection.run(disconnect)


@click.command("log-level")
@click.argument("level", type=click.Choice(("debug", "info", "warning", "error")))
@click.pass_obj
def log_level_command(connection: Connection, level: str) -> None:
    """Log from this level on, until the workers end."""
    connection.run(lambda session: session.execute("x-vring-log-level", level=level))


@click.command("restart")
@click.argument("vm", required=False, shell_complete=complete_vm)
@click.pass_obj
def restart_command(connection: Connection, vm: str | None) -> None:
    """Replace a VM's worker process by a fresh one that goes on, or every VM's.

    Guests and clients notice a pause of some milliseconds. The new process has the code of the old
    one; `vring upgrade` is for new code.
    """
    chosen = {} if vm is None else {"vm": vm}
    connection.run(lambda session: session.execute("x-vring-restart", **chosen))
