"""What ``vring libvirt convert`` left in a domain's ``<metadata>``, for whoever serves it.

libvirt carries one element of each foreign namespace there, as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from vring_serial.config.xml_node import Node

_NAMESPACES = "urn:vring:domain:"
NAMESPACE = f"{_NAMESPACES}1"
#: Tags: the element, in it a socket of each controller, and the domain from before.
DOMAIN = f"{{{NAMESPACE}}}domain"
SOCKET = f"{{{NAMESPACE}}}socket"
ORIGINAL = f"{{{NAMESPACE}}}original"


@dataclass(frozen=True, slots=True)
class Converted:
    """What a converted domain leaves to us.

    Attributes:
        node: the element; its ``<devices>`` are ours.
        sockets: where controllers are served over vfio-user, in the order of their index.
    """

    node: Node
    sockets: tuple[str, ...]


def find_converted(root: Node) -> Converted | None:
    """Return what is ours in a domain; None if it was not converted.

    Raises ConfigError if that is of another version, or names no socket.
    """
    found = [
        node
        for metadata in root.children("metadata")
        for node in metadata.children()
        if node.tag.startswith(f"{{{_NAMESPACES}")
    ]
    if not found:
        return None
    node, *more = found
    for other in more:
        other.fail("a domain is converted once")
    if node.tag != DOMAIN:
        node.fail(f"it is of another version of vring: known is {NAMESPACE}")
    sockets = tuple(socket.text_of("path") for socket in node.children(SOCKET))
    if not sockets:
        node.fail("it names no socket")
    return Converted(node, sockets)
