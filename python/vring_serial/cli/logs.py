"""The log on standard error or in a file: one line per event, as plain text or JSON.

In JSON each line is one object with the keys ``time`` (ISO 8601, UTC), ``level``, ``logger``,
``event`` and ``message``, and ``vm`` if there are several. Records of devices
(:mod:`vring_serial.device.console.event_log`) and of :func:`emit` have an attribute ``event`` and
add their ``fields``; for all others the event is ``log``.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import fcntl
import json
import logging
import os
import re
import select
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click

from vring_serial.cli.log_writer import LineWriter, write_to
from vring_serial.cli.plain import escaped
from vring_serial.errors import ResourceError
from vring_serial.ratelimit import LogBudget
from vring_serial.service.last_words import LastWords

LEVELS = ("debug", "info", "warning", "error")

#: Maximum length of a message in characters.
MESSAGE_MAX = 4000
#: Seconds to wait for the log's reader at exit and before an error message.
FLUSH_SECONDS = 1.0
#: Budget for everything that a virtual machine and its peers can cause to be logged: 44 MB per day
#: in the long run.
BURST_BYTES = 2 << 20
BYTES_PER_SECOND = 512.0
RESUME_BYTES = 16 << 10
#: Where a system call's name goes in a message for :func:`last_words`.
NAME = "<call>"
_TIME = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d\.\d{3}")

#: The VM that records are about, where a process serves several.
_vm: contextvars.ContextVar[str] = contextvars.ContextVar("vm", default="")
_logger = logging.getLogger("vring_serial.cli")
_handler: LineHandler | None = None


@dataclass(frozen=True, slots=True)
class LogSettings:
    """How a process logs; see :func:`configure`.

    Attributes:
        level: the least that is logged.
        as_json: one JSON object a line.
        path: file to append to; None for standard error.
    """

    level: str
    as_json: bool
    path: str | None


class LineHandler(logging.Handler):
    """A handler that writes records as lines to standard error or a file without blocking.

    Attributes:
        stream: the stream; None for a file.

    Args:
        formatter: formats records.
        path: file to append to; None for standard error.

    Raises:
        ResourceError: the file cannot be opened.
    """

    def __init__(self, formatter: logging.Formatter, path: str | None = None) -> None:
        self.stream = None if path else sys.stderr
        self._path = path
        self._fd = -1
        self._encoding = "utf-8"
        self._budget = LogBudget(burst=BURST_BYTES, rate=BYTES_PER_SECOND, resume=RESUME_BYTES)
        self._writer = LineWriter(self._open(), self._dropped)
        # Last: once registered, it is flushed when the process ends.
        super().__init__()
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
        else:
            if not getattr(record, "exempt", False):
                if not self._budget.admits(len(line)):
                    return
                if left_out := self._budget.take_left_out():
                    text = f"{left_out} lines were left out: the log has had too many"
                    self.put(self._own_line("log_left_out", left_out, text))
            self.put(line)

    def put(self, text: str) -> None:
        """Write text that is not a record."""
        self._writer.put(f"{text}\n".encode(self._encoding, "backslashreplace"))

    def flush(self) -> None:
        """Wait until all lines are written, for at most FLUSH_SECONDS."""
        self._writer.flush(FLUSH_SECONDS)

    def close(self) -> None:
        self._writer.close()
        super().close()

    def end(self) -> bool:
        """Close, and wait up to FLUSH_SECONDS for the thread; return whether it has ended."""
        self.close()
        return self._writer.join(FLUSH_SECONDS)

    def reopen(self) -> None:
        """Reopen the file at its path. On ResourceError the old file stays in use."""
        if self._path is not None:
            new = _open_log(self._path)
            os.dup2(new, self._fd, inheritable=False)
            os.close(new)

    def _open(self) -> Callable[[bytes], int]:
        if self._path is not None:
            self._fd = _open_log(self._path)
            return write_to(self._fd)
        stream = self.stream
        if stream is None:
            return len
        self._encoding = stream.encoding or self._encoding
        try:
            fd = stream.fileno()
        except (OSError, ValueError):  # what stands in for it has no descriptor
            return lambda data: stream.write(data.decode(self._encoding)) and len(data)
        self._fd = fd
        # If somebody truncates the file, writing continues at its new end and leaves no hole.
        if stat.S_ISREG(os.fstat(fd).st_mode):
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
        return write_to(fd)

    def last_words(self, message: str) -> LastWords | None:
        """Return the line of an error, for :func:`last_words`; None without a descriptor."""
        if self._fd < 0:
            return None
        extra = {"event": "refused_call", "fields": {}}
        record = _logger.makeRecord(
            _logger.name, logging.ERROR, "", 0, "%s", (message,), None, extra=extra
        )
        text = f"{self.format(record)}\n"
        when = _TIME.search(text)
        assert when is not None  # every line begins with it
        before, _, after = text.partition(NAME)
        return LastWords(
            (before + after).encode(self._encoding, "backslashreplace"),
            time_at=when.start(),
            name_at=len(before.encode(self._encoding, "backslashreplace")),
            ahead_of_utc=self._ahead_of_utc,
            fd=self._fd,
        )

    @property
    def _ahead_of_utc(self) -> int:
        return 0 if isinstance(self.formatter, JsonFormatter) else time.localtime().tm_gmtoff

    def _dropped(self, count: int) -> bytes:
        text = f"{count} lines of the log were dropped: they were not taken"
        line = self._own_line("log_dropped", count, text)
        return f"{line}\n".encode(self._encoding, "backslashreplace")

    def _own_line(self, event: str, count: int, text: str) -> str:
        extra = {"event": event, "fields": {"count": count}}
        record = _logger.makeRecord(
            _logger.name, logging.WARNING, "", 0, "%s", (text,), None, extra=extra
        )
        return self.format(record)


def configure(level: str, *, as_json: bool, path: str | None = None, vm: str = "") -> None:
    """Log our records from ``level`` up, and warnings of others, to standard error or a file.

    Args:
        level: one of LEVELS.
        as_json: one JSON object a line.
        path: file to append to; None for standard error.
        vm: the one that all records are about; "" for several, or none that is named.

    Raises:
        ResourceError: the file cannot be opened.
    """
    global _handler
    handler = LineHandler(JsonFormatter(vm) if as_json else TextFormatter(vm), path)
    if _handler is not None:
        _handler.close()
    _handler = handler
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("vring_serial").setLevel(level.upper())
    # The reader of standard error may leave; that must not cause tracebacks or end the service.
    logging.raiseExceptions = False
    # Python's own messages must not block on standard error either.
    logging.captureWarnings(True)
    sys.unraisablehook = _unraisable


def set_level(level: str) -> None:
    """Log our records from ``level`` up, from now on."""
    logging.getLogger("vring_serial").setLevel(level.upper())


@contextlib.contextmanager
def about(vm: str) -> Iterator[None]:
    """Name a VM in all that is logged in the block, and by all callbacks that it sets up."""
    token = _vm.set(vm)
    try:
        yield
    finally:
        _vm.reset(token)


def last_words(message: str) -> LastWords | None:
    """Return how to write ``message`` when Python no longer runs; None if nothing is logged.

    Args:
        message: with NAME in it.
    """
    return None if _handler is None else _handler.last_words(message)


def end() -> bool:
    """Stop logging, and end the writing thread; return whether it has ended.

    It has not if the log's reader has stopped.
    """
    global _handler
    handler, _handler = _handler, None
    if handler is None:
        return True
    logging.getLogger().handlers[:] = []
    return handler.end()


def write_now(
    level: int,
    event: str,
    message: str,
    *,
    as_json: bool,
    path: str | None = None,
    **fields: object,
) -> None:
    """Write a record without a thread, to a file or standard error; dropped if that would block."""
    formatter = JsonFormatter() if as_json else TextFormatter()
    extra = {"event": event, "fields": fields}
    record = _logger.makeRecord(_logger.name, level, "", 0, "%s", (message,), None, extra=extra)
    line = f"{formatter.format(record)}\n".encode(errors="backslashreplace")[: select.PIPE_BUF]
    with contextlib.suppress(OSError, ResourceError):
        fd = 2 if path is None else _open_log(path)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            if any(events & select.POLLOUT for _, events in poll.poll(0)):
                os.write(fd, line)
        finally:
            if path is not None:
                os.close(fd)


def flush() -> None:
    """Wait until all lines are written, for at most FLUSH_SECONDS."""
    if _handler is not None:
        _handler.flush()


def reopen() -> None:
    """Reopen the log file, if there is one, after it was renamed.

    Raises:
        ResourceError: the file cannot be opened; the old one stays in use.
    """
    if _handler is not None:
        _handler.reopen()


def say(text: str) -> None:
    """Print ``text`` on standard error after all log lines, without waiting for a stuck reader.

    A log file gets the text as well.
    """
    if _handler is not None and _handler.stream in (None, sys.stderr):
        _handler.put(text)
        _handler.flush()
    if _handler is None or _handler.stream is not sys.stderr:
        click.echo(text, err=True)


def _open_log(path: str) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        raise ResourceError(f"--log-file {path}: {error.strerror}") from None


def _unraisable(args: sys.UnraisableHookArgs) -> None:
    error = args.exc_value
    if error is not None:
        what = args.err_msg or "Exception ignored"
        info = (args.exc_type, error, args.exc_traceback)
        _logger.error("%s in %r", what, args.object, exc_info=info)


def emit(level: int, event: str, message: str, **fields: object) -> None:
    """Log ``message``; ``event`` and ``fields`` are for JSON."""
    # Guests can trigger only DEBUG messages here; others are always logged.
    exempt = level > logging.DEBUG
    extra = {"event": event, "fields": fields, "exempt": exempt}
    _logger.log(level, "%s", message, extra=extra)


class _VmFormatter(logging.Formatter):
    """A formatter that knows which VM records are about.

    Args:
        vm: the one of all records that :func:`about` says nothing of.
    """

    def __init__(self, vm: str = "") -> None:
        super().__init__()
        self._of_all = vm

    @property
    def vm(self) -> str:
        return _vm.get() or self._of_all


class TextFormatter(_VmFormatter):
    """``2026-01-31 12:00:00.123 info    message``: one line, whatever the message contains."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created).isoformat(" ", "milliseconds")
        about = f"{self.vm}: " if self.vm else ""
        text = escaped(about + _cut(record.getMessage()))
        line = f"{when} {record.levelname.lower():<7} {text}"
        if record.exc_info and record.exc_info[1] is not None:
            line += (
                f": {type(record.exc_info[1]).__name__}: {escaped(_cut(str(record.exc_info[1])))}"
            )
            if logging.getLogger("vring_serial").isEnabledFor(logging.DEBUG):
                line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(_VmFormatter):
    """One JSON object per line; see the module."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, "event", "log"),
            "message": _cut(record.getMessage()),
        }
        if self.vm:
            line["vm"] = self.vm
        for name, value in getattr(record, "fields", {}).items():
            line[name] = _cut(value) if isinstance(value, str) else value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _cut(text: str) -> str:
    """Limit ``text`` to MESSAGE_MAX characters and a count: it may quote what a peer sent."""
    if len(text) <= MESSAGE_MAX:
        return text
    return f"{text[:MESSAGE_MAX]}… ({len(text) - MESSAGE_MAX} more characters)"
