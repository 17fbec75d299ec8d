"""A domain XML that is edited, and the digest of what it says.

Comments stay, and what is added is indented.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from lxml import etree

from vring_serial.config.domain_metadata import ORIGINAL
from vring_serial.config.xml_node import Node

QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
COMMANDLINE = f"{{{QEMU}}}commandline"
ARG = f"{{{QEMU}}}arg"
_INDENT = "  "
#: Elements whose children libvirt writes in an order of its own.
_UNORDERED = ("domain", "memoryBacking")


class Document:
    """A domain, checked as :meth:`Node.parse` does, that may be changed.

    Args:
        data: the XML.
        file: its name in messages.

    Attributes:
        root: its root, with comments.

    Raises ConfigError.
    """

    def __init__(self, data: bytes, file: str) -> None:
        Node.parse(data, file)  # refuses a DOCTYPE, and so there are no entities
        parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
        self.root = etree.fromstring(data, parser)
        self._file = file
        self._declared = data.lstrip().startswith(b"<?xml")
        if self.node().tag != "domain":
            self.node().fail("the root of a domain is <domain>")

    def node(self, element: etree._Element | None = None) -> Node:
        """Return the reader of an element, or of the root; its errors name the place."""
        return Node(self.root if element is None else element, self._file)

    def devices(self, *tags: str) -> Iterator[etree._Element]:
        """Yield the devices with one of these tags."""
        for parent in self.root.iterchildren("devices"):
            yield from list(parent.iterchildren(*tags))

    def ensure(self, tag: str, *after: str) -> tuple[etree._Element, bool]:
        """Return the child of the root with this tag, and whether it had to be made.

        Args:
            after: tags of elements that it follows, if there are any.
        """
        found = self.root.find(tag)
        if found is not None:
            return found, False
        made = etree.Element(tag, nsmap={"qemu": QEMU} if tag == COMMANDLINE else None)
        index = len(self.root)
        if after:
            before = [i for i, child in enumerate(self.root) if child.tag in after]
            index = before[-1] + 1 if before else 0
        put(self.root, made, index)
        return made, True

    def dump(self) -> bytes:
        """Return the document as UTF-8."""
        tree = self.root.getroottree()
        return etree.tostring(tree, encoding="UTF-8", xml_declaration=self._declared) + b"\n"


def put(parent: etree._Element, child: etree._Element, index: int | None = None) -> None:
    """Insert ``child``, at the end without ``index``, on a line of its own."""
    level = sum(1 for _ in parent.iterancestors()) + 1
    etree.indent(child, _INDENT, level=level)
    inside, outside = "\n" + _INDENT * level, "\n" + _INDENT * (level - 1)
    if index is None or index >= len(parent):
        index = len(parent)
        if index:
            child.tail, parent[-1].tail = parent[-1].tail or outside, inside
        else:
            parent.text, child.tail = inside, outside
    else:
        child.tail = inside
    parent.insert(index, child)


def drop(child: etree._Element) -> None:
    """Remove an element with its line."""
    parent = child.getparent()
    assert parent is not None
    before = child.getprevious()
    if child.getnext() is None:  # what comes before it now ends the parent
        if before is not None:
            before.tail = child.tail
        else:
            parent.text = None
    parent.remove(child)


def digest(root: etree._Element) -> str:
    """Return the SHA-256 of what a domain says, in hexadecimal.

    It is the same when libvirt has written the domain down in its own way: space between elements,
    comments, prefixes, and the order of some elements do not count. Nor does the record of the
    domain from before.
    """
    return _digest(root).hex()


def _digest(element: etree._Element) -> bytes:
    below = [child for child in element.iterchildren(etree.Element) if child.tag != ORIGINAL]
    digests = [_digest(child) for child in below]
    if element.tag in _UNORDERED:
        digests.sort()
    texts = [element.text, *(child.tail for child in element)]
    text = "".join(text or "" for text in texts).strip()
    attributes = sorted((str(name), str(value)) for name, value in element.attrib.items())
    said = repr((str(element.tag), attributes, text)).encode()
    return hashlib.sha256(hashlib.sha256(said).digest() + b"".join(digests)).digest()
