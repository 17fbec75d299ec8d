"""``vring libvirt convert --revert``: a converted domain becomes what it was.

To the letter if it says what it said when it was converted, also when libvirt has written it down
in its own way since. Otherwise what was added is taken out, and what was moved is put back.
"""

from __future__ import annotations

import base64
import binascii
import copy
import hashlib
import itertools
import json
import zlib
from collections.abc import Sequence

from lxml import etree

from vring_serial.config.domain_convert import Rewritten
from vring_serial.config.domain_document import ARG, COMMANDLINE, Document, digest, drop, put
from vring_serial.config.domain_memory import unshare_memory
from vring_serial.config.domain_metadata import DOMAIN, ORIGINAL, find_converted
from vring_serial.config.domain_xml import MAX_XML_BYTES

#: Attributes that make an address, whatever else it says.
_PLACE = ("type", "domain", "bus", "slot", "function", "controller", "port")


def revert(data: bytes, *, file: str = "domain") -> Rewritten:
    """Return the domain from before its conversion.

    Raises:
        ConfigError: it is no domain, or was not converted.
    """
    document = Document(data, file)
    converted = find_converted(document.node())
    if converted is None:
        document.node().fail("it was not converted: there is nothing to revert")
    ours = document.root.find(f"metadata/{DOMAIN}")
    assert ours is not None
    record = ours.find(ORIGINAL)
    if record is None or record.get("converted") != digest(document.root):
        why = "it was edited since it was converted"
    elif (original := _original(record)) is None:
        why = "the copy of the domain from before is damaged"
    else:
        return Rewritten(original, ("the domain is what it was, to the letter",))
    notes = [f"{why}: what was added is taken out, what was moved is put back, the rest stays"]
    _take_out(document, ours, converted.sockets)
    _put_back(document, ours, notes)
    return Rewritten(document.dump(), tuple(notes))


def _original(record: etree._Element) -> bytes | None:
    """Return the domain in a record; None if it is not the one that was put there."""
    unpacker = zlib.decompressobj()
    try:
        packed = base64.b64decode((record.text or "").encode(), validate=False)
        original = unpacker.decompress(packed, MAX_XML_BYTES + 1)
    except (binascii.Error, zlib.error):
        return None
    return original if hashlib.sha256(original).hexdigest() == record.get("sha256") else None


def _take_out(document: Document, ours: etree._Element, sockets: Sequence[str]) -> None:
    added = (ours.get("added") or "").split()
    metadata = ours.getparent()
    assert metadata is not None
    drop(ours)
    if "metadata" in added and len(metadata) == 0:
        drop(metadata)
    unshare_memory(document, added)
    commandline = document.root.find(COMMANDLINE)
    if commandline is None:
        return
    arguments = commandline.findall(ARG)
    for option, value in itertools.pairwise(arguments):
        if option.get("value") == "-device" and _socket_of(value.get("value")) in sockets:
            drop(option)
            drop(value)
    if "commandline" in added and len(commandline) == 0:
        drop(commandline)


def _socket_of(device: str | None) -> str | None:
    """Return the path in a device as convert writes it."""
    try:
        properties = json.loads(device or "")
        path = properties["socket"]["path"] if properties["driver"] == "vfio-user-pci" else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return path if isinstance(path, str) else None


def _put_back(document: Document, ours: etree._Element, notes: list[str]) -> None:
    """Put moved elements at the end of the devices; one whose place was given away gets another."""
    devices, _ = document.ensure("devices")
    places = {_place(address) for address in devices.iterfind("*/address")}
    staying = {
        document.node(element).number("index") or 0
        for element in document.devices("controller")
        if element.get("type") == "virtio-serial"
    }
    for moved in ours.iterfind("devices/*"):
        node = document.node(moved)
        if moved.tag == "controller" and (node.number("index") or 0) in staying:
            continue
        element = copy.deepcopy(moved)
        element.tail = None
        address = element.find("address")
        if address is not None and _place(address) in places:
            drop(address)
            notes.append(f"{node.where}: its address is another device's now; libvirt chooses one")
        put(devices, element)


def _place(address: etree._Element) -> tuple[str | int, ...]:
    """Return where an address is; numbers may be written in several ways."""
    return tuple(_number(address.get(name) or "0") for name in _PLACE)


def _number(text: str) -> int | str:
    try:
        return int(text, 16 if text[:2].lower() == "0x" else 10)
    except ValueError:
        return text
