"""What happens, one line each on standard error: plain text, or JSON for programs.

Every record of this package can carry an event name and fields (:func:`emit`). In text only the
message shows; in JSON a line is one object with the keys ``time`` (ISO 8601, UTC), ``level``,
``event``, ``message`` and the event's fields. Records without an event, which libraries write, have
the event ``log`` and the field ``logger``.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from vring_serial.device.events import (
    DeviceEvent,
    DeviceReset,
    DriverReady,
    EmergencyWrite,
    FeaturesNegotiated,
    MessageRefused,
    OutputDropped,
    PortAdded,
    PortClosed,
    PortOpened,
    PortReady,
    PortRemoved,
    QueueBroken,
)
from vring_serial.proto.console import feature_names

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


def emit(level: int, event: str, message: str, **fields: object) -> None:
    """Log ``message``; ``event`` and ``fields`` are for JSON."""
    _logger.log(level, "%s", message, extra={"event": event, "fields": fields})


class TextFormatter(logging.Formatter):
    """``2026-01-31 12:00:00.123 info     message``: one line whatever the message holds."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created).isoformat(" ", "milliseconds")
        line = f"{when} {record.levelname.lower():<8} {_one_line(record.getMessage())}"
        if record.exc_info and logging.getLogger("vring_serial").isEnabledFor(logging.DEBUG):
            line += "\n" + self.formatException(record.exc_info)
        elif record.exc_info and record.exc_info[1] is not None:
            line += f": {type(record.exc_info[1]).__name__}: {_one_line(str(record.exc_info[1]))}"
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, object] = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
            "message": record.getMessage(),
        }
        if line["event"] == "log":
            line["logger"] = record.name
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _one_line(text: str) -> str:
    """``text`` with what could break or forge a line, or drive a terminal, escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class DeviceLog:
    """Logs a controller's events: assign an instance to ``Controller.on_event``.

    Args:
        controller: its name.
        port_name: gives the name of a port by its number, "" if it has none.
    """

    def __init__(self, controller: str, port_name: Callable[[int], str]) -> None:
        self._controller = controller
        self._port_name = port_name

    def __call__(self, event: DeviceEvent) -> None:
        fields = _fields(event)
        if "nr" in fields and "name" not in fields:
            fields["name"] = self._port_name(fields["nr"])
        level, describe = _DESCRIPTIONS[type(event)]
        emit(
            level,
            _event_name(event),
            f"{self._controller}: {describe(event, _port_phrase(fields))}",
            controller=self._controller,
            **fields,
        )


def _port_phrase(fields: Mapping[str, Any]) -> str:
    if "nr" not in fields:
        return ""
    return f"port {fields['nr']}" + (f" {fields['name']}" if fields["name"] else "")


def _event_name(event: DeviceEvent) -> str:
    """``PortOpened`` → ``port_opened``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(event).__name__).lower()


def _fields(event: DeviceEvent) -> dict[str, Any]:
    def plain(value: object) -> object:
        if isinstance(value, enum.Enum):
            return value.value
        return value if isinstance(value, (int, str)) else str(value)

    return {f.name: plain(getattr(event, f.name)) for f in dataclasses.fields(event)}


#: By kind of event: its level, and the message from the event and the phrase for its port.
_DESCRIPTIONS: dict[type, tuple[int, Callable[[Any, str], str]]] = {
    FeaturesNegotiated: (
        logging.INFO,
        lambda e, _: f"the driver accepted {feature_names(e.bits)}",
    ),
    DriverReady: (
        logging.INFO,
        lambda e, _: "the guest's driver is ready" if e.ok else "the guest's driver has failed",
    ),
    DeviceReset: (logging.INFO, lambda e, _: "reset"),
    PortAdded: (logging.INFO, lambda e, port: f"{port} added"),
    PortRemoved: (logging.INFO, lambda e, port: f"{port} removed"),
    PortReady: (
        logging.DEBUG,
        lambda e, port: f"{port} {'is ready' if e.ok else 'could not be set up'} in the guest",
    ),
    PortOpened: (logging.INFO, lambda e, port: f"{port} opened by the {e.side.value}"),
    PortClosed: (logging.INFO, lambda e, port: f"{port} closed by the {e.side.value}"),
    MessageRefused: (logging.WARNING, lambda e, _: f"refused: {e.why}"),
    OutputDropped: (
        logging.WARNING,
        lambda e, port: f"{port}: the host end is slow, {e.count} bytes dropped so far",
    ),
    EmergencyWrite: (
        logging.INFO,
        lambda e, _: f"emergency write {bytes([e.char & 0xFF])!r}",
    ),
    QueueBroken: (
        logging.ERROR,
        lambda e, _: f"the guest's driver broke a ring, the device asks for a reset: {e.error}",
    ),
}
