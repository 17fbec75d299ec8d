"""XML elements with their place: every value is checked when read, every error names the place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NoReturn

from lxml import etree

from vring_serial.config.words import parse_bool, parse_int, shorten, suggest
from vring_serial.errors import ConfigError


class Node:
    """An element of the file with the name ``file``."""

    __slots__ = ("_element", "_file")

    def __init__(self, element: etree._Element, file: str) -> None:
        self._element = element
        self._file = file

    @classmethod
    def parse(cls, data: bytes, file: str) -> Node:
        """Return the root of a document without DOCTYPE; raise ConfigError with the line.

        Entities are not expanded, nothing outside the document is loaded, and depth and size of
        what it contains are libxml2's safe defaults.
        """
        parser = etree.XMLParser(
            resolve_entities=False,
            no_network=True,
            load_dtd=False,
            remove_comments=True,
            remove_pis=True,
        )
        try:
            root = etree.fromstring(data, parser)
        except etree.XMLSyntaxError as error:
            line = error.lineno or 1
            raise ConfigError(f"not XML: {error.msg or 'it is empty'}", f"{file}:{line}") from None
        if root.getroottree().docinfo.doctype:
            raise ConfigError("a DOCTYPE is not accepted", file)
        return cls(root, file)

    @property
    def tag(self) -> str:
        """Tag of the element."""
        return str(self._element.tag)

    @property
    def line(self) -> int:
        """Line on which the element begins; 0 if unknown."""
        return self._element.sourceline or 0

    @property
    def where(self) -> str:
        """Place of the element for messages: ``file:line: <tag>``, the tag with its prefix."""
        name = etree.QName(self._element).localname
        prefix = f"{self._element.prefix}:" if self._element.prefix else ""
        return f"{self._file}:{self.line}: <{prefix}{name}>"

    @property
    def text(self) -> str:
        """Text of the element, without surrounding space."""
        return (self._element.text or "").strip()

    def fail(self, why: str) -> NoReturn:
        """Raise ConfigError about this element."""
        raise ConfigError(why, self.where)

    def children(self, *tags: str) -> Iterator[Node]:
        """Yield child elements with one of these tags, or all, in the document's order."""
        for element in self._element.iterchildren(*tags or (etree.Element,)):
            yield Node(element, self._file)

    def child(self, tag: str) -> Node | None:
        """Return the first child element with this tag."""
        return next(self.children(tag), None)

    def get(self, attribute: str) -> str | None:
        """Return the value of an attribute; None if it does not exist."""
        value = self._element.get(attribute)
        return None if value is None else str(value)

    def attributes(self) -> list[str]:
        """Return the names of its attributes, in the document's order."""
        return [str(name) for name in self._element.attrib]

    def text_of(self, attribute: str) -> str:
        """Return the value of an attribute that must exist and not be empty."""
        value = self.get(attribute)
        if not value:
            self.fail(f"{attribute} is missing")
        return value

    def number(self, attribute: str) -> int | None:
        """Return a number ≥ 0, or None if the attribute does not exist."""
        value = self.get(attribute)
        if value is None:
            return None
        try:
            return parse_int(value)
        except ValueError as error:
            self.fail(f"{attribute}: {error}")

    def flag(self, attribute: str, default: bool = False) -> bool:
        """Return the boolean of an attribute: yes or no, on or off."""
        value = self.get(attribute)
        if value is None:
            return default
        try:
            return parse_bool(value)
        except ValueError as error:
            self.fail(f"{attribute}: {error}")

    def word(self, attribute: str, known: Iterable[str], default: str | None = None) -> str:
        """Return the attribute's word, one of ``known``; ``default`` if there is no attribute."""
        value = self.get(attribute)
        if value is None:
            value = default
        if value is None:
            self.fail(f"{attribute} is missing")
        if value not in known:
            self.fail(f"there is no {attribute} {shorten(value)}; {suggest(value, known)}")
        return value
