"""``vring vhost-user``: one device by the conventions of QEMU's vhost-user.rst for back-ends.

Management layers find the program through a JSON description (QEMU's vhost-user.json), ask it what
it can do, and start it with a path or a descriptor.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, NoReturn

import click

from vring_serial import activation
from vring_serial.cli import PATH, interrupts_end_at_once, logs
from vring_serial.cli.access import parse_access
from vring_serial.cli.serve import check
from vring_serial.cli.signals import run
from vring_serial.cli.vm_options import backend_of, backend_options
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.unix_socket import set_access

#: The program that management layers start; pyproject.toml makes it.
PROGRAM = "vring-vhost-user"
#: Set by a shell that wants to complete a line of it, or the function for that; as click names it.
COMPLETE = "_VRING_VHOST_USER_COMPLETE"
#: Our place in VHostUserBackendType: virtio device type 3. Consoles have no features there.
CAPABILITIES = {"type": "console"}
#: What is served if nothing is said.
DEFAULT_PORTS = {"chardevs": ("pty,id=console",), "consoles": ("chardev=console",)}


class BackendCommand(click.Command):
    """A command that only tells its capabilities if it is asked to, whatever else it is given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, unless ``--print-capabilities`` is one of them."""
        options = args[: args.index("--")] if "--" in args else args
        if "--print-capabilities" in options and not ctx.resilient_parsing:
            click.echo(json.dumps(CAPABILITIES))
            ctx.exit()
        return super().parse_args(ctx, args)


@click.command("vhost-user", cls=BackendCommand)
@click.option(
    "--socket-path", type=PATH, metavar="PATH", help="Listen for frontends on this unix socket."
)
@click.option(
    "--fd",
    type=click.IntRange(min=0),
    metavar="FDNUM",
    help="Serve on this inherited unix socket: one that listens, or the connection of a frontend, "
    "whose end ends the command.",
)
@click.option(
    "--print-capabilities",
    is_flag=True,
    help="Print what the back-end can do, as JSON, and do nothing else.",
)
@click.option(
    "--print-description",
    is_flag=True,
    help="Print the JSON file by which management layers find this back-end, and exit.",
)
@backend_options
def vhost_user_command(
    socket_path: str | None,
    fd: int | None,
    print_capabilities: bool,
    print_description: bool,
    **given: Any,
) -> None:
    """Serve one device as management layers start vhost-user back-ends.

    It keeps to the conventions of QEMU's vhost-user.rst and ends at SIGTERM. Ports are given as to
    `vring serve`; without any there is one console, on a pty that the log names.

    \b
      vring vhost-user --socket-path /run/vring.sock
      vring vhost-user --fd 3 --chardev socket,id=c,path=/run/c.sock,server=on,wait=off \\
          --port chardev=c,nr=1,name=org.example.data
      vring vhost-user --print-description > /etc/qemu/vhost-user/50-vring.json
    """
    assert not print_capabilities  # BackendCommand has done it
    if print_description:
        click.echo(json.dumps(_description(), indent=2))
        return
    if socket_path is not None and fd is not None:
        raise click.UsageError("Give either --socket-path or --fd, and not both.")
    if socket_path is None and fd is None:
        raise click.UsageError("Missing option '--socket-path' or '--fd'.")
    if not (given["domain"] or given["chardevs"] or given["ports"] or given["consoles"]):
        given |= DEFAULT_PORTS
    if fd is None:
        service = backend_of("--socket-path", socket_path or "", given)
        frontend = None
    else:
        service = backend_of("--fd", f"fd:{fd}", given)
        frontend = _frontend(fd)
    _, (sandbox,), _ = check(service, keeper=False)
    set_access(parse_access(service.socket_mode, service.socket_owner, service.socket_group))
    logs.configure(
        service.log_level or "info", as_json=bool(service.json_log), path=service.log_file
    )
    for warning in service.warnings:
        logs.emit(logging.WARNING, "configuration", warning)

    with interrupts_end_at_once():
        from vring_serial.cli.server import Settings, serve

    settings = Settings(service.pid_file, service.log_file, sandbox, frontend)
    run(serve(service.vms, settings))


def main() -> NoReturn:
    """Run the program of its own: ``vring vhost-user`` under another name."""
    if COMPLETE in os.environ:
        from vring_serial.cli.completion import shells

        shells.install()
        vhost_user_command.main(prog_name=PROGRAM)
    from vring_serial.__main__ import main as run_vring

    sys.argv.insert(1, "vhost-user")
    run_vring()


def _frontend(fd: int) -> socket.socket | None:
    """Return the connection that ``fd`` is; None if it listens, which is noted then.

    Raises ConfigError.
    """
    where = f"--fd {fd}"
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OverflowError:
        raise ConfigError("there is no such descriptor", where) from None
    except OSError as error:
        raise ConfigError(f"it is no open socket: {error.strerror}", where) from None
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise ConfigError("it is no unix stream socket", where)
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        activation.provide_as(f"fd:{fd}", sock.detach())
        return None
    try:
        sock.getpeername()
    except OSError as error:
        sock.detach()
        raise ConfigError(f"it neither listens nor is connected: {error.strerror}", where) from None
    return sock


def _description() -> dict[str, object]:
    """Return a VhostUserBackend of vhost-user.json.

    Raises ResourceError: there is no installed program that it could name.
    """
    try:
        package = distribution("vring")
    except PackageNotFoundError:
        raise ResourceError("vring is not installed: nothing can be started by its path") from None
    for file in package.files or ():
        if file.name == PROGRAM:
            return {
                "description": "virtio-serial ports and consoles (vring)",
                "type": CAPABILITIES["type"],
                "binary": os.path.realpath(os.fspath(file.locate())),
                "tags": [f"vring {package.version}"],
            }
    raise ResourceError(f"the installation has no program {PROGRAM}: install vring again")
