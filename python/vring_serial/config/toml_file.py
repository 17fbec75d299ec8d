"""Reads the file of ``--config``: TOML, with virtual machines as the unit.

    pid-file = "/run/vring.pid"

    [vm.desktop]
    vfio-user = "/run/vring/desktop.sock"

    [vm.desktop.chardev.agent]
    backend = "spicevmc"

    [[vm.desktop.port]]
    chardev = "agent"

Keys are the names of the options of ``vring serve``. A chardev's keys are those of ``--chardev``,
those of ``spice`` are those of ``--spice``; values have TOML's types.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from vring_serial.chardev import LogOptions, Options, kinds, options_type
from vring_serial.config import domain_xml, toml_lines
from vring_serial.config.draft import Draft, DraftController, DraftPort, check_max_ports
from vring_serial.config.qemu_options import SIZES, UNSERVED_KEYS
from vring_serial.config.topology import (
    ChardevConfig,
    PciAddress,
    SpiceConfig,
    Topology,
    check_domain_name,
    check_mux,
)
from vring_serial.config.unserved import UNSERVED
from vring_serial.config.vms import WORKERS, ServiceConfig, VmConfig
from vring_serial.config.words import parse_size, shorten, suggest
from vring_serial.errors import ConfigError
from vring_serial.spice.options import UNSERVED_KEYS as UNSERVED_SPICE_KEYS
from vring_serial.spice.options import SpiceOptions

LOG_LEVELS = ("debug", "info", "warning", "error")
_AT = re.compile(r" \(at (?:line ([0-9]+), column [0-9]+|end of document)\)")
_TYPES = {bool: "true or false", int: "a number", str: "a string", dict: "a table", list: "a list"}

T = TypeVar("T")


#: Returns what is in a file.
Read = Callable[[str], bytes]


def load(path: str, read: Read = domain_xml.read_file) -> ServiceConfig:
    """Return the service that a file declares; ``-`` is standard input.

    Args:
        path: the file.
        read: returns what is in a file; see :class:`vring_serial.config.inputs.Inputs`.

    Raises:
        ResourceError: the file cannot be read.
        ConfigError: it is no TOML, or declares no such service; the message names file, line, key.
    """
    return parse(read(path), file="standard input" if path == "-" else path, read=read)


def parse(data: bytes, *, file: str = "config", read: Read = domain_xml.read_file) -> ServiceConfig:
    """Do as :func:`load`, for a file in memory; ``file`` is its name in messages."""
    try:
        text = data.decode().replace("\r\n", "\n")
        content = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError("not TOML: not UTF-8", f"{file}:{line}") from None
    except tomllib.TOMLDecodeError as error:
        at = _AT.search(str(error))
        why = f"not TOML: {_AT.sub('', str(error))}"
        line = int(at[1]) if at and at[1] else text.rstrip().count("\n") + 1
        raise ConfigError(why, f"{file}:{line}") from None
    except RecursionError:
        raise ConfigError("not TOML: nested too deeply", file) from None
    return _read_service(_Table(content, (), file, toml_lines.find_lines(text)), read)


def vm_text(name: str, table: dict[str, Any]) -> str:
    """Return a VM's table, as JSON has it, on one line of ASCII. Raises ConfigError."""
    try:
        return json.dumps({name: table}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"no description of a VM: {error}", f"vm.{shorten(name)[1:-1]}") from None


def vm_from_text(text: str) -> VmConfig:
    """Return the VM of :func:`vm_text`; nothing is read from a file. Raises ConfigError."""

    def read(path: str) -> bytes:
        raise ConfigError("no file is read while the service runs; give ports and chardevs", path)

    (vm,) = _read_service(_Table({"vm": json.loads(text)}, (), "vm-add", {}), read).vms
    return vm


