"""QEMU's option syntax: ``--chardev``, ``--port``, ``--console``, ``--max-ports``, ``--spice``.

An option is a comma-separated list of ``key=value``; ``,,`` is a comma in a value. A key alone
means ``on``, with the prefix ``no`` it means ``off``. The keys of a chardev are those of QEMU's
``-chardev`` and of the option class of its kind, the keys of a port are :data:`PORT_KEYS`, and the
keys of ``--spice`` are QEMU's and those of :class:`vring_serial.spice.SpiceOptions`.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from vring_serial.chardev import LogOptions, Options, kinds, options_type
from vring_serial.config.draft import Draft, DraftPort, check_max_ports
from vring_serial.config.topology import ChardevConfig, SpiceConfig, Topology, check_mux
from vring_serial.config.unserved import UNSERVED
from vring_serial.config.words import parse_bool, parse_int, parse_size, shorten, suggest
from vring_serial.errors import ConfigError
from vring_serial.spice.options import UNSERVED_KEYS as UNSERVED_SPICE_KEYS
from vring_serial.spice.options import SpiceOptions

PORT_KEYS = ("chardev", "controller", "name", "nr")

#: Keys of QEMU's ``-chardev`` that are known but not supported.
UNSERVED_KEYS = {
    *("delay", "fd"),
    *("telnet", "tls-authz", "tls-creds", "tn3270", "websocket"),
}
#: Keys of every kind, beside those of its log.
COMMON_KEYS = ("id", "mux")
#: Keys for which an empty value is valid: every address, no name. For all others it is an error,
#: such as an unset shell variable.
_MAY_BE_EMPTY = {"addr", "host", "localaddr", "name"}
#: Keys whose values may have a unit, such as 64K.
SIZES = {"size", "scrollback", "logsize"}
#: QEMU's older names of kinds.
_ALIASES = {"memory": "ringbuf", "tty": "serial"}
#: QEMU's rule for ids.
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,127}")
#: No option of a sane command line is longer.
MAX_OPTION_LENGTH = 65536


@dataclasses.dataclass(frozen=True, slots=True)
class QemuOptions:
    """The options of the command line, each group in its order.

    Attributes:
        chardevs: the values of ``--chardev``.
        ports: the values of ``--port``.
        consoles: the values of ``--console``.
        max_ports: ports of controllers that do not say; None if the option was not given.
        spice: the value of ``--spice``; None if the option was not given.
    """

    chardevs: Sequence[str] = ()
    ports: Sequence[str] = ()
    consoles: Sequence[str] = ()
    max_ports: int | None = None
    spice: str | None = dataclasses.field(default=None, repr=False)


def parse(
    chardevs: Sequence[str] = (),
    ports: Sequence[str] = (),
    consoles: Sequence[str] = (),
    max_ports: int | None = None,
    spice: str | None = None,
) -> Topology:
    """Return the topology of options alone; raise ConfigError with option, key and cause."""
    draft = Draft()
    read(draft, QemuOptions(chardevs, ports, consoles, max_ports, spice))
    return draft.finish()


def read(draft: Draft, options: QemuOptions) -> None:
    """Add the configuration in ``options`` to ``draft``. Raises ConfigError, as :func:`parse`."""
    if options.max_ports is not None:
        check_max_ports(options.max_ports, "--max-ports")
        draft.max_ports = options.max_ports
    if options.spice is not None:
        draft.spice = _parse_spice(options.spice)
    chardevs = [parse_chardev(text) for text in options.chardevs]
    for chardev in chardevs:
        draft.claim_chardev(chardev)
    known = {chardev.id: chardev for chardev in chardevs}
    used: dict[str, str] = {}
    for flag, texts in (("--console", options.consoles), ("--port", options.ports)):
        for text in texts:
            draft.add_port(_parse_port(flag, text, known, used))
    for chardev in chardevs:
        if chardev.id not in used:
            raise ConfigError(f"no --port or --console uses chardev {chardev.id}", chardev.where)


def split(text: str, *, repeated: Collection[str] = ()) -> list[tuple[str, str | None]]:
    """Return keys and values in order; the value of a key alone is None.

    Args:
        repeated: keys that may be given more than once.

    Raises:
        ConfigError: the text is too long, or a key is missing or given twice; ``where`` is empty.
    """
    if len(text) > MAX_OPTION_LENGTH:
        raise ConfigError(f"longer than {MAX_OPTION_LENGTH} characters")
    pairs: list[tuple[str, str | None]] = []
    seen = set()
    for item in _split_items(text):
        key, equals, value = item.partition("=")
        if not key:
            raise ConfigError("a key is missing: an option is key=value,key=value…")
        if key in seen and key not in repeated:
            raise ConfigError(f"{shorten(key)} is given twice")
        seen.add(key)
        pairs.append((key, value if equals else None))
    return pairs


def _split_items(text: str) -> list[str]:
    """Split at single commas; doubled ones become one. A comma at the end adds nothing."""
    items = [""]
    for run in re.split(r"(,+)", text):
        if not run.startswith(","):
            items[-1] += run
            continue
        items[-1] += "," * (len(run) // 2)
        if len(run) % 2:
            items.append("")
    if len(items) > 1 and not items[-1]:
        items.pop()
    return items


def _split_option(flag: str, text: str) -> tuple[list[tuple[str, str | None]], str]:
    """Return the key-value pairs of ``text``, and the option's name for messages."""
    where = f"{flag} {shorten(text)[1:-1]}"
    try:
        return split(text), where
    except ConfigError as error:
        raise ConfigError(error.why, where) from None


