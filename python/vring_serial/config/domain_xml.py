"""libvirt domain XML: its virtio-serial controllers, channels and virtio consoles.

The elements and their defaults are those of libvirt's "Domain XML format", sections "Controllers",
"Device Addresses" and "Consoles, serial and channel devices". All other elements of a domain
concern the emulator; only their PCI addresses are read.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from vring_serial.chardev import LogOptions, Options, options_type
from vring_serial.config.domain_metadata import find_converted
from vring_serial.config.domain_pci import devices, pci_address, read_pci
from vring_serial.config.draft import (
    MAX_CONTROLLER_INDEX,
    Draft,
    DraftController,
    DraftPort,
    place_of,
)
from vring_serial.config.graphics import read_graphics
from vring_serial.config.topology import ChardevConfig, Topology, check_domain_name
from vring_serial.config.unserved import UNSERVED
from vring_serial.config.xml_node import Node
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.unix_socket import MAX_PATH

#: libvirt's limit for XML in one message.
MAX_XML_BYTES = 4 << 20
#: libvirt's name of a source → QEMU's name of the chardev.
_KINDS = {
    "dev": "serial",
    "file": "file",
    "null": "null",
    "pipe": "pipe",
    "pty": "pty",
    "spiceport": "spiceport",
    "spicevmc": "spicevmc",
    "stdio": "stdio",
    "tcp": "socket",
    "udp": "udp",
    "unix": "socket",
}
_UNSERVED_TYPES = ("dbus", "nmdm", "qemu-vdagent", "vc")
_CHANNEL_TARGETS = ("guestfwd", "virtio", "xen")
_CONSOLE_TARGETS = ("lxc", "openvz", "sclp", "sclplm", "serial", "uml", "virtio", "xen")
#: Maximum number of characters of a domain's name in libvirt's file names.
_SHORT_NAME = 20
#: Models of a controller, and whether they also support legacy (pre-1.0) drivers.
_MODELS = {"virtio": None, "virtio-non-transitional": False, "virtio-transitional": True}
#: Part of the paths that libvirt generates for sockets of channels.
_LIBVIRTS_PATH = re.compile(
    r".*/libvirt/qemu/(?:(?:lib|run)/)?channel/(?:target/)?[^/]+(?:/[^/]+)?"
)
_ADDRESS_TYPES = ("ccw", "pci", "virtio-mmio")


def load(path: str, *, channel_directory: str | None = None) -> Topology:
    """Return the topology of the domain in a file; ``-`` is standard input.

    Args:
        path: the file, at most MAX_XML_BYTES long.
        channel_directory: directory for sockets of unix channels without a path; None: that of a
            converted domain's first socket, else the current one.

    Raises:
        ResourceError: the file cannot be read.
        ConfigError: it is not a domain XML, or is invalid.
    """
    return parse(read_file(path), file=path, channel_directory=channel_directory)


def parse(data: bytes, *, file: str = "domain", channel_directory: str | None = None) -> Topology:
    """Do as :func:`load`, for XML in memory; ``file`` is its name in messages."""
    draft = Draft()
    read(draft, data, file=file, channel_directory=channel_directory)
    return draft.finish()


def read_file(path: str) -> bytes:
    """Return the bytes of a file or of standard input (``-``), limited; raise as :func:`load`."""
    try:
        if path == "-":
            data = sys.stdin.buffer.read(MAX_XML_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(MAX_XML_BYTES + 1)
    except OSError as error:
        raise ResourceError(
            f"{'standard input' if path == '-' else path}: {error.strerror or error}"
        ) from None
    if len(data) > MAX_XML_BYTES:
        raise ConfigError(f"longer than {MAX_XML_BYTES >> 20} MiB: this is no domain", path)
    return data


def read(draft: Draft, data: bytes, *, file: str, channel_directory: str | None = None) -> None:
    """Add the configuration in the domain XML ``data`` to ``draft``. Raises ConfigError.

    Of a converted domain it is what stands in its metadata: the rest is libvirt's.
    """
    root = Node.parse(data, file)
    if root.tag != "domain":
        root.fail("the root of a domain is <domain>")
    draft.where = file
    draft.name = _read_name(root) or draft.name
    converted = find_converted(root)
    if converted is None:
        ours = root
        draft.pci = read_pci(root)
    else:
        ours = converted.node
        draft.sockets = converted.sockets
    if channel_directory is None:
        channel_directory = os.path.dirname(draft.sockets[0]) if draft.sockets else ""
    unserved: list[str] = []
    _read_controllers(draft, ours, unserved)
    graphics = list(devices(ours, "graphics"))
    spice_path = _own_path(channel_directory, draft.name, "spice.sock")
    draft.read_spice = lambda: read_graphics(graphics, spice_path, draft.warnings)
    channels = _Channels(draft, channel_directory, unserved)
    for node in devices(ours, "console", "channel", "serial", "parallel"):
        channels.read(node)
    draft.warnings.extend(f"{file}: {warning}" for warning in channels.warnings())


def _read_name(root: Node) -> str:
    node = root.child("name")
    if node is None:
        return ""
    check_domain_name(node.text, node.where)
    return node.text


# --- controllers


def _read_controllers(draft: Draft, root: Node, unserved: list[str]) -> None:
    """Add the controllers with an index, then the others with the first free index each.

    Their order in libvirt's list, in which they get PCI addresses, is determined before.
    """
    nodes = [n for n in devices(root, "controller") if n.get("type") == "virtio-serial"]
    for node in nodes[MAX_CONTROLLER_INDEX + 1 :]:
        node.fail(f"more than {MAX_CONTROLLER_INDEX + 1} controllers")
    given = [node.number("index") for node in nodes]
    order: list[int] = []  # positions in nodes
    for position, index in enumerate(given):
        order.insert(place_of(index, [given[other] for other in order]), position)
    indices = [index for index in given if index is not None]
    for position in sorted(range(len(nodes)), key=lambda position: given[position] is None):
        index = given[position]
        if index is None:
            index = next(i for i in range(len(indices) + 1) if i not in indices)
            indices.append(index)
        controller = DraftController(index, nodes[position].where, rank=order.index(position))
        _read_controller(controller, nodes[position], unserved)
        draft.add_controller(controller)


def _read_controller(controller: DraftController, node: Node, unserved: list[str]) -> None:
    ports = node.number("ports")
    if ports is not None:
        if ports == 0:
            node.fail("a controller has at least one port")
        controller.max_ports = ports
    address = node.child("address")
    if address is not None:
        controller.pci = address.word("type", _ADDRESS_TYPES) == "pci"
        if controller.pci:
            controller.address = pci_address(address)
    controller.transitional = _MODELS[node.word("model", _MODELS, "virtio")]
    controller.vectors = node.number("vectors")
    driver = node.child("driver")
    if driver is not None:
        if driver.get("packed") is not None:
            controller.packed = driver.flag("packed")
        for name in driver.attributes():
            if name != "packed" and driver.get(name) not in ("no", "off"):
                unserved.append(f"<driver {name}=> in line {driver.line}")


# --- channels and consoles


class _Channels:
    """The reader of character devices; it collects those that are not served for a warning."""

    def __init__(self, draft: Draft, channel_directory: str, unserved: list[str]) -> None:
        self._draft = draft
        self._channel_directory = channel_directory
        self._counts = {"channel": 0, "console": 0}
        self._foreign: list[str] = []
        self._unserved = unserved

    def warnings(self) -> Iterator[str]:
        if self._foreign:
            yield f"not virtio-serial, left to the emulator: {', '.join(self._foreign)}"
        if self._unserved:
            yield f"not served, without effect: {', '.join(self._unserved)}"

    def read(self, node: Node) -> None:
        if node.tag not in self._counts:
            self._foreign.append(f"<{node.tag}> in line {node.line}")
            return
        number = self._counts[node.tag]
        self._counts[node.tag] += 1
        target = node.child("target")
        kind = self._target_type(node, target)
        if kind != "virtio":
            self._foreign.append(f"<{node.tag}> with target {kind} in line {node.line}")
            return
        source = node.child("source")
        label = source.child("seclabel") if source is not None else None
        if label is not None:
            self._unserved.append(f"<seclabel> in line {label.line}")
        name = (target.get("name") or "") if target is not None else ""
        alias = node.child("alias")
        id = (alias.get("name") if alias is not None else None) or f"{node.tag}{number}"
        self._draft.claim_chardev_id(id, node.where)
        port = DraftPort(
            where=node.where,
            chardev=self._read_source(node, id, name),
            console=node.tag == "console",
            name=name,
        )
        _read_port_address(node, port)
        self._draft.add_port(port)

    def _target_type(self, node: Node, target: Node | None) -> str:
        if node.tag == "console":  # without a target it is the other name of the first <serial>
            known, default = _CONSOLE_TARGETS, "serial"
            return target.word("type", known, default) if target is not None else default
        if target is None:
            node.fail("a channel needs a <target>")
        return target.word("type", _CHANNEL_TARGETS)

    def _read_source(self, node: Node, id: str, name: str) -> ChardevConfig:
        type_ = node.word("type", (*_KINDS, *_UNSERVED_TYPES), "pty")
        if type_ in UNSERVED:
            node.fail(f"a source of type {type_} is not served: {UNSERVED[type_]}")
        source = node.child("source")
        if type_ == "unix":
            options = self._unix(node, source, name or id)
        elif type_ == "tcp":
            options = _tcp(node, _needed(node, source))
        elif type_ == "udp":
            options = _udp(node)
        elif type_ == "file":
            source = _needed(node, source)
            options = _make(
                source, "file", path=source.text_of("path"), append=source.flag("append")
            )
        elif type_ in ("pipe", "dev"):
            source = _needed(node, source)
            options = _make(source, _KINDS[type_], path=source.text_of("path"))
        elif type_ == "spiceport":
            source = _needed(node, source)
            options = _make(source, "spiceport", name=source.text_of("channel"))
        else:
            options = _make(node, _KINDS[type_])
        return ChardevConfig(_KINDS[type_], id, options, node.where, _log(node))

    def _unix(self, node: Node, source: Node | None, name: str) -> Options:
        """Return the options of a unix channel; without a path it listens on a generated one."""
        path = source.get("path") if source is not None else None
        if source is None or not path:
            if node.tag == "console":
                node.fail("a unix console needs a <source> with a path")
            path = _own_path(self._channel_directory, self._draft.name, name)
            return _make(node, "socket", path=path, server=True, wait=False)
        return _make(source, "socket", path=path, **_stream(source))


def _own_path(directory: str, domain: str, name: str) -> str:
    """Return the path of a socket for which the domain has none.

    If it would be too long, it has libvirt's short form of the domain's name, the first 20
    characters.
    """
    for stem in (domain, domain[:_SHORT_NAME]):
        path = os.path.join(directory, f"{stem}.{name}".replace("/", "_"))
        if len(path.encode(errors="surrogateescape")) <= MAX_PATH:
            break
    return path


def _make(node: Node, kind: str, **values: object) -> Options:
    """Return the options of a chardev; errors name ``node``."""
    try:
        return options_type(kind)(**values)
    except ConfigError as error:
        node.fail(f"{error.where}: {error.why}" if error.where else error.why)


def _log(node: Node) -> LogOptions:
    log = node.child("log")
    if log is None:
        return LogOptions()
    try:
        return LogOptions(logfile=log.text_of("file"), logappend=log.flag("append"))
    except ConfigError as error:
        log.fail(f"file: {error.why}")


def _needed(node: Node, source: Node | None) -> Node:
    if source is None:
        node.fail("<source> is missing")
    return source


def _tcp(node: Node, source: Node) -> Options:
    protocol = node.child("protocol")
    if protocol is not None:
        known = ("raw", "telnet", "telnets", "tls")
        if (type_ := protocol.word("type", known, "raw")) != "raw":
            protocol.fail(f"{type_} is not served: only raw is")
    if source.flag("tls"):
        source.fail("tls is not served")
    host = source.text_of("host")
    source.text_of("service")
    return _make(source, "socket", host=host, port=source.number("service"), **_stream(source))


def _udp(node: Node) -> Options:
    """Return the options of datagrams; where they come from, if given, is a source of its own."""
    values: dict[str, object] = {}
    for source in node.children("source"):
        if source.word("mode", ("bind", "connect"), "connect") == "bind":
            values["localaddr"] = source.get("host") or ""
            values["localport"] = source.number("service") or 0
        else:
            values["host"] = source.get("host") or ""
            values["port"] = source.number("service")
    if "port" not in values:
        node.fail("<source mode='connect'> is missing")
    return _make(node, "udp", **values)


def _stream(source: Node) -> dict[str, object]:
    """Return the options of a stream socket that say which side connects, and how often."""
    libvirts = is_libvirts_path(source.get("path") or "")
    mode = source.word("mode", ("bind", "connect"), "bind" if libvirts else "connect")
    reconnect = source.child("reconnect")
    if mode == "bind":
        if reconnect is not None and reconnect.get("enabled") is not None:
            reconnect.fail("goes with mode='connect' only, and this socket listens")
        return {"server": True, "wait": False}
    if reconnect is None or not reconnect.flag("enabled"):
        return {}
    timeout = reconnect.number("timeout")
    if not timeout:
        reconnect.fail("timeout is missing" if timeout is None else "timeout cannot be 0")
    return {"reconnect": timeout}


def is_libvirts_path(path: str) -> bool:
    """Return whether libvirt generated this path for a channel's socket."""
    return _LIBVIRTS_PATH.fullmatch(path) is not None


def _read_port_address(node: Node, port: DraftPort) -> None:
    """Read controller and number, if given; 0 counts as omitted."""
    address = node.child("address")
    if address is None:
        return
    if address.word("type", ("ccw", "virtio-serial")) == "ccw":
        return  # a device of its own on s390 in the XML of old; here it is a port all the same
    address.number("bus")  # as in libvirt it says nothing: a controller has one bus
    port.controller = address.number("controller") or 0
    port.nr = address.number("port") or None
