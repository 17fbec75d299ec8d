"""QMP, the server's side: QEMU's machine protocol as it is on the wire.

A client sends JSON objects, one after another, and gets a line with one JSON object for each; see
QEMU's ``docs/interop/qmp-spec.rst``. A connection begins with a greeting and negotiates
capabilities before anything else. The texts of errors are QEMU's, so that
programs which look at them go on working.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vring_serial.errors import RemoteProtocolError

#: Most bytes of one request, and how deep its arrays and objects may be nested.
REQUEST_MAX = 1 << 20
DEPTH_MAX = 64
#: Release of QEMU whose replies these are; clients look at it to know what they may ask for.
QEMU_VERSION = (11, 1, 0)

_OPENING = {ord("{"): ord("}"), ord("["): ord("]")}
_SPACES = b" \t\r\n"


class ErrorClass(enum.StrEnum):
    """The classes of errors, as QAPI has them (``QapiErrorClass``)."""

    GENERIC = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"
    DEVICE_NOT_ACTIVE = "DeviceNotActive"
    DEVICE_NOT_FOUND = "DeviceNotFound"


class QmpError(RemoteProtocolError):
    """A request was refused.

    Attributes:
        error_class: what programs look at.
        desc: what people read.
    """

    def __init__(self, desc: str, error_class: ErrorClass = ErrorClass.GENERIC) -> None:
        super().__init__(desc)
        self.error_class = error_class
        self.desc = desc


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a client.

    Attributes:
        command: its name.
        arguments: by name; values as json gives them.
        has_id: whether the reply repeats ``id``.
        id: any JSON value, the client's own.
        error: why it is refused, if it cannot even be looked up.
    """

    command: str
    arguments: Mapping[str, Any]
    has_id: bool = False
    id: Any = None
    error: QmpError | None = None


class RequestParser:
    """Splits a stream of bytes into requests, which need not be on lines of their own."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._looked_at = 0
        self._closing: list[int] = []  # what ends the open arrays and objects
        self._in_string = False
        self._escaped = False

    def feed(self, data: bytes) -> Iterator[Request]:
        """Add bytes; yield the requests that they complete, those with errors included.

        After a request with an error about JSON, what follows up to the next line is skipped.
        """
        self._buffer += data
        while True:
            end = self._end_of_value()
            if end is None:
                if len(self._buffer) <= REQUEST_MAX:
                    return
                error = f"JSON parse error, request is larger than {REQUEST_MAX} bytes"
            elif end < 0:
                error = "JSON parse error, stray or unbalanced brackets, or nested too deep"
            else:
                text = bytes(self._buffer[:end])
                self._forget(end)
                if text.strip(_SPACES):
                    yield parse_request(text)
                continue
            self._skip_line()
            yield Request("", {}, error=QmpError(error))

    def _end_of_value(self) -> int | None:
        """Return where the first value ends; None: not yet; negative: it is no value."""
        buffer, closing = self._buffer, self._closing
        at = self._looked_at
        try:
            while at < len(buffer):
                byte = buffer[at]
                at += 1
                if self._in_string:
                    if self._escaped:
                        self._escaped = False
                    elif byte == 0x5C:  # backslash
                        self._escaped = True
                    elif byte == 0x22:  # quotation mark
                        self._in_string = False
                elif byte == 0x22:
                    self._in_string = True
                elif byte in _OPENING:
                    closing.append(_OPENING[byte])
                    if len(closing) > DEPTH_MAX:
                        return -1
                elif byte in b"}]":
                    if not closing or closing.pop() != byte:
                        return -1
                    if not closing:
                        return at
                elif byte in _SPACES and not closing:
                    return at  # blanks, or a value that is no object
            return None
        finally:
            self._looked_at = at

    def _forget(self, count: int) -> None:
        del self._buffer[:count]
        self._looked_at = 0
        self._closing.clear()
        self._in_string = self._escaped = False

    def _skip_line(self) -> None:
        newline = self._buffer.find(b"\n", min(self._looked_at, REQUEST_MAX))
        self._forget(len(self._buffer) if newline < 0 else newline + 1)


def parse_request(text: bytes) -> Request:
    """Parse one JSON value into a request; what is wrong with it is its ``error``."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, json.JSONDecodeError) else "invalid text"
        return Request("", {}, error=QmpError(f"JSON parse error, {why}"))
    if not isinstance(value, dict):
        return Request("", {}, error=QmpError("QMP input must be a JSON object"))
    has_id, id = "id" in value, value.get("id")
    try:
        command, arguments = _command_of(value)
    except QmpError as error:
        return Request("", {}, has_id, id, error)
    return Request(command, arguments, has_id, id)


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _command_of(value: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    command: str | None = None
    arguments: Mapping[str, Any] = {}
    for name, member in value.items():
        if name == "execute":
            if not isinstance(member, str):
                raise QmpError("QMP input member 'execute' must be a string")
            command = member
        elif name == "arguments":
            if not isinstance(member, dict):
                raise QmpError("QMP input member 'arguments' must be an object")
            arguments = member
        elif name != "id":
            raise QmpError(f"QMP input member '{name}' is unexpected")
    if command is None:
        raise QmpError("QMP input lacks member 'execute'")
    return command, arguments


def greeting(package: str) -> bytes:
    """Return what a server says first; ``package`` is ours, with its version."""
    major, minor, micro = QEMU_VERSION
    version = {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": package}
    return _line({"QMP": {"version": version, "capabilities": []}})


def reply(request: Request, value: object) -> bytes:
    """Return the line of a successful reply."""
    return _line({"return": value, **_id(request)})


def error_reply(request: Request, error: QmpError) -> bytes:
    """Return the line of a refusal."""
    return _line({"error": {"class": error.error_class, "desc": error.desc}, **_id(request)})


def event(name: str, data: Mapping[str, object], time_us: int) -> bytes:
    """Return the line of an event that happened ``time_us`` microseconds after the epoch."""
    seconds, microseconds = divmod(time_us, 1_000_000)
    stamp = {"seconds": seconds, "microseconds": microseconds}
    return _line({"timestamp": stamp, "event": name, **({"data": data} if data else {})})


def _id(request: Request) -> dict[str, Any]:
    return {"id": request.id} if request.has_id else {}


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\r\n"


class Negotiation:
    """What a connection may ask for: at first nothing but ``qmp_capabilities``."""

    def __init__(self) -> None:
        self.done = False

    def check(self, request: Request, known: Sequence[str] | Mapping[str, object]) -> None:
        """Raise QmpError if the request may not be carried out now, or is of no known command."""
        if request.error is not None:
            raise request.error
        if not self.done and request.command != "qmp_capabilities":
            raise QmpError(
                "Expecting capabilities negotiation with 'qmp_capabilities'",
                ErrorClass.COMMAND_NOT_FOUND,
            )
        if self.done and request.command == "qmp_capabilities":
            raise QmpError(
                "Capabilities negotiation is already complete, command ignored",
                ErrorClass.COMMAND_NOT_FOUND,
            )
        if request.command not in known:
            raise QmpError(
                f"The command {request.command} has not been found", ErrorClass.COMMAND_NOT_FOUND
            )
