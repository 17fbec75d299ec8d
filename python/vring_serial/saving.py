"""The format in which state is written down: for restarts, snapshots and migration.

State is a tree of plain dataclasses (see CONTRIBUTING, *State*). A saved state is one string of
bytes, little-endian:

======  ====  ==================================================================================
offset  size  contents
======  ====  ==================================================================================
0       8     ``VRINGST`` and a line feed
8       4     version of this layout: 1
12      4     length of the body in bytes
16      4     CRC-32 of the body (zlib's)
20            the body: JSON in UTF-8, ``{"kind": str, "version": int, "state": {...}}``
======  ====  ==================================================================================

``kind`` names what was saved, ``version`` the form that its state has; each kind counts its own.
In the state a dataclass is an object with its fields' names, bytes are a string in base64, enums
are their values, sets of flags numbers, tuples and sets arrays, and keys of mappings strings.
Nothing may be missing and nothing added: a reader knows each version that was ever released, and
brings older ones up to date with functions that turn one version's object into the next one's.

Whoever wrote the bytes may be hostile: all of it is checked before anything is built from it.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import enum
import functools
import json
import operator
import struct
import types
import typing
import zlib
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, NoReturn, TypeVar

from vring_serial.errors import StateError

MAGIC = b"VRINGST\n"
LAYOUT_VERSION = 1
#: Longest body. A device keeps at most 64 MiB of a port's output, and few ports ever do.
MAX_BODY = 1 << 30
#: Most values in one: about 60 for each of a device's ports, 20 for each of its queues.
MAX_PARTS = 1 << 18

_HEADER = struct.Struct("<8sIII")

#: What JSON gives for an object.
Fields = dict[str, Any]
StateT = TypeVar("StateT")
#: Gives the values of an object's fields.
_ValuesOf = Callable[[Any], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class StateFormat(Generic[StateT]):
    """Reads and writes one kind of state.

    Attributes:
        kind: its name in the saved bytes.
        version: what :meth:`pack` writes, 1 or more.
        cls: the dataclass. Its fields are made of bool, int, str, bytes, bytearray, None, enums,
            dataclasses, and of ``list``, ``tuple``, ``frozenset`` (of one type), ``dict`` (with
            keys that are int or str) and ``|`` of them.
        upgrades: for each older version the function that gives the next version's fields; it may
            change its argument; what it raises for fields that are not there is made a StateError.
    """

    kind: str
    version: int
    cls: type[StateT]
    upgrades: Mapping[int, Callable[[Fields], Fields]] = dataclasses.field(default_factory=dict)

    def pack(self, state: StateT) -> bytes:
        """Return the saved form of ``state``, which is not changed and shares nothing with it."""
        return Packer(self).pack(state)

    def unpack(self, data: bytes | bytearray | memoryview) -> StateT:
        """Return the state that was saved; bytes after it are ignored.

        Raises:
            StateError: it is torn, forged, of another kind, of a version that is not known, or does
                not fit; the message says what and where.
        """
        saved = _read(memoryview(data))
        kind, version, state = saved.get("kind"), saved.get("version"), saved.get("state")
        if kind != self.kind:
            raise StateError(f"it is the state of {kind!r}, not of {self.kind!r}")
        if type(version) is not int or not isinstance(state, dict):
            raise StateError("the body lacks a version or a state")
        oldest = min(self.upgrades, default=self.version)
        if not oldest <= version <= self.version:
            raise StateError(
                f"state of {self.kind!r} has version {version}; "
                f"versions {oldest} to {self.version} are known"
            )
        for older in range(version, self.version):
            try:
                state = self.upgrades[older](state)
            except (LookupError, TypeError, ValueError) as error:
                raise StateError(
                    f"state of {self.kind!r}, version {older}: {type(error).__name__}: {error}"
                ) from None
        return typing.cast(StateT, _build(self.cls, state, self.kind))


def saved_length(header: bytes | memoryview) -> int:
    """Return the length in bytes of the saved state that begins with ``header``.

    Raises StateError if none does; 20 bytes are enough.
    """
    if len(header) < _HEADER.size:
        raise StateError(f"{len(header)} bytes are no saved state")
    magic, layout, length, _ = _HEADER.unpack_from(header)
    if magic != MAGIC:
        raise StateError("it is no saved state: the first bytes are others")
    if layout != LAYOUT_VERSION:
        raise StateError(f"its layout has version {layout}; {LAYOUT_VERSION} is known")
    if length > MAX_BODY:
        raise StateError(f"its body is said to have {length} bytes; {MAX_BODY} are allowed")
    return _HEADER.size + int(length)


def saved_kind(data: bytes | bytearray | memoryview) -> str:
    """Return the kind of a saved state. Raises StateError if it is none."""
    kind = _read(memoryview(data)).get("kind")
    if not isinstance(kind, str):
        raise StateError("the body lacks a kind")
    return kind


def check_equal(what: str, theirs: int, ours: int) -> None:
    """Raise StateError if a number in a state is another one than here."""
    if theirs != ours:
        raise StateError(f"{what} is {theirs} in the state, {ours} here")


def check_range(name: str, value: int, bits: int) -> None:
    """Raise StateError, naming the field, if ``value`` is no number of so many bits."""
    if not 0 <= value < 1 << bits:
        raise StateError(f"{name} is {value:#x}, no number of {bits} bits")


def _read(data: memoryview) -> Fields:
    end = saved_length(data)
    if len(data) < end:
        raise StateError(f"it is torn: {len(data)} of {end} bytes")
    body = bytes(data[_HEADER.size : end])
    if zlib.crc32(body) != _HEADER.unpack_from(data)[3]:
        raise StateError("it is torn: the checksum does not fit")
    parts = body.count(b",") + body.count(b"{") + body.count(b"[")
    if parts > MAX_PARTS:
        raise StateError(f"it has {parts} parts; {MAX_PARTS} are allowed")
    try:
        fields = json.loads(body, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise StateError(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise StateError("the body is not an object")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> Fields:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name comes twice in one object")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


# --- from dataclasses


class Packer(Generic[StateT]):
    """Writes down one state again and again: parts that did not change keep their text.

    Args:
        form: of the state.
    """

    def __init__(self, form: StateFormat[StateT]) -> None:
        name, version = json.dumps(form.kind), form.version
        self._head = f'{{"kind":{name},"version":{version},"state":'
        # By identity, the objects whose text was needed last time: what gives their values, the
        # values then, and the text. The object is held, so that no other one gets its identity.
        self._texts: dict[int, tuple[object, _ValuesOf, tuple[Any, ...], str]] = {}
        self._before = self._texts

    def pack(self, state: StateT) -> bytes:
        """Return the saved form of ``state``, as :meth:`StateFormat.pack` does."""
        self._before, self._texts = self._texts, {}
        body = f"{self._head}{self._text(state)}}}".encode()
        self._before = {}
        return _HEADER.pack(MAGIC, LAYOUT_VERSION, len(body), zlib.crc32(body)) + body

    def _text(self, value: Any) -> str:
        """Return ``value`` as JSON."""
        if (before := self._before.get(id(value))) is not None:
            _, values_of, values, text = before
            if values_of(value) == values:
                self._texts[id(value)] = before
                return text
        cls = type(value)
        if cls is bool or value is None or cls is str:
            return json.dumps(value)
        if cls is int:
            return repr(value)
        if isinstance(value, enum.Enum):
            return self._text(value.value)
        if isinstance(value, bytes | bytearray | memoryview):
            return f'"{base64.b64encode(value).decode()}"'
        if isinstance(value, list | tuple):
            return f"[{','.join(map(self._text, value))}]"
        if isinstance(value, frozenset):
            return self._text(sorted(map(_plain_scalar, value)))
        if isinstance(value, dict):
            items = (f"{json.dumps(str(k))}:{self._text(item)}" for k, item in value.items())
            return f"{{{','.join(items)}}}"
        if (known := _known(typing.cast(Hashable, cls))) is not None:
            return self._dataclass_text(value, known)
        raise TypeError(f"{cls.__name__} cannot be part of a state")

    def _dataclass_text(self, value: Any, known: _Known) -> str:
        values = known.values_of(value)
        parts = (
            f"{name}{self._text(item)}" for name, item in zip(known.names, values, strict=True)
        )
        text = f"{{{','.join(parts)}}}"
        if known.flat:
            self._texts[id(value)] = (value, known.values_of, values, text)
        return text


def _plain_scalar(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


@dataclasses.dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a dataclass.

    Attributes:
        names: of its fields, as an object of JSON begins each.
        values_of: gives their values.
        flat: none of them can change in itself, so that equal values have equal texts.
    """

    names: tuple[str, ...]
    values_of: _ValuesOf
    flat: bool


