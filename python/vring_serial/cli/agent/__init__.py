"""``vring agent``: a SPICE client's functions for a guest's agent, in a terminal."""

from __future__ import annotations

import click

from vring_serial.cli import PATH
from vring_serial.cli.agent.channel import Channel
from vring_serial.cli.agent.clipboard import clipboard_group
from vring_serial.cli.agent.files import send_command
from vring_serial.cli.agent.monitor import monitor_command
from vring_serial.cli.agent.screen import caps_command, resize_command
from vring_serial.cli.agent.shell import shell_command


@click.group("agent", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    "address",
    envvar="VRING_AGENT_SOCKET",
    metavar="PATH|HOST:PORT",
    type=PATH,
    help="A socket that carries an agent channel; or the variable VRING_AGENT_SOCKET.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the guest may take to answer.",
)
@click.option("--json", "as_json", is_flag=True, help="As --json of the command.")
@click.pass_context
def agent_command(ctx: click.Context, address: str | None, timeout: float, as_json: bool) -> None:
    """Talk to the SPICE agent of a guest: resolution, clipboard, files.

    The socket is one of `vring serve` (--agent-socket, or a socket chardev behind the port
    com.redhat.spice.0), or one of QEMU's: -chardev socket,path=PATH,server=on,wait=off behind a
    virtserialport of that name.

    Exit statuses: 0 success, 2 usage, 3 no server or the agent went away, 4 the agent or the
    clipboard has no such thing, 5 refused, 6 no answer in time, 1 anything else.

    \b
      vring agent --socket /run/agent.sock resize 1920x1080
      vring agent --socket /run/agent.sock clipboard set "hello, guest"
      vring agent --socket /run/agent.sock send report.pdf photo.jpg
      vring agent --socket /run/agent.sock shell
    """
    # Without a socket, the help of commands must still work.
    ctx.obj = Channel(address or "", timeout, as_json)


for command in (
    caps_command,
    resize_command,
    clipboard_group,
    send_command,
    monitor_command,
    shell_command,
):
    agent_command.add_command(command)
