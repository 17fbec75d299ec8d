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
from vring_serial.cli.libvirt.background_service import is_running, start_service, stop_service
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
_COPY = "a copy of a domain needs sockets of its own (convert --revert, then convert)"
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
    if done not in (("prepare", "begin"), ("release", "end")):
        raise ResourceError(f"{name}: {_SAVED}")
    uuid = root.child("uuid")
    owner = f"{name if uuid is None else uuid.text} {name}"
    other = _other_owner(converted, owner)
    if done == ("prepare", "begin"):
        if other is not None:
            raise ResourceError(
                f"{name}: {converted.sockets[0]} serves the domain {other}: {_COPY}"
            )
        _stop(converted, data, name)  # one that outlived its domain
        _start(root, converted, data, os.path.join(log_directory, f"{name}.log"), options)
        _note_owner(converted, owner)
    elif other is None:
        _stop(converted, data, name)


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
    """End the service, and remove what it could not: as another user, or since it was killed."""
    stop_service(_pid_path(converted))
    for path in _sockets(converted, data, name):
        remove_stale(path)
    for path in (_pid_path(converted), _owner_path(converted)):
        with contextlib.suppress(OSError):
            os.unlink(path)
    with contextlib.suppress(OSError):  # somebody else's files are in it, or there is none
        os.rmdir(os.path.dirname(converted.sockets[0]))


def _other_owner(converted: Converted, owner: str) -> str | None:
    """Return the name of the domain that is served at a domain's sockets, if it is another one."""
    if not is_running(_pid_path(converted)):
        return None
    try:
        noted = Path(_owner_path(converted)).read_text(errors="replace")
    except OSError:
        return None
    key, _, name = noted.rstrip("\n").partition(" ")
    return None if key == owner.partition(" ")[0] else name


def _note_owner(converted: Converted, owner: str) -> None:
    """Write down whose service it is: a copy of the domain names the same sockets."""
    path = _owner_path(converted)
    try:
        Path(path).write_text(f"{owner}\n")
    except OSError as error:
        raise ResourceError(f"{path}: {error.strerror}") from None


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


def _owner_path(converted: Converted) -> str:
    return f"{converted.sockets[0].removesuffix('.sock')}.domain"


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
