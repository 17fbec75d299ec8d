"""What happens, one line each on standard error: plain text, or JSON for programs.

In JSON a line is one object. Every one has the keys ``time`` (ISO 8601, UTC), ``level``,
``logger``, ``event`` and ``message``. Device events (:mod:`vring_serial.device.events`) are named
after their class, ``port_opened`` for PortOpened, and add its fields and ``where``, the controller
and port; what :func:`emit` logs has the event and the fields given there; the rest is a ``log``.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import logging
import re
import sys
from typing import Any

LEVELS = ("debug", "info", "warning", "error")

_logger = logging.getLogger("vring_serial.cli")


def configure(level: str, *, as_json: bool) -> None:
    """Send our records from ``level`` on, and warnings of others, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("vring_serial").setLevel(level.upper())
    # Who reads our standard error may leave; that is no reason for tracebacks, or to stop serving.
    logging.raiseExceptions = False


def emit(level: int, event: str, message: str, **fields: object) -> None:
    """Log ``message``; ``event`` and ``fields`` are for JSON."""
    _logger.log(level, "%s", message, extra={"event": event, "fields": fields})


class TextFormatter(logging.Formatter):
    """``2026-01-31 12:00:00.123 info    message``: one line, whatever the message holds."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created).isoformat(" ", "milliseconds")
        line = f"{when} {record.levelname.lower():<7} {_one_line(record.getMessage())}"
        if record.exc_info and record.exc_info[1] is not None:
            line += f": {type(record.exc_info[1]).__name__}: {_one_line(str(record.exc_info[1]))}"
            if logging.getLogger("vring_serial").isEnabledFor(logging.DEBUG):
                line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line; see the module."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        event, fields = _structure(record)
        line = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": event,
            "message": record.getMessage(),
            **fields,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _structure(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    """The event and its fields: given by ``emit``, or those of a dataclass that was logged."""
    if hasattr(record, "event"):
        return record.event, getattr(record, "fields", {})
    match record.args:
        case (str(where), event) if dataclasses.is_dataclass(event) and type(event) is not type:
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(event).__name__).lower()
            return name, {"where": where, **_fields(event)}
    return "log", {}


def _fields(event: Any) -> dict[str, Any]:
    def plain(value: object) -> object:
        if isinstance(value, enum.Enum):
            return value.value
        return value if isinstance(value, (bool, int, str)) else str(value)

    return {f.name: plain(getattr(event, f.name)) for f in dataclasses.fields(event)}


def _one_line(text: str) -> str:
    """``text`` with what could break or forge a line, or drive a terminal, escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