class _Table:
    """A table whose keys are taken one by one; :meth:`end` refuses those that are left."""

    def __init__(
        self,
        content: dict[str, Any],
        path: toml_lines.Path,
        file: str,
        lines: dict[toml_lines.Path, int],
    ) -> None:
        self._content = dict(content)
        self._known: list[str] = []
        self._path = path
        self._file = file
        self._lines = lines

    def where(self, *keys: str | int) -> str:
        """Return the place of a key in it, or its own: ``vms.toml:3: vm.a.user``."""
        path = (*self._path, *keys)
        while path and path not in self._lines:
            path = path[:-1]
        line = f":{self._lines[path]}" if path else ""
        name = "".join(
            f"[{key + 1}]" if isinstance(key, int) else f".{key}" for key in (*self._path, *keys)
        )
        return f"{self._file}{line}: {name[1:]}" if name else f"{self._file}{line}"

    def fail(self, why: str, *keys: str | int) -> NoReturn:
        raise ConfigError(why, self.where(*keys))

    def value(self, key: str) -> Any:
        """Return what a key has, of whatever type, and leave it there."""
        return self._content.get(key)

    def take(self, key: str, type_: type[T], default: T | None = None) -> T | None:
        """Return the value of a key, or the default. Raises ConfigError for another type."""
        self._known.append(key)
        if key not in self._content:
            return default
        value = self._content.pop(key)
        if type(value) is not type_:
            self.fail(f"is {_TYPES[type_]}, not {_shown(value)}", key)
        return value

    def text(self, key: str, *, numbers: bool = False) -> str | None:
        """Return a string that is not empty; ``numbers`` may stand for strings."""
        if numbers and type(number := self.value(key)) is int:
            self._content[key] = str(number)
        value = self.take(key, str)
        if value == "":
            self.fail("is empty", key)
        return value

    def word(self, key: str, words: Iterable[str]) -> str | None:
        value = self.take(key, str)
        if value is not None and value not in words:
            self.fail(f"there is no {shorten(value)}; {suggest(value, words)}", key)
        return value

    def number(self, key: str, least: int = 0, most: int = 2**31 - 1) -> int | None:
        value = self.take(key, int)
        if value is not None and not least <= value <= most:
            self.fail(f"{value} is not from {least} to {most}", key)
        return value

    def texts(self, key: str, *, numbers: bool = False) -> tuple[str, ...]:
        """Return strings: a list of them, or one alone; ``numbers`` may stand for strings."""
        found = self._content.get(key, [])
        is_list = isinstance(found, list)
        self._known.append(key)
        self._content.pop(key, None)
        for i, value in enumerate(found if is_list else [found]):
            place = (key, i) if is_list else (key,)
            if value == "":
                self.fail("is empty", *place)
            if not isinstance(value, str) and not (numbers and type(value) is int):
                what = f"{'a number or ' if numbers else ''}a string"
                either = "" if is_list else ", or a list of them"
                self.fail(f"is {what}{either}, not {_shown(value)}", *place)
        return tuple(str(value) for value in (found if is_list else [found]))

    def wheres(self, key: str, values: tuple[str, ...]) -> dict[tuple[str, int], str]:
        """Return the places of the values of :meth:`texts`."""
        return {
            (key, i): self.where(key, i)
            if (*self._path, key, i) in self._lines
            else self.where(key)
            for i in range(len(values))
        }

    def table(self, key: str) -> _Table | None:
        content = self.take(key, dict)
        return None if content is None else self._inner(content, key)

    def tables(self, key: str) -> dict[str, _Table]:
        """Return the tables of a table of them."""
        found = {}
        for name, content in (self.take(key, dict) or {}).items():
            if not isinstance(content, dict):
                self.fail(f"is a table, not {_shown(content)}", key, name)
            found[name] = self._inner(content, key, name)
        return found

    def each(self, key: str) -> list[_Table]:
        """Return the tables of a list of them."""
        found = []
        for i, content in enumerate(self.take(key, list) or []):
            if not isinstance(content, dict):
                self.fail(f"is a table, not {_shown(content)}", key, i)
            found.append(self._inner(content, key, i))
        return found

    def rest(self, keys: Iterable[str] | None = None) -> dict[str, Any]:
        """Take all keys that are left, or those of them that are in ``keys``."""
        wanted = self._content.keys() if keys is None else self._content.keys() & set(keys)
        return {key: self._content.pop(key) for key in list(self._content) if key in wanted}

    def end(self) -> None:
        for key in self._content:
            self.fail(f"there is no such key; {suggest(key, self._known)}", key)

    def _inner(self, content: dict[str, Any], *keys: str | int) -> _Table:
        return _Table(content, (*self._path, *keys), self._file, self._lines)


def _shown(value: object) -> str:
    """Say what a value is, without quoting it: it may be a password."""
    return _TYPES.get(type(value), "a date or a fraction")