def parse_chardev(text: str, *, of_any_vm: bool = False) -> ChardevConfig:
    """Return the host end of one ``--chardev``. Raises ConfigError with option, key and cause.

    Args:
        text: the option's value.
        of_any_vm: the name of a VM and a slash may precede the id.
    """
    pairs, where = _split_option("--chardev", text)
    kind = _take_kind(pairs, where)
    id = ""
    values: list[tuple[str, str | None]] = []
    for key, value in pairs:
        if key == "id":
            id = value or ""
        else:
            values.append((key, value))
    if not _ID.fullmatch(id.rpartition("/")[2] if of_any_vm else id):
        raise ConfigError(
            f"{shorten(id)} is no id: a letter, then letters, digits, '-', '.' or '_'"
            if id
            else "needs id=NAME",
            where,
        )
    for key, _ in values:
        if key in UNSERVED_KEYS:
            raise ConfigError(f"QEMU's {key} is not served", where)
    mux = _take_mux(values, where)
    if mux:
        check_mux(kind, where)
    log_keys = LogOptions.keys()
    of_log = [(key, value) for key, value in values if key.removeprefix("no") in log_keys]
    others = [pair for pair in values if pair not in of_log]
    options = _make_options(kind, options_type(kind), others, where, (*COMMON_KEYS, *log_keys))
    log = _make_options(kind, LogOptions, of_log, where)
    return ChardevConfig(kind, id, options, where, log, mux)


def _take_mux(values: list[tuple[str, str | None]], where: str) -> bool:
    """Remove ``mux`` from ``values``; return whether it is on."""
    mux = False
    for pair in [pair for pair in values if pair[0] in ("mux", "nomux")]:
        values.remove(pair)
        given = pair[1] or ("on" if pair[0] == "mux" else "off")
        mux = bool(_read_value(parse_bool, "mux", given, where))
    return mux


def _take_kind(pairs: list[tuple[str, str | None]], where: str) -> str:
    """Remove the kind from ``pairs``: the first word if it stands alone, or ``backend=KIND``."""
    if pairs[0][1] is None:
        kind = pairs.pop(0)[0]
    else:
        position = next((i for i, (key, _) in enumerate(pairs) if key == "backend"), None)
        if position is None:
            raise ConfigError(f"begins with the kind; {suggest('', kinds())}", where)
        kind = pairs.pop(position)[1] or ""
    kind = _ALIASES.get(kind, kind)
    if kind in UNSERVED:
        raise ConfigError(f"{kind} is not served: {UNSERVED[kind]}", where)
    if kind not in kinds():
        raise ConfigError(f"there is no chardev {shorten(kind)}; {suggest(kind, kinds())}", where)
    return kind


def _parse_spice(text: str) -> SpiceConfig:
    """Parse ``--spice``. Messages never quote the text: any mistyped part may be a password."""
    where, fields = "--spice", SpiceOptions.keys()
    known = {*fields, *(f"no{key}" for key in fields), *UNSERVED_SPICE_KEYS, ""}
    for number, item in enumerate(_split_items(text), 1):
        key = item.partition("=")[0]
        if key not in known:
            raise ConfigError(
                f"item {number} does not begin with a key (a comma in a value is written ,,); "
                f"{suggest(key, fields)}",
                where,
            )
        if why := UNSERVED_SPICE_KEYS.get(key):
            raise ConfigError(f"QEMU's {key} is not served: {why}", where)
    repeated = [key for key, field in fields.items() if field.default == ()]
    try:
        pairs = split(text, repeated=repeated)
    except ConfigError as error:
        raise ConfigError(error.why, where) from None
    options = _make_options("--spice", SpiceOptions, pairs, where, quote=False)
    return SpiceConfig(options, where, explicit=True)


