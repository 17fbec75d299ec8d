"""The one way from all that a command line can say to a topology."""

from __future__ import annotations

from vring_serial.config import domain_xml, qemu_options
from vring_serial.config.draft import Draft
from vring_serial.config.qemu_options import QemuOptions
from vring_serial.config.topology import Topology


def load_topology(
    domain: str | None = None,
    options: QemuOptions | None = None,
    *,
    channel_directory: str = "",
) -> Topology:
    """Return the topology that a domain XML and options declare together.

    Ports of options get numbers after those of the domain; without ``controller=`` they go to its
    first controller that has one free.

    Args:
        domain: a file with libvirt domain XML, ``-`` for standard input, None for none.
        channel_directory: where sockets of unix channels go whose path is left out.

    Raises:
        ResourceError: the file cannot be read.
        ConfigError: what is asked for is malformed or impossible; the message names the place.
    """
    draft = Draft()
    if domain is not None:
        data = domain_xml.read_file(domain)
        file = "standard input" if domain == "-" else domain
        domain_xml.read(draft, data, file=file, channel_directory=channel_directory)
    if options is not None:
        qemu_options.read(draft, options)
    return draft.finish()