@functools.cache
def _known(cls: Hashable) -> _Known | None:
    """Return what is known of a dataclass; None if it is none."""
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        return None
    hints = _hints(cls)
    names = tuple(hints)
    get = operator.attrgetter(*names) if names else lambda _: ()
    return _Known(
        tuple(f'"{name}":' for name in names),
        get if len(names) != 1 else lambda value: (get(value),),
        all(map(_is_fixed, hints.values())),
    )


def _is_fixed(wanted: Any) -> bool:
    """Return whether values of this type never change in themselves."""
    arguments = typing.get_args(wanted)
    if arguments:
        origin = typing.get_origin(wanted)
        fixed = origin in (types.UnionType, typing.Union, tuple, frozenset)
        return fixed and all(each is Ellipsis or _is_fixed(each) for each in arguments)
    if dataclasses.is_dataclass(wanted):
        frozen: bool = wanted.__dataclass_params__.frozen  # type: ignore[union-attr]
        return frozen and all(map(_is_fixed, _hints(typing.cast(type, wanted)).values()))
    if wanted in (bool, int, str, bytes, types.NoneType):
        return True
    return isinstance(wanted, type) and issubclass(wanted, enum.Enum)


# --- to dataclasses


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _build(wanted: Any, value: Any, where: str) -> Any:
    """Return ``value`` as an object of the type ``wanted``. Raises StateError naming ``where``."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return _build_union(arguments, value, where)
    if origin in (list, tuple, frozenset):
        return _build_sequence(origin, arguments, value, where)
    if origin is dict:
        return _build_mapping(arguments, value, where)
    if dataclasses.is_dataclass(wanted):
        return _build_dataclass(typing.cast(type, wanted), value, where)
    if wanted in (bool, int, str, types.NoneType):
        if type(value) is not wanted:
            raise StateError(f"{where}: {_describe(value)} instead of {_name(wanted)}")
        return value
    if wanted is bytes or wanted is bytearray:
        return wanted(_build_bytes(value, where))
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        return _build_enum(wanted, value, where)
    raise TypeError(f"{where}: {wanted!r} cannot be part of a state")


def _build_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in arguments:
        return None
    others = [wanted for wanted in arguments if wanted is not types.NoneType]
    for wanted in others[:-1]:
        try:
            return _build(wanted, value, where)
        except StateError:
            continue
    return _build(others[-1], value, where)


def _build_sequence(origin: type, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list):
        raise StateError(f"{where}: {_describe(value)} instead of an array")
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise StateError(f"{where}: {len(value)} values instead of {len(arguments)}")
        each = arguments
    else:
        each = (arguments[0],) * len(value)
    return origin(
        _build(wanted, item, f"{where}[{i}]")
        for i, (wanted, item) in enumerate(zip(each, value, strict=True))
    )


def _build_mapping(arguments: tuple[Any, ...], value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise StateError(f"{where}: {_describe(value)} instead of an object")
    key_type, item_type = arguments
    built: dict[Any, Any] = {}
    for text, item in value.items():
        key: Any = text
        if key_type is int:
            # What str(int) gives, and nothing else that int() takes.
            digits = text.removeprefix("-")
            if not (digits.isascii() and digits.isdecimal() and len(digits) <= 20):
                raise StateError(f"{where}: the key {text[:40]!r} is no number")
            key = int(text)
            if str(key) != text:
                raise StateError(f"{where}: the key {text!r} is no number")
        built[key] = _build(item_type, item, f"{where}[{text[:40]}]")
    return built


def _build_dataclass(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise StateError(f"{where}: {_describe(value)} instead of an object")
    hints = _hints(cls)
    if missing := hints.keys() - value.keys():
        raise StateError(f"{where}: {', '.join(sorted(missing))} missing")
    if unknown := value.keys() - hints.keys():
        names = ", ".join(repr(name[:40]) for name in sorted(unknown)[:5])
        raise StateError(f"{where}: {names} not known")
    built = {name: _build(wanted, value[name], f"{where}.{name}") for name, wanted in hints.items()}
    try:
        return cls(**built)
    except ValueError as error:  # what the class itself checks
        raise StateError(f"{where}: {error}") from None


def _build_bytes(value: Any, where: str) -> bytes:
    if not isinstance(value, str):
        raise StateError(f"{where}: {_describe(value)} instead of bytes in base64")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise StateError(f"{where}: not base64") from None


def _build_enum(wanted: type[enum.Enum], value: Any, where: str) -> enum.Enum:
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise StateError(f"{where}: {_describe(value)} instead of a {wanted.__name__}")
    try:
        return wanted(value)
    except ValueError:
        raise StateError(f"{where}: {value!r} is no {wanted.__name__}") from None


_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    str: "a string",
    types.NoneType: "null",
    float: "a fraction",
    list: "an array",
    dict: "an object",
}


def _name(wanted: Any) -> str:
    return _NAMES.get(wanted, str(wanted))


def _describe(value: Any) -> str:
    return _name(type(value))