def _make_options(
    noun: str,
    wanted: type[Options],
    pairs: list[tuple[str, str | None]],
    where: str,
    other_keys: Sequence[str] = (),
    *,
    quote: bool = True,
) -> Any:
    """Return an instance of ``wanted``.

    Args:
        other_keys: further known keys, which are not in ``pairs``.
        quote: whether messages may quote values.
    """
    fields = wanted.keys()
    types = typing.get_type_hints(wanted)
    arguments: dict[str, object] = {}
    for key, value in pairs:
        if key not in fields and value is None and key.startswith("no") and key[2:] in fields:
            key, value = key[2:], "off"
        if key not in fields:
            raise ConfigError(
                f"{noun} has no {shorten(key)}; {suggest(key, [*fields, *other_keys])}", where
            )
        name = fields[key].name
        converted = _convert(types[name], key, value, where, quote)
        if typing.get_origin(types[name]) is tuple:
            earlier = arguments.get(name, ())
            assert isinstance(earlier, tuple)
            converted = (*earlier, converted)
        elif name in arguments:
            raise ConfigError(f"{key} is given twice", where)
        arguments[name] = converted
    try:
        return wanted(**arguments)
    except ConfigError as error:
        raise ConfigError(error.why, f"{where}: {error.where}" if error.where else where) from None


def _convert(type_: object, key: str, value: str | None, where: str, quote: bool) -> object:
    """Return the value of ``key`` in its field's type; a key alone is a boolean that is on."""
    members = typing.get_args(type_) or (type_,)
    if bool in members:
        return _read_value(parse_bool, key, "on" if value is None else value, where, quote)
    if value is None:
        raise ConfigError(f"{key} needs a value: {key}=…", where)
    if int in members:
        return _read_value(parse_size if key in SIZES else parse_int, key, value, where, quote)
    if not value and key not in _MAY_BE_EMPTY:
        raise ConfigError(f"{key} is empty", where)
    return value


def _read_value(
    parser: Callable[[str], object], key: str, value: str, where: str, quote: bool = True
) -> object:
    try:
        return parser(value)
    except ValueError as error:
        why = str(error) if quote else str(error).replace(shorten(value), "the value")
        raise ConfigError(f"{key}: {why}", where) from None


def _parse_port(
    flag: str, text: str, known: Mapping[str, ChardevConfig], used: dict[str, str]
) -> DraftPort:
    """Return a port of ``--port`` or ``--console``; note in ``used`` where its chardev is used."""
    pairs, where = _split_option(flag, text)
    values: dict[str, str] = {}
    for key, value in pairs:
        if key not in PORT_KEYS:
            raise ConfigError(f"there is no {shorten(key)}; {suggest(key, PORT_KEYS)}", where)
        if value is None:
            raise ConfigError(f"{key} needs a value: {key}=…", where)
        values[key] = value
    return DraftPort(
        where=where,
        chardev=_take_chardev(values.get("chardev", ""), known, used, where),
        console=flag == "--console",
        name=values.get("name", ""),
        controller=_number(values, "controller", where),
        nr=_number(values, "nr", where),
    )


def _number(values: Mapping[str, str], key: str, where: str) -> int | None:
    if key not in values:
        return None
    number = _read_value(parse_int, key, values[key], where)
    assert isinstance(number, int)
    return number


def _take_chardev(
    id: str, known: Mapping[str, ChardevConfig], used: dict[str, str], where: str
) -> ChardevConfig:
    if not id:
        raise ConfigError("needs chardev=ID", where)
    if id in used and not known[id].mux:
        raise ConfigError(f"chardev {id} is in use already ({used[id]})", where)
    if id not in known:
        unused = [other for other in known if other not in used or known[other].mux]
        others = f"; {suggest(id, unused)}" if unused else ""
        raise ConfigError(f"no --chardev has id={shorten(id)[1:-1]}{others}", where)
    used.setdefault(id, where)
    return known[id]
