"""``vring ctl``: look at a running service and change it, through its monitor."""

from __future__ import annotations

import click

from vring_serial.cli import PATH
from vring_serial.cli.ctl.change import disconnect_command, log_level_command, restart_command
from vring_serial.cli.ctl.connection import Connection
from vring_serial.cli.ctl.look import events_command, ports_command, status_command
from vring_serial.cli.ctl.ports import chardev_group, port_group
from vring_serial.cli.ctl.top import top_command
from vring_serial.cli.ctl.vms import vm_group


@click.group("ctl", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--qmp",
    "address",
    envvar="VRING_QMP",
    metavar="PATH|HOST:PORT",
    type=PATH,
    help="The monitor of `vring serve --qmp`; or the variable VRING_QMP.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the service may take to answer.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.pass_context
def ctl_command(ctx: click.Context, address: str | None, timeout: float, as_json: bool) -> None:
    """Look at a running `vring serve` and change it.

    Exit statuses: 0 success, 2 usage, 3 no server, 4 no such port or chardev, 5 refused, 6 no
    answer in time, 1 anything else.

    \b
      export VRING_QMP=/run/vring-qmp.sock
      vring ctl status
      vring ctl top
      vring ctl disconnect agent
    """
    ctx.obj = Connection(address or "", timeout, as_json)


for command in (
    status_command,
    ports_command,
    top_command,
    events_command,
    disconnect_command,
    port_group,
    chardev_group,
    log_level_command,
    restart_command,
    vm_group,
):
    ctl_command.add_command(command)
