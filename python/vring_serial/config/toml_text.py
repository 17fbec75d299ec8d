"""Writes a service down as the TOML that :mod:`.toml_file` reads, with all that was chosen."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping

from vring_serial.chardev import Options
from vring_serial.config.vms import ServiceConfig, VmConfig
from vring_serial.errors import ConfigError

_BARE = re.compile(r"[A-Za-z0-9_-]+")
#: Of a service, and of a VM: written down if they are not as they are when nothing is said.
_SERVICE = (
    *("workers", "socket_mode", "socket_owner", "socket_group"),
    *("pid_file", "log_level", "log_file", "json_log"),
)
_SETTINGS = (
    *("connect", "inband_notifications", "busy_poll", "agent_socket"),
    *("transitional", "packed", "vectors", "sandbox", "user", "reach", "qmp"),
)


def as_toml(service: ServiceConfig) -> str:
    """Return the text. Raises ConfigError for a path that is no text."""
    settings = {key: list(getattr(service, key)) or None for key in ("qmp", "metrics")}
    parts = [_lines(settings | {key: getattr(service, key) for key in _SERVICE})]
    for vm in service.vms:
        parts += _vm(vm)
    return "\n".join(part for part in parts if part)


def _vm(vm: VmConfig) -> list[str]:
    head = f"vm.{_key(vm.name)}"
    settings: dict[str, object] = {
        vm.protocol: vm.sockets[0] if len(vm.sockets) == 1 else list(vm.sockets)
    }
    defaults = {field.name: field.default for field in dataclasses.fields(vm)}
    for key in _SETTINGS:
        if (value := getattr(vm, key)) != defaults[key]:
            settings[key] = value
    parts = [_table(head, settings)]
    written: set[str] = set()  # chardevs that several ports may share
    if (spice := vm.topology.spice) is not None:
        required = {} if spice.explicit else {"required": False}
        parts.append(_table(f"{head}.spice", required | _given(spice.options)))
    for controller in vm.topology.controllers:
        values = {
            "index": controller.index,
            "max-ports": controller.max_ports,
            "address": None if controller.address is None else str(controller.address),
            "vectors": controller.vectors,
            "transitional": controller.transitional,
            "packed": controller.packed,
        }
        parts.append(_table(f"[{head}.controller]", values))
        for port in controller.ports:
            if port.chardev.id not in written:
                written.add(port.chardev.id)
                chardev = {"backend": port.chardev.kind} | _given(port.chardev.options)
                chardev |= {"mux": True} if port.chardev.mux else {}
                chardev |= _given(port.chardev.log)
                parts.append(_table(f"{head}.chardev.{_key(port.chardev.id)}", chardev))
            values = {"chardev": port.chardev.id, "nr": port.nr, "controller": controller.index}
            values |= {"name": port.name} if port.name else {}
            kind = "console" if port.console else "port"
            parts.append(_table(f"[{head}.{kind}]", values))
    return parts


def _given(options: Options) -> dict[str, object]:
    """Return the options that are not as they are when nothing is said."""
    return {
        key: getattr(options, field.name)
        for key, field in options.keys().items()
        if getattr(options, field.name) != field.default
    }


def _table(name: str, values: Mapping[str, object]) -> str:
    return f"[{name}]\n{_lines(values)}"


def _lines(values: Mapping[str, object]) -> str:
    return "".join(
        f"{key.replace('_', '-')} = {_value(value)}\n"
        for key, value in values.items()
        if value is not None
    )


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return _quoted(value)
    assert isinstance(value, (list, tuple))
    return f"[{', '.join(_value(item) for item in value)}]"


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _quoted(name)


def _quoted(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{text!r} is not UTF-8, and cannot stand in a file") from None
    # Like JSON's strings, but for DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
