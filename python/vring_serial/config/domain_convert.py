"""``vring libvirt convert``: a domain's channels and consoles move to vring, with all that needs.

What moved stands in the domain's metadata, where :mod:`.domain_xml` reads it; beside it the domain
from before, for :mod:`.domain_revert`.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from lxml import etree

from vring_serial.config import domain_xml
from vring_serial.config.domain_document import ARG, COMMANDLINE, Document, digest, drop, put
from vring_serial.config.domain_memory import share_memory
from vring_serial.config.domain_metadata import (
    DOMAIN,
    NAMESPACE,
    ORIGINAL,
    SOCKET,
    find_converted,
)
from vring_serial.config.domain_pci import read_pci
from vring_serial.config.draft import Draft, check_unix_path
from vring_serial.config.topology import Topology, check_domain_name
from vring_serial.config.xml_node import Node
from vring_serial.errors import ConfigError

#: Where sockets are, each domain's in a directory with its name.
DIRECTORY = "/run/vring"
#: The channel that libvirt itself talks to.
GUEST_AGENT = "org.qemu.guest_agent.0"
_TYPES = ("hvf", "kvm", "qemu")
_OF_SPICE = ("spicevmc", "spiceport")
#: A device's slot in the options for QEMU that somebody wrote.
_SLOT = re.compile(r"""\baddr["']?\s*[=:]\s*["']?(?:0[xX])?([0-9a-fA-F]{1,2})\b""")


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A domain that was converted, or reverted.

    Attributes:
        data: its XML.
        notes: what was done, and what was not, one line each.
    """

    data: bytes
    notes: tuple[str, ...]


def convert(
    data: bytes, *, file: str = "domain", directory: str = DIRECTORY, spice: bool = False
) -> Rewritten:
    """Return a domain whose channels and consoles vring serves over vfio-user.

    Args:
        data: the domain as libvirt keeps it (``virsh dumpxml --inactive``).
        file: its name in messages.
        directory: where the directory with the domain's sockets is.
        spice: also move the SPICE server, which takes the domain's display away.

    Raises:
        ConfigError: it is no domain, there is nothing to move, or it cannot be moved.
    """
    document = Document(data, file)
    return _Conversion(document, data, os.path.join(directory, _name(document)), spice).run()


def _name(document: Document) -> str:
    """Return the name of a domain that can be converted."""
    root = document.node()
    if find_converted(root) is not None:
        root.fail("it is converted already; --revert takes that back")
    if root.get("id") is not None:
        root.fail("it is a running domain's XML; take that of virsh dumpxml --inactive")
    if (kind := root.get("type") or "kvm") not in _TYPES:
        root.fail(f"a domain of type {kind} is not QEMU's")
    name = root.child("name")
    if name is None:
        root.fail("<name> is missing")
    check_domain_name(name.text, name.where)
    if name.text in (".", ".."):
        name.fail("it cannot name a directory")
    return name.text


class _Conversion:
    """The conversion of one domain.

    Args:
        document: the domain, which becomes the converted one.
        original: its bytes.
        directory: for its sockets.
        spice: whether its SPICE server moves.
    """

    def __init__(self, document: Document, original: bytes, directory: str, spice: bool) -> None:
        self._document = document
        self._original = original
        self._directory = directory
        self._spice = spice
        self._notes: list[str] = []
        self._kept: list[etree._Element] = []  # controllers that libvirt needs too

    def run(self) -> Rewritten:
        document = self._document
        moved = self._choose()
        metadata, made = document.ensure(
            "metadata", "name", "uuid", "genid", "title", "description"
        )
        added = ["metadata"] if made else []
        added += share_memory(document)
        ours = etree.Element(DOMAIN, nsmap={"vring": NAMESPACE})
        devices = etree.SubElement(ours, "devices")
        for element in moved:
            self._move(element, devices)
        put(metadata, ours)
        topology = self._add_sockets(ours)
        if self._add_devices(list(topology.sockets)):
            added.append("commandline")
        ours.set("added", " ".join(added))
        ours.append(self._record())
        drop(ours)  # and in again, for the indentation of all that is in it now
        put(metadata, ours)
        self._tell(topology)
        return Rewritten(document.dump(), tuple(self._notes))

    # --- what moves

    def _choose(self) -> list[etree._Element]:
        """Return the elements that vring serves instead, controllers first."""
        document = self._document
        displays = [e for e in document.devices("graphics") if e.get("type") == "spice"]
        stay_with_spice = bool(displays) and not self._spice
        if self._spice:
            self._check_spice(displays)
        moved, staying = [], []
        for element in document.devices("console", "channel"):
            node = document.node(element)
            target = node.child("target")
            if target is None or target.get("type") != "virtio":
                continue
            why = None
            if target.get("name") == GUEST_AGENT:
                why = "libvirt itself talks to it"
            elif node.get("type") in _OF_SPICE and stay_with_spice:
                why = "it goes with the domain's SPICE display (--spice moves both)"
            else:
                why = _unserved(node, element)
            if why is None:
                moved.append(element)
            else:
                staying.append(element)
                self._notes.append(f"{_describe(node)} stays with libvirt: {why}")
        if not moved:
            because = f" ({'; '.join(self._notes)})" if self._notes else ""
            document.node().fail(f"there is no channel or console to move{because}")
        wanted, needed = self._controllers(moved), self._controllers(staying)
        controllers = []
        for element in document.devices("controller"):
            index = document.node(element).number("index") or 0
            if element.get("type") == "virtio-serial" and index in wanted:
                controllers.append(element)
                if index in needed:
                    self._kept.append(element)
        return [*controllers, *moved, *(displays if self._spice else ())]

    def _controllers(self, ports: Sequence[etree._Element]) -> set[int]:
        """Return the indices of the controllers of ports."""
        addresses = [self._document.node(port).child("address") for port in ports]
        return {(a.number("controller") or 0) if a is not None else 0 for a in addresses}

    def _check_spice(self, displays: list[etree._Element]) -> None:
        """Raise ConfigError if the domain cannot go on without the emulator's SPICE server."""
        if not displays:
            self._document.node().fail("there is no <graphics type='spice'> for --spice to move")
        for element in self._document.devices("redirdev", "smartcard", "audio", "serial"):
            if element.get("type") in ("spice", *_OF_SPICE):
                self._document.node(element).fail("it needs the display's SPICE server; remove it")

    def _move(self, element: etree._Element, devices: etree._Element) -> None:
        if element not in self._kept:
            node = self._document.node(element)
            self._notes.append(f"{_describe(node)} moves to vring")
        moved = copy.deepcopy(element)
        moved.tail = None
        source = moved.find("source")
        if source is not None and domain_xml.is_libvirts_path(source.get("path") or ""):
            del source.attrib["path"]  # its directory is there with libvirt's channels alone
        devices.append(moved)
        if element not in self._kept:
            drop(element)

    # --- what is added

    def _add_sockets(self, ours: etree._Element) -> Topology:
        """Name a socket for each controller; return what vring makes of the domain."""
        made: list[str] = []
        topology = None
        while topology is None or len(made) < len(topology.controllers):
            number = len(made) or ""
            path = os.path.join(self._directory, f"device{number}.sock")
            check_unix_path(path, "--directory")
            ours.insert(len(made), etree.Element(SOCKET, path=path))
            made.append(path)
            topology = domain_xml.parse(self._document.dump(), file="the converted domain")
        return topology

    def _add_devices(self, sockets: list[str]) -> bool:
        """Add a device of QEMU's for each socket; return whether there were no options before."""
        root = self._document.root
        slots = read_pci(self._document.node())
        if slots is None:
            self._document.node().fail("its machine has no PCI bus for the device")
        taken = {
            int(slot, 16)
            for argument in root.iter(ARG)
            for slot in _SLOT.findall(argument.get("value") or "")
        }
        commandline, made = self._document.ensure(COMMANDLINE)
        bus = "pcie.0" if slots.machine.express else "pci.0"
        for path in sockets:
            slot = slots.last_free(taken)
            if slot is None:
                self._document.node().fail(f"{bus} has no free slot for the device")
            taken.add(slot)
            device = {
                "driver": "vfio-user-pci",
                "bus": bus,
                "addr": f"{slot:#x}",
                "socket": {"type": "unix", "path": path},
            }
            put(commandline, etree.Element(ARG, value="-device"))
            put(commandline, etree.Element(ARG, value=json.dumps(device, separators=(",", ":"))))
            self._notes.append(f"QEMU gets a device in slot {slot:#x} of {bus}, on {path}")
        return made

    def _record(self) -> etree._Element:
        """Return the element that holds the domain from before."""
        record = etree.Element(ORIGINAL)
        record.set("converted", digest(self._document.root))
        record.set("sha256", hashlib.sha256(self._original).hexdigest())
        record.text = base64.b64encode(zlib.compress(self._original, 9)).decode()
        return record

    def _tell(self, topology: Topology) -> None:
        for controller in topology.controllers:
            for port in controller.ports:
                path = getattr(port.chardev.options, "path", "")
                if port.chardev.kind == "socket" and path:
                    verb = (
                        "listens" if getattr(port.chardev.options, "server", False) else "connects"
                    )
                    self._notes.append(f"{port.name or 'a console'}: vring {verb} at {path}")
        self._notes.extend(topology.warnings)


def _unserved(node: Node, element: etree._Element) -> str | None:
    """Return why vring cannot serve a channel or console; None if it can."""
    domain = etree.Element("domain")
    etree.SubElement(domain, "devices").append(copy.deepcopy(element))
    try:
        domain_xml.read(Draft(), etree.tostring(domain), file=node.where)
    except ConfigError as error:
        return error.why
    return None


def _describe(node: Node) -> str:
    target = node.child("target")
    name = (target.get("name") if target is not None else None) or node.get("index") or ""
    return f"<{node.tag}{f' {name}' if name else ''}> in line {node.line}"