def _read_service(table: _Table, read: Read) -> ServiceConfig:
    vms = tuple(_read_vm(name, vm, read) for name, vm in table.tables("vm").items())
    qmp, metrics = table.texts("qmp"), table.texts("metrics", numbers=True)
    service = ServiceConfig(
        vms,
        qmp=qmp,
        metrics=metrics,
        places=table.wheres("qmp", qmp) | table.wheres("metrics", metrics),
        workers=table.word("workers", WORKERS),
        socket_mode=_socket_mode(table),
        socket_owner=table.text("socket-owner", numbers=True),
        socket_group=table.text("socket-group", numbers=True),
        pid_file=table.text("pid-file"),
        log_level=table.word("log-level", LOG_LEVELS),
        log_file=table.text("log-file"),
        json_log=table.take("json-log", bool),
    )
    table.end()
    return service


def _socket_mode(table: _Table) -> str | None:
    """Return the mode, as text: TOML's 660 is no octal number, and its 0o660 is 432."""
    if isinstance(table.value("socket-mode"), int):
        table.fail('is a string such as "0660", not a number', "socket-mode")
    return table.text("socket-mode")


def _read_vm(name: str, table: _Table, read: Read) -> VmConfig:
    check_domain_name(name, table.where())
    vhost, vfio = table.texts("vhost-user"), table.texts("vfio-user")
    if vhost and vfio:
        table.fail("a VM has either vhost-user or vfio-user sockets", "vfio-user")
    if not (vhost or vfio):
        table.fail("needs vhost-user or vfio-user: a socket for each controller")
    settings: dict[str, Any] = {
        key.replace("-", "_"): table.take(key, bool, False)
        for key in ("connect", "inband-notifications", "transitional", "packed")
    }
    settings |= {
        "busy_poll": table.number("busy-poll", most=1_000_000) or 0,
        "vectors": table.number("vectors"),
        "agent_socket": table.text("agent-socket"),
        "sandbox": table.text("sandbox"),
        "user": table.text("user", numbers=True),
        "reach": table.texts("reach"),
        "qmp": table.texts("qmp"),
    }
    keys = (
        *("vhost-user", "vfio-user", "agent-socket", "sandbox", "user", "connect", "vectors"),
        "qmp",
    )
    places = {key: table.where(key) for key in (*keys, "inband-notifications", "transitional")}
    topology = _read_topology(name, table, (vhost or vfio)[0], read)
    table.end()
    places["name"] = table.where()
    return VmConfig(topology, vhost or vfio, bool(vfio), **settings, places=places)


def _read_topology(name: str, table: _Table, socket: str, read: Read) -> Topology:
    draft = Draft()
    draft.where = table.where()
    if (max_ports := table.number("max-ports")) is not None:
        check_max_ports(max_ports, table.where("max-ports"))
        draft.max_ports = max_ports
    domain = table.text("domain")
    directory = table.text("channel-directory") or str(Path(socket).parent)
    if domain == "-":
        table.fail("standard input is no domain of a file's", "domain")
    if domain is not None:
        data = read(domain)
        domain_xml.read(draft, data, file=domain, channel_directory=directory)
    draft.name = name
    addresses: dict[int, PciAddress] = {}
    for controller in table.each("controller"):
        _read_controller(draft, controller, addresses)
    _read_ports(draft, table)
    if (spice := table.table("spice")) is not None:
        draft.spice = _read_spice(spice)
    topology = draft.finish()
    controllers = tuple(
        dataclasses.replace(c, address=addresses.get(c.index, c.address))
        for c in topology.controllers
    )
    return dataclasses.replace(topology, controllers=controllers)


def _read_controller(draft: Draft, table: _Table, addresses: dict[int, PciAddress]) -> None:
    index = table.number("index") or 0
    max_ports = table.number("max-ports")
    if max_ports is not None:
        check_max_ports(max_ports, table.where("max-ports"))
    text = table.text("address")
    draft.add_controller(
        DraftController(
            index,
            table.where(),
            max_ports=max_ports or 0,
            transitional=table.take("transitional", bool),
            packed=table.take("packed", bool),
            vectors=table.number("vectors"),
        )
    )
    if text is not None:
        try:
            address = PciAddress.parse(text)
        except ValueError as error:
            table.fail(str(error), "address")
        if address in addresses.values():
            table.fail(f"PCI address {address} is taken already", "address")
        addresses[index] = address
    table.end()


