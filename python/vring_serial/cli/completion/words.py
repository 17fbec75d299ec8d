"""Completion of what options take: paths, and lists of ``key=value`` as QEMU has them.

Whoever presses Tab wants to see no error: what cannot be read, or makes no sense, completes to
nothing. All functions return whole values, each of which begins with what was typed.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Callable, Collection, Iterable, Sequence

import click

from vring_serial.chardev import LogOptions, Options, kinds, options_type
from vring_serial.config.qemu_options import COMMON_KEYS, PORT_KEYS, split
from vring_serial.errors import ConfigError
from vring_serial.spice.options import SpiceOptions

#: Returns the values of a key, which begin with what was typed of one.
Values = Callable[[str, str], Iterable[str]]

_PATH_KEYS = ("path", "input-path", "logfile", "addr")
_SWITCH = ("on", "off")
#: No directory is listed further.
_MOST_NAMES = 10_000


def complete_path(typed: str) -> list[str]:
    """Return the files and directories whose paths begin with ``typed``; directories end in /."""
    directory, name = os.path.split(typed)
    found = []
    try:
        with os.scandir(directory or ".") as entries:
            for entry, _ in zip(entries, range(_MOST_NAMES), strict=False):
                # Hidden ones only if they are asked for; a line of the answer is one name.
                hidden = entry.name.startswith(".") and not name.startswith(".")
                if entry.name.startswith(name) and entry.name.isprintable() and not hidden:
                    path = typed[: len(typed) - len(name)] + entry.name
                    found.append(f"{path}/" if entry.is_dir() else path)
    except (OSError, ValueError):
        return []
    return sorted(found)


def complete_files(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Complete an argument that is a file."""
    return complete_path(incomplete)


def complete_chardev(
    _ctx: click.Context,
    _param: click.Parameter,
    incomplete: str,
    *,
    known: Collection[str] = (),
    ids: Callable[[], Iterable[str]] = tuple,
) -> list[str]:
    """Complete ``KIND,id=ID,KEY=VALUE,…``.

    Args:
        known: kinds; empty for all.
        ids: returns ids to choose from.
    """
    before, last = _cut(incomplete)
    if not before:
        return [f"{kind}," for kind in known or sorted(kinds()) if kind.startswith(last)]
    kind = before.partition(",")[0]
    try:
        own = options_type(kind)
    except ConfigError:
        return []
    values = _values_of(own, LogOptions)

    def value(key: str, typed: str) -> Iterable[str]:
        if key == "mux":
            return _SWITCH
        return ids() if key == "id" else values(key, typed)

    return complete_item(incomplete, (*COMMON_KEYS, *own.keys(), *LogOptions.keys()), value)


def complete_port(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Complete ``chardev=ID,KEY=VALUE``, with the chardevs of this line that can have a port."""

    def value(key: str, _typed: str) -> Iterable[str]:
        if key != "chardev":
            return ()
        used = _values_in((*_given(ctx, "ports"), *_given(ctx, "consoles")), "chardev")
        given = [dict(_pairs(text)) for text in _given(ctx, "chardevs")]
        free = [one for one in given if one.get("id") not in used or one.get("mux", "off") != "off"]
        return [id for one in free if (id := one.get("id"))]

    return complete_item(incomplete, PORT_KEYS, value)


def complete_spice(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the keys of ``--spice``, its switches and its files."""
    return complete_item(incomplete, tuple(SpiceOptions.keys()), _values_of(SpiceOptions))


def complete_sandbox(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Complete ``on|off|LAYER=on|off,…``."""
    from vring_serial.service.sandbox import LAYERS, LIMITS

    def value(key: str, _typed: str) -> Iterable[str]:
        return _SWITCH if key in LAYERS else ()

    before, last = _cut(incomplete)
    whole = [] if before else [word for word in _SWITCH if word.startswith(last)]
    return whole + complete_item(incomplete, (*LAYERS, *LIMITS), value)


def complete_monitor(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Complete ``unix:PATH|tcp:…,server=on,wait=off``."""
    before, last = _cut(incomplete)
    if before:
        return complete_item(incomplete, ("server", "wait"), lambda _key, _typed: _SWITCH)
    if last.startswith("unix:"):
        return [f"unix:{_doubled(path)}" for path in complete_path(_single(last[5:]))]
    return [word for word in ("unix:", "tcp:") if word.startswith(last)]


def complete_item(incomplete: str, keys: Sequence[str], value: Values) -> list[str]:
    """Complete the last item of ``key=value,…``: a key that was not given, or the value of one."""
    before, last = _cut(incomplete)
    key, equals, typed = last.partition("=")
    if equals:
        typed = _single(typed)
        found = (one for one in value(key, typed) if one.startswith(typed))
        return [f"{before}{key}={_doubled(one)}" for one in found]
    given = {key for key, _ in _pairs(before)}
    return [f"{before}{one}=" for one in keys if one.startswith(key) and one not in given]


def _cut(text: str) -> tuple[str, str]:
    """Return an option's finished items, with their commas, and the last one."""
    ends = [run.end() for run in re.finditer(",+", text) if len(run[0]) % 2]
    end = ends[-1] if ends else 0
    return text[:end], text[end:]


def _values_of(*options: type[Options]) -> Values:
    """Return the function that knows the values of these: of switches, and of paths."""
    types = {
        key: typing.get_type_hints(each)[field.name]
        for each in options
        for key, field in each.keys().items()
    }

    def value(key: str, typed: str) -> Iterable[str]:
        kind = types.get(key)
        if bool in (typing.get_args(kind) or (kind,)):
            return _SWITCH
        if kind is str and (key in _PATH_KEYS or key.endswith(("-file", "-dir"))):
            return complete_path(typed)
        return ()

    return value


def _given(ctx: click.Context, name: str) -> Iterable[str]:
    given: Iterable[str] = ctx.params.get(name) or ()
    return given


def _values_in(options: Iterable[str], key: str) -> list[str]:
    """Return the values of ``key`` in several options, in their order."""
    return [value for text in options for name, value in _pairs(text) if name == key and value]


def _pairs(text: str) -> list[tuple[str, str | None]]:
    try:
        return split(text)
    except ConfigError:
        return []


def _single(value: str) -> str:
    return value.replace(",,", ",")


def _doubled(value: str) -> str:
    return value.replace(",", ",,")
