"""The schema of QMP: what arguments are checked against, and what clients may read.

As QAPI has it (QEMU's ``docs/devel/qapi-code-gen.rst``): commands and events with their
types, which ``query-qmp-schema`` lists in the form of ``qapi/introspect.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vring_serial.proto.qmp import ErrorClass, QmpError


@dataclass(frozen=True, slots=True)
class Builtin:
    """A type of JSON.

    Attributes:
        name: as QAPI has it.
        json_type: what introspection and errors call it.
        types: what the json module makes of it.
    """

    name: str
    json_type: str
    types: tuple[type, ...]


STR = Builtin("str", "string", (str,))
INT = Builtin("int", "int", (int,))
NUMBER = Builtin("number", "number", (int, float))
BOOL = Builtin("bool", "boolean", (bool,))
ANY = Builtin("any", "value", (object,))


@dataclass(frozen=True, slots=True)
class Enum:
    """One of some words.

    Attributes:
        name: of the type.
        values: the words.
    """

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Array:
    """A list.

    Attributes:
        element: the type of each element.
    """

    element: Type

    @property
    def name(self) -> str:
        """Return the name of the type."""
        return f"[{self.element.name}]"


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an object.

    Attributes:
        name: its key.
        type: of its value.
        optional: whether it may be absent.
    """

    name: str
    type: Type
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Object:
    """An object.

    Attributes:
        name: of the type.
        members: those that it always may have.
        tag: the member of an Enum type that decides which further members there are; "" for none.
        variants: those further members, by the tag's value.
        open: whether there may be members of any name.
    """

    name: str
    members: tuple[Member, ...] = ()
    tag: str = ""
    variants: Mapping[str, Object] | None = None
    open: bool = False


Type = Builtin | Enum | Array | Object

EMPTY = Object("q_empty")


@dataclass(frozen=True, slots=True)
class Command:
    """A command.

    Attributes:
        name: what clients execute.
        arguments: its arguments.
        returns: what it answers.
        unstable: whether it may change or go without notice.
    """

    name: str
    arguments: Object = EMPTY
    returns: Type = EMPTY
    unstable: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """An event.

    Attributes:
        name: as clients see it.
        data: what it comes with.
        unstable: whether it may change or go without notice.
    """

    name: str
    data: Object = EMPTY
    unstable: bool = False


def check_arguments(command: Command, arguments: Mapping[str, Any]) -> None:
    """Check a command's arguments against its schema. Raises QmpError as QEMU words it."""
    _check_object(command.arguments, arguments, "")


def _check_object(wanted: Object, value: Mapping[str, Any], where: str) -> None:
    members = {member.name: member for member in wanted.members}
    if wanted.tag and wanted.variants is not None:
        choice = members[wanted.tag]
        if wanted.tag not in value:
            raise QmpError(f"Parameter '{where}{wanted.tag}' is missing")
        _check(choice.type, value[wanted.tag], where + wanted.tag)
        variant = wanted.variants.get(value[wanted.tag], EMPTY)
        members |= {member.name: member for member in variant.members}
    for name, member in members.items():
        if name in value:
            _check(member.type, value[name], where + name)
        elif not member.optional:
            raise QmpError(f"Parameter '{where}{name}' is missing")
    if not wanted.open:
        for name in value:
            if name not in members:
                raise QmpError(f"Parameter '{where}{name}' is unexpected")


def _check(wanted: Type, value: Any, where: str) -> None:
    match wanted:
        case Builtin():
            wrong = not isinstance(value, wanted.types)
            # bool is an int in Python, and in JSON is none.
            if wrong or (isinstance(value, bool) and wanted in (INT, NUMBER)):
                word = "integer" if wanted is INT else wanted.json_type
                raise QmpError(f"Invalid parameter type for '{where}', expected: {word}")
        case Enum():
            _check(STR, value, where)
            if value not in wanted.values:
                name = where.rpartition(".")[2]
                raise QmpError(f"Parameter '{name}' does not accept value '{value}'")
        case Array():
            if not isinstance(value, list):
                raise QmpError(f"Invalid parameter type for '{where}', expected: array")
            for index, element in enumerate(value):
                _check(wanted.element, element, f"{where}[{index}]")
        case Object():
            if not isinstance(value, dict):
                raise QmpError(f"Invalid parameter type for '{where}', expected: object")
            _check_object(wanted, value, f"{where}.")


def introspect(entries: Sequence[Command | Event]) -> list[dict[str, Any]]:
    """Return all entries with the types that they use, as ``query-qmp-schema`` lists them."""
    types: dict[str, dict[str, Any]] = {}
    listed = []
    for entry in entries:
        data = entry.arguments if isinstance(entry, Command) else entry.data
        info: dict[str, Any] = {"name": entry.name, "arg-type": _add(types, data)}
        if isinstance(entry, Command):
            info |= {"meta-type": "command", "ret-type": _add(types, entry.returns)}
        else:
            info["meta-type"] = "event"
        if entry.unstable:
            info["features"] = ["unstable"]
        listed.append(info)
    return listed + list(types.values())


def _add(types: dict[str, dict[str, Any]], wanted: Type) -> str:
    """Add a type and those that it uses; return its name."""
    if wanted.name in types:
        return wanted.name
    info: dict[str, Any] = {"name": wanted.name}
    types[wanted.name] = info
    match wanted:
        case Builtin():
            info |= {"meta-type": "builtin", "json-type": wanted.json_type}
        case Enum():
            members = [{"name": value} for value in wanted.values]
            info |= {"meta-type": "enum", "members": members, "values": list(wanted.values)}
        case Array():
            info |= {"meta-type": "array", "element-type": _add(types, wanted.element)}
        case Object():
            info |= {"meta-type": "object", "members": [_member(types, m) for m in wanted.members]}
            if wanted.tag and wanted.variants is not None:
                info["tag"] = wanted.tag
                info["variants"] = [
                    {"case": case, "type": _add(types, variant)}
                    for case, variant in wanted.variants.items()
                ]
    return wanted.name


def _member(types: dict[str, dict[str, Any]], member: Member) -> dict[str, Any]:
    info: dict[str, Any] = {"name": member.name, "type": _add(types, member.type)}
    if member.optional:
        info["default"] = None
    return info


def not_found(noun: str, name: str) -> QmpError:
    """Return the error for a device that is not there."""
    return QmpError(f"{noun} '{name}' not found", ErrorClass.DEVICE_NOT_FOUND)
