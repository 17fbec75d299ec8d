"""``vring libvirt``: domains of libvirt with vring's device."""

from __future__ import annotations

import sys

import click

from vring_serial.cli import PATH
from vring_serial.cli.libvirt.hook import hook_command
from vring_serial.config.domain_convert import DIRECTORY, convert
from vring_serial.config.domain_revert import revert
from vring_serial.config.domain_xml import read_file


@click.group("libvirt")
def libvirt_command() -> None:
    """Give a libvirt domain's channels and consoles to vring."""


@libvirt_command.command("convert")
@click.argument("file", type=PATH, default="-")
@click.option("--revert", "back", is_flag=True, help="Make a converted domain what it was.")
@click.option(
    "--spice",
    is_flag=True,
    help="Also move the SPICE server: clients get clipboard, resolution and ports from vring, and "
    "the domain has no SPICE display any more.",
)
@click.option(
    "--directory",
    type=PATH,
    default=DIRECTORY,
    show_default=True,
    metavar="DIR",
    help="The domain's sockets go to DIR/NAME.",
)
def convert_command(file: str, back: bool, spice: bool, directory: str) -> None:
    """Print FILE, a domain XML, with its channels and consoles moved to vring.

    What moved stands in the domain's metadata, where `vring serve --domain` reads it. The guest
    agent's channel stays with libvirt. Standard error tells what was done.

    \b
      virsh dumpxml --inactive vm | vring libvirt convert > new.xml && virsh define new.xml
      virsh dumpxml --inactive vm | vring libvirt convert --revert > old.xml && virsh define old.xml
    """
    name = "standard input" if file == "-" else file
    data = read_file(file)
    if back:
        if spice:
            raise click.UsageError("--spice is for converting, not for --revert.")
        result = revert(data, file=name)
    else:
        result = convert(data, file=name, directory=directory, spice=spice)
    for note in result.notes:
        click.echo(note, err=True)
    sys.stdout.buffer.write(result.data)
    sys.stdout.buffer.flush()


libvirt_command.add_command(hook_command)
