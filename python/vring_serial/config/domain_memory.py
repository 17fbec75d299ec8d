"""Guest memory in a domain XML that another process can map: what it needs, and what forbids it."""

from __future__ import annotations

from lxml import etree

from vring_serial.config.domain_document import Document, drop, put

_BEFORE_IT = ("name", "uuid", "title", "description", "metadata", "maxMemory", "memory")


def share_memory(document: Document) -> list[str]:
    """Make the guest's memory shared, and return the names of the elements that this added.

    Huge pages and a given source stay. Raises ConfigError if the memory cannot be shared, or the
    domain says that it must not be.
    """
    _check(document)
    backing, made = document.ensure("memoryBacking", *_BEFORE_IT, "currentMemory", "memtune")
    added = ["memoryBacking"] if made else []
    source, access = backing.find("source"), backing.find("access")
    if source is not None and document.node(source).get("type") not in ("memfd", "file"):
        document.node(source).fail("memory of this source cannot be shared: memfd and file can")
    if access is not None and document.node(access).get("mode") != "shared":
        document.node(access).fail("the domain does not want its memory shared, and it must be")
    if source is None and backing.find("hugepages") is None:
        put(backing, etree.Element("source", type="memfd"))
        added.append("source")
    if access is None:
        put(backing, etree.Element("access", mode="shared"))
        added.append("access")
    return added


def _check(document: Document) -> None:
    for element in document.root.iterchildren("launchSecurity"):
        document.node(element).fail("the guest's memory is encrypted: no other process reads it")
    cells = document.root.iterfind("cpu/numa/cell")
    for element, name in [
        *((cell, "memAccess") for cell in cells),
        *((memory, "access") for memory in document.devices("memory")),
    ]:
        if document.node(element).get(name) == "private":
            document.node(element).fail(
                f"{name}='private': the domain does not want this memory shared, and it must be"
            )


def unshare_memory(document: Document, added: list[str]) -> None:
    """Take out what :func:`share_memory` added, unless it was changed since."""
    backing = document.root.find("memoryBacking")
    if backing is None:
        return
    for tag, name, value in (("source", "type", "memfd"), ("access", "mode", "shared")):
        element = backing.find(tag)
        if tag in added and element is not None and element.get(name) == value:
            drop(element)
    if "memoryBacking" in added and len(backing) == 0:
        drop(backing)
