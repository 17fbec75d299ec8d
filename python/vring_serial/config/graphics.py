"""``<graphics type='spice'>`` of a domain XML: the SPICE server's addresses and access rules."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from vring_serial.config.topology import SpiceConfig
from vring_serial.config.words import shorten
from vring_serial.config.xml_node import Node
from vring_serial.errors import ConfigError
from vring_serial.spice.options import CHANNELS, SpiceOptions

#: Where libvirt listens, and looks for certificates, when nothing is said.
DEFAULT_ADDRESS = "127.0.0.1"
X509_DIRECTORY = "/etc/pki/libvirt-spice"

_MODES = ("any", "insecure", "secure")
_LISTEN_TYPES = ("address", "network", "none", "socket")
#: As libvirt writes it; the time is UTC.
_VALID_TO = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}")


def read_graphics(
    nodes: Sequence[Node], socket_path: str, warnings: list[str]
) -> SpiceConfig | None:
    """Return the server that a domain's graphics elements declare; None if it listens nowhere.

    Settings of display and sound (image, jpeg, streaming, gl, …) are ignored.

    Args:
        nodes: the ``<graphics>`` elements, of any type.
        socket_path: path of a unix socket for which the domain has none.
        warnings: gets a line for each setting with a surprising effect.

    Raises:
        ConfigError: the elements are invalid.
    """
    spice = [node for node in nodes if node.get("type") == "spice"]
    if not spice:
        return None
    node = spice[0]
    for other in spice[1:]:
        other.fail(f"a domain has one SPICE server, and there is one already ({node.where})")
    values: dict[str, object] = {}
    listen = node.child("listen")
    kind = listen.word("type", _LISTEN_TYPES) if listen is not None else "address"
    if kind == "none":
        return None
    if kind == "socket":
        assert listen is not None
        values.update(unix=True, addr=listen.get("socket") or socket_path)
    else:
        values["addr"] = _read_address(node, listen, kind)
        if not _read_ports(node, values):
            return None
    _read_channels(node, values)
    _read_password(node, values, warnings)
    _read_features(node, values)
    try:
        return SpiceConfig(SpiceOptions(**values), node.where)  # type: ignore[arg-type]
    except ConfigError as error:
        node.fail(f"{error.where}: {error.why}" if error.where else error.why)


def _read_address(node: Node, listen: Node | None, kind: str) -> str:
    """Return the address; an empty one counts as omitted. Only live XML has a network's."""
    given = (listen.get("address") if listen is not None else None) or node.get("listen")
    if kind == "network" and not given:
        assert listen is not None
        listen.fail("networks are libvirt's; name the address, as a running domain's XML does")
    return given or DEFAULT_ADDRESS


def _read_ports(node: Node, values: dict[str, object]) -> bool:
    """Read the ports, and return whether the server listens: 0 is no port, -1 a chosen one.

    Autoport chooses the ports that are needed: secure channels need one with TLS.
    """
    port, tls_port = _port(node, "port"), _port(node, "tlsPort")
    autoport = node.flag("autoport") or (port == -1 and tls_port == -1)
    if not autoport and node.get("autoport") is None and port is None and tls_port is None:
        autoport = True  # libvirt chooses a port for an element that says nothing
    if autoport:
        modes = _modes(node)
        values["autoport"] = not set(modes.values()) <= {"secure"}
        values["tls_autoport"] = "secure" in modes.values()
    else:
        values["autoport"] = port == -1
        values["port"] = max(port or 0, 0)
        values["tls_autoport"] = tls_port == -1
        values["tls_port"] = max(tls_port or 0, 0)
    if values["tls_autoport"] or values.get("tls_port"):
        values["x509_dir"] = X509_DIRECTORY
    return any(values.get(key) for key in ("autoport", "port", "tls_autoport", "tls_port"))


def _port(node: Node, attribute: str) -> int | None:
    """Return the number; -1 if libvirt would choose it; None if it is omitted."""
    return -1 if node.get(attribute) == "-1" else node.number(attribute)


def _modes(node: Node) -> dict[str, str]:
    """Return the mode of every named channel, and of ``default`` for the others."""
    modes = {"default": node.word("defaultMode", _MODES, "any")}
    for channel in node.children("channel"):
        modes[channel.word("name", CHANNELS[:-1])] = channel.word("mode", _MODES)
    return modes


def _read_channels(node: Node, values: dict[str, object]) -> None:
    modes = _modes(node)
    secure = tuple(name for name, mode in modes.items() if mode == "secure")
    insecure = tuple(name for name, mode in modes.items() if mode == "insecure")
    if secure and not (values.get("tls_port") or values.get("tls_autoport")):
        node.fail("secure channels need a port with TLS: tlsPort, or autoport='yes'")
    if insecure and not any(values.get(key) for key in ("unix", "port", "autoport")):
        node.fail("insecure channels need a port without TLS: port, or autoport='yes'")
    values.update(tls_channel=secure, plaintext_channel=insecure)


def _read_password(node: Node, values: dict[str, object], warnings: list[str]) -> None:
    """Read the password: without one all clients may connect, with an empty or expired one none."""
    password = node.get("passwd")
    if password is None:
        values["disable_ticketing"] = True
        return
    values["password"] = password
    if not password:
        warnings.append(f"{node.where}: passwd is empty: no SPICE client is let in")
    if (valid_to := node.get("passwdValidTo")) is not None:
        seconds = _seconds(node, valid_to)
        values["password_valid_to"] = seconds
        if seconds <= time.time():
            warnings.append(f"{node.where}: passwd has expired: no SPICE client is let in")


def _seconds(node: Node, text: str) -> int:
    try:
        if not _VALID_TO.fullmatch(text):
            raise ValueError
        return max(int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()), 1)
    except ValueError:
        node.fail(f"passwdValidTo: {shorten(text)} is no time such as 2030-01-31T12:00:00")


def _read_features(node: Node, values: dict[str, object]) -> None:
    if (clipboard := node.child("clipboard")) is not None:
        values["disable_copy_paste"] = not clipboard.flag("copypaste", True)
    if (files := node.child("filetransfer")) is not None:
        values["disable_agent_file_xfer"] = not files.flag("enable", True)
    if (mouse := node.child("mouse")) is not None:
        values["agent_mouse"] = mouse.word("mode", ("client", "server")) == "client"
