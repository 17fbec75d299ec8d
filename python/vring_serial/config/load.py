"""The topology of a whole command line."""

from __future__ import annotations

from collections.abc import Callable

from vring_serial.config import domain_xml, qemu_options
from vring_serial.config.draft import Draft
from vring_serial.config.qemu_options import QemuOptions
from vring_serial.config.topology import Topology


def load_topology(
    domain: str | None = None,
    options: QemuOptions | None = None,
    *,
    channel_directory: str | None = None,
    read: Callable[[str], bytes] = domain_xml.read_file,
) -> Topology:
    """Return the topology that a domain XML and options declare together.

    Ports of options get their numbers after those of the domain; without ``controller=`` they are
    added to its first controller with a free number.

    Args:
        domain: a file with libvirt domain XML, ``-`` for standard input, None for none.
        channel_directory: directory for sockets of unix channels without a path; None: see
            :func:`.domain_xml.load`.
        read: returns what is in a file; see :class:`vring_serial.config.inputs.Inputs`.

    Raises:
        ResourceError: the file cannot be read.
        ConfigError: the configuration is malformed or invalid; the message names the place.
    """
    draft = Draft()
    if domain is not None:
        data = read(domain)
        file = "standard input" if domain == "-" else domain
        domain_xml.read(draft, data, file=file, channel_directory=channel_directory)
    if options is not None:
        qemu_options.read(draft, options)
    return draft.finish()
