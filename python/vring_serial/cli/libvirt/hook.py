"""``vring libvirt hook``: a converted domain's service starts and ends with it."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from collections.abc import Sequence
from pathlib import Path

import click

from vring_serial.chardev.socket import SocketOptions
from vring_serial.cli import PATH
from vring_serial.cli.libvirt.background_service import start_service, stop_service
from vring_serial.config import domain_xml
from vring_serial.config.domain_metadata import Converted, find_converted
from vring_serial.config.topology import check_domain_name
from vring_serial.config.xml_node import Node
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.unix_socket import remove_stale

#: Where logs are, each domain's in a file with its name.
LOG_DIRECTORY = "/var/log/vring"
_WHERE = "the domain"
#: User and group of a domain that has its own; the plus sign stands before numbers.
_LABEL = re.compile(r"\+?([A-Za-z0-9_.-]+):\+?([A-Za-z0-9_.-]+)")
#: Where libvirt is told the user of all domains, how, and who it is by default.
_QEMU_CONF = "/etc/libvirt/qemu.conf"
_CONFIGURED = re.compile(r"""^\s*user\s*=\s*["']\+?([A-Za-z0-9_.-]+)["']""", re.MULTILINE)
_USUAL = ("libvirt-qemu", "qemu")
_SAVED = "its state cannot be restored: the device is new, and the guest would hang (docs/qemu.md)"


@click.command("hook")
@click.option(
    "--log-directory",
    type=PATH,
    default=LOG_DIRECTORY,
    show_default=True,
    metavar="DIR",
    help="The service's log is DIR/NAME.log.",
)
@click.option(
    "--serve",
    "options",
    metavar="OPTION",
    multiple=True,
    help="One more option for `vring serve`, as in --serve=--log-level=debug.",
)
@click.argument("name")
@click.argument("operation")
@click.argument("suboperation")
@click.argument("extra", default="-")
def hook_command(
    log_directory: str,
    options: tuple[str, ...],
    name: str,
    operation: str,
    suboperation: str,
    extra: str,
) -> None:
    """Do what libvirt's hook for QEMU is called for; standard input is the domain's XML.

    A converted domain's service starts before QEMU (prepare begin), with sockets that QEMU's user
    may connect to, and ends after it (release end). Other domains and operations are left alone.
    See examples/libvirt/qemu.

    \b
      vring libvirt hook -- "$@"
    """
    for option in ("--no-keeper", "--descriptor-store"):
        if option in options:
            raise click.UsageError(f"{option}: the service that the hook starts has a keeper.")
    data = domain_xml.read_file("-")
    done = (operation, suboperation)
    if done not in _OPERATIONS:
        return
    root = Node.parse(data, _WHERE)
    converted = find_converted(root)
    if converted is None:
        return
    check_domain_name(name, "NAME")
    if done == ("prepare", "begin"):
        _stop(converted, data, name)  # one that outlived its domain
        _start(root, converted, data, os.path.join(log_directory, f"{name}.log"), options)
    elif done == ("release", "end"):
        _stop(converted, data, name)
    else:
        raise ResourceError(f"{name}: {_SAVED}")


_OPERATIONS = {("prepare", "begin"), ("release", "end"), ("restore", "begin"), ("migrate", "begin")}


def _start(root: Node, converted: Converted, data: bytes, log: str, options: Sequence[str]) -> None:
    for path in (converted.sockets[0], log):
        try:
            os.makedirs(os.path.dirname(path) or ".", mode=0o755, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{os.path.dirname(path)}: {error.strerror}") from None
    arguments = ["--domain", "-", "--keeper", "--pid-file", _pid_path(converted)]
    if (user := _user(root)) is not None:
        arguments += ["--socket-owner", user, "--socket-mode", "0660"]
        if _is_known(user):
            arguments += ["--user", user]
    start_service([*arguments, *options], data, log)


def _stop(converted: Converted, data: bytes, name: str) -> None:
    """End the service, and remove what it could not remove itself as another user."""
    stop_service(_pid_path(converted))
    for path in _sockets(converted, data, name):
        remove_stale(path)
    with contextlib.suppress(OSError):  # somebody else's files are in it, or there is none
        os.rmdir(os.path.dirname(converted.sockets[0]))


def _sockets(converted: Converted, data: bytes, name: str) -> list[str]:
    """Return where the service of a domain may have left sockets."""
    found = list(converted.sockets)
    directory = os.path.dirname(found[0])
    if os.path.basename(directory) == name:  # the domain's own: those of more options are in it too
        with contextlib.suppress(OSError):
            found += [os.path.join(directory, entry) for entry in os.listdir(directory)]
    with contextlib.suppress(ConfigError):  # then nothing was served
        for controller in domain_xml.parse(data).controllers:
            for options in (port.chardev.options for port in controller.ports):
                if isinstance(options, SocketOptions) and options.server and not options.abstract:
                    found.append(options.path)
    return [path for path in found if path]


def _pid_path(converted: Converted) -> str:
    return f"{converted.sockets[0].removesuffix('.sock')}.pid"


def _user(root: Node) -> str | None:
    """Return the user that QEMU runs as: the domain's, libvirt's, the distribution's, or None."""
    for node in root.children("seclabel"):
        label = node.child("label")
        if node.get("model") == "dac" and label is not None:
            match = _LABEL.fullmatch(label.text)
            if match is None:
                label.fail("it is no user and group")
            return match[1]
    with contextlib.suppress(OSError):
        configured = _CONFIGURED.search(Path(_QEMU_CONF).read_text(errors="replace"))
        if configured is not None:
            return configured[1]
    return next(filter(_is_known, _USUAL), None)


def _is_known(user: str) -> bool:
    try:
        pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except (KeyError, OverflowError):
        return False
    return True
