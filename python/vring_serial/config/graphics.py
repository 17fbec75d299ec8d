"""``<graphics type='spice'>`` of a domain XML: where the SPICE server listens, and for whom."""

from __future__ import annotations

from vring_serial.config.topology import SpiceConfig
from vring_serial.config.xml_node import Node
from vring_serial.errors import ConfigError
from vring_serial.spice import SpiceOptions

#: Where libvirt listens, and looks for certificates, when nothing is said.
DEFAULT_ADDRESS = "127.0.0.1"
X509_DIRECTORY = "/etc/pki/libvirt-spice"

_MODES = ("any", "insecure", "secure")
_LISTEN_TYPES = ("address", "network", "none", "socket")


def read_graphics(node: Node) -> SpiceConfig | None:
    """The server that a graphics element asks for, or None if it is to listen nowhere.

    What concerns display and sound (image, jpeg, streaming, gl, …) is not ours and is passed over.

    Raises:
        ConfigError: it asks for what cannot be.
    """
    values: dict[str, object] = {}
    listen = node.child("listen")
    kind = listen.word("type", _LISTEN_TYPES) if listen is not None else "address"
    if kind == "none":
        return None
    if kind == "network":
        assert listen is not None
        listen.fail("networks are libvirt's; name the address")
    if kind == "socket":
        assert listen is not None
        values.update(unix=True, addr=listen.text_of("socket"))
    else:
        values["addr"] = (
            (listen.get("address") if listen is not None else None)
            or node.get("listen")
            or DEFAULT_ADDRESS
        )
        _read_ports(node, values)
    _read_password(node, values)
    _read_features(node, values)
    try:
        return SpiceConfig(SpiceOptions(**values), node.where)  # type: ignore[arg-type]
    except ConfigError as error:
        node.fail(f"{error.where}: {error.why}" if error.where else error.why)


def _read_ports(node: Node, values: dict[str, object]) -> None:
    """-1 stands for a port that is to be chosen, as no port at all does with autoport."""
    port = _port(node, "port")
    tls_port = _port(node, "tlsPort")
    if node.flag("autoport") or (port is None and tls_port is None):
        values["autoport"] = True
    elif port:
        values["port"] = port
    if tls_port:
        values.update(tls_port=tls_port, x509_dir=X509_DIRECTORY)
    channels: dict[str, list[str]] = {"secure": [], "insecure": [], "any": []}
    channels[node.word("defaultMode", _MODES, "any")].append("default")
    for channel in node.children("channel"):
        channels[channel.word("mode", _MODES)].append(channel.text_of("name"))
    if channels["secure"] and not tls_port:
        node.fail("secure channels need tlsPort")
    values["tls_channel"] = tuple(channels["secure"])
    values["plaintext_channel"] = tuple(channels["insecure"])


def _port(node: Node, attribute: str) -> int | None:
    """The number, or None for one that is left out or to be chosen."""
    return None if node.get(attribute) == "-1" else node.number(attribute)


def _read_password(node: Node, values: dict[str, object]) -> None:
    if node.get("passwdValidTo") is not None:
        node.fail("passwdValidTo is not served: the password would not expire")
    password = node.get("passwd")
    if password:
        values["password"] = password
    else:
        values["disable_ticketing"] = True


def _read_features(node: Node, values: dict[str, object]) -> None:
    if (clipboard := node.child("clipboard")) is not None:
        values["disable_copy_paste"] = not clipboard.flag("copypaste", True)
    if (files := node.child("filetransfer")) is not None:
        values["disable_agent_file_xfer"] = not files.flag("enable", True)
    if (mouse := node.child("mouse")) is not None:
        values["agent_mouse"] = mouse.word("mode", ("client", "server")) == "client"