def _read_ports(draft: Draft, table: _Table) -> None:
    chardevs: dict[str, ChardevConfig] = {}
    for id, chardev in table.tables("chardev").items():
        if not id or not id.isprintable():
            chardev.fail(f"{shorten(id)} is no id of a chardev")
        chardevs[id] = _read_chardev(id, chardev)
        draft.claim_chardev(chardevs[id])
    unused = dict(chardevs)
    for kind in ("console", "port"):
        for port in table.each(kind):
            wanted = port.text("chardev")
            if wanted is None:
                port.fail("needs chardev")
            if wanted not in chardevs:
                why = f"there is no chardev {shorten(wanted)}; {suggest(wanted, chardevs)}"
                port.fail(why, "chardev")
            if unused.pop(wanted, None) is None and not chardevs[wanted].mux:
                port.fail(f"chardev {wanted} is in use already", "chardev")
            draft.add_port(
                DraftPort(
                    where=port.where(),
                    chardev=chardevs[wanted],
                    console=kind == "console",
                    name=port.take("name", str) or "",
                    controller=port.number("controller"),
                    nr=port.number("nr"),
                )
            )
            port.end()
    for left in unused.values():
        raise ConfigError("no port or console uses it", left.where)


def _read_chardev(id: str, table: _Table) -> ChardevConfig:
    kind = table.text("backend")
    if kind is None:
        table.fail(f"needs backend; {suggest('', kinds())}")
    if kind in UNSERVED:
        table.fail(f"{kind} is not served: {UNSERVED[kind]}", "backend")
    if kind not in kinds():
        table.fail(f"there is no chardev {shorten(kind)}; {suggest(kind, kinds())}", "backend")
    unserved = dict.fromkeys(UNSERVED_KEYS, "")
    log_keys = LogOptions.keys()
    others = ("backend", "mux", *log_keys)
    if mux := bool(table.take("mux", bool, False)):
        check_mux(kind, table.where("mux"))
    log = _make_options(table, kind, LogOptions, {}, keys=log_keys)
    options = _make_options(table, kind, options_type(kind), unserved, others)
    return ChardevConfig(kind, id, options, table.where(), log, mux)


def _read_spice(table: _Table) -> SpiceConfig:
    required = table.take("required", bool, True)
    options = _make_options(table, "spice", SpiceOptions, UNSERVED_SPICE_KEYS, ("required",))
    return SpiceConfig(options, table.where(), explicit=bool(required))


def _make_options(
    table: _Table,
    noun: str,
    wanted: Callable[..., Any] | type[Options],
    unserved: Mapping[str, str],
    others: Iterable[str] = (),
    keys: Iterable[str] | None = None,
) -> Any:
    """Return the options that a table's rest or ``keys`` of it have. Messages quote no value."""
    fields = typing.cast("type[Options]", wanted).keys()
    types = typing.get_type_hints(wanted)
    arguments: dict[str, object] = {}
    for key, value in table.rest(keys).items():
        if key in unserved:
            why = f": {unserved[key]}" if unserved[key] else ""
            table.fail(f"QEMU's {key} is not served{why}", key)
        if key not in fields:
            table.fail(f"{noun} has no {shorten(key)}; {suggest(key, [*fields, *others])}", key)
        name = fields[key].name
        arguments[name] = _value(table, key, value, types[name])
    try:
        return wanted(**arguments)
    except ConfigError as error:
        keys = [error.where] if error.where in fields else []
        table.fail(error.why, *keys)


def _value(table: _Table, key: str, value: Any, type_: object) -> object:
    """Return a value of an option's type; a size may be a string such as ``64K``."""
    members = typing.get_args(type_) or (type_,)
    if typing.get_origin(type_) is tuple:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            table.fail("is a list of strings", key)
        return tuple(values)
    if key in SIZES and isinstance(value, str):
        try:
            return parse_size(value)
        except ValueError as error:
            table.fail(str(error), key)
    wanted = next(t for t in (bool, int, str) if t in members)
    if type(value) is not wanted:
        table.fail(f"is {_TYPES[wanted]}, not {_shown(value)}", key)
    return value
