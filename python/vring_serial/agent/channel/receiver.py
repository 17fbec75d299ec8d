"""Receiving files over an agent channel: the embedded guest's agent does, and a host that asks.

They are written under one directory, with names that cannot leave it, never over a file that
exists; a transfer that does not end well leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vring_serial.proto.agent import (
    Buffer,
    FileInfo,
    FileXferResult,
    FileXferStart,
    FileXferStatus,
    MessageError,
)

log = logging.getLogger(__name__)

TRANSFERS_MAX = 128
"""Transfers under way at once, as in the Linux agent."""
NAME_BYTES_MAX = 200
"""Bytes of a file name; most file systems take 255, and a number may have to be added."""
SAME_NAME_MAX = 64
"""How many files of one name are kept beside each other."""

_OPEN_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_GLIB_FAILED = 0
_GLIB_EXISTS = 2
_GLIB_INVALID_FILENAME = 10


def safe_name(name: str) -> str:
    """Return a file name for ``name``: its last component without control characters.

    A name that would be hidden, or look like an option, begins with ``_`` instead, as browsers have
    it. Returns "" if nothing is left that could be a name.
    """
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    cleaned = "".join(c for c in last if c.isprintable()).strip()
    if cleaned in ("", ".", ".."):
        return ""
    if cleaned[0] in ".-":
        cleaned = "_" + cleaned[1:]
    stem, dot, suffix = cleaned.rpartition(".")
    if not stem or len(suffix.encode()) > 16:
        stem, dot, suffix = cleaned, "", ""
    room = NAME_BYTES_MAX - len((dot + suffix).encode())
    return stem.encode()[:room].decode("utf-8", "ignore") + dot + suffix


@dataclass(slots=True)
class _Incoming:
    path: Path
    fd: int
    size: int
    written: int = 0

    def remove(self) -> None:
        os.close(self.fd)
        with contextlib.suppress(OSError):
            self.path.unlink()


class FileReceiver:
    """All transfers from one sender.

    Args:
        directory: where files go; made when the first one comes. None refuses all.
        send: sends a status to the sender.
        on_end: called once for each file that was offered, with the path if it is there now,
            or None if it was refused, cancelled or lost.

    Attributes:
        detailed: the sender understands the newer status results and their details.
    """

    def __init__(
        self,
        directory: Path | None,
        send: Callable[[FileXferStatus], None],
        on_end: Callable[[Path | None], None] = lambda _: None,
    ) -> None:
        self.detailed = False
        self._on_end = on_end
        self._directory = directory
        self._send = send
        self._incoming: dict[int, _Incoming] = {}

    def start(self, message: FileXferStart) -> None:
        """Accept a file that the sender offers, or tell it why not."""
        if self._directory is None:
            self._refuse(message.id, FileXferResult.DISABLED)
            return
        if message.id in self._incoming:
            # A status speaks of both then, so neither can go on.
            self._fail(message.id, _GLIB_EXISTS, "an id that is in use")
            return
        if len(self._incoming) >= TRANSFERS_MAX:
            self._refuse_error(message.id, _GLIB_FAILED, f"more than {TRANSFERS_MAX} transfers")
            return
        try:
            info = FileInfo.unpack(message.info)
        except MessageError as error:
            self._refuse_error(message.id, _GLIB_FAILED, str(error))
            return
        name = safe_name(info.name)
        if not name:
            self._refuse_error(message.id, _GLIB_INVALID_FILENAME, f"the name {info.name[:80]!r}")
            return
        self._accept(message.id, self._directory, name, info.size)

    def _accept(self, number: int, directory: Path, name: str, size: int) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            free = self._free_space(directory)
            if size > free:
                self._refuse(number, FileXferResult.NOT_ENOUGH_SPACE, free.to_bytes(8, "little"))
                return
            path, fd = _create(directory, name)
        except OSError as error:
            self._refuse_error(number, _GLIB_FAILED, str(error))
            return
        self._incoming[number] = _Incoming(path, fd, size)
        self._send(FileXferStatus(number, FileXferResult.CAN_SEND_DATA))

    def _free_space(self, directory: Path) -> int:
        """Return how many bytes no file under way has been promised."""
        disk = os.statvfs(directory)
        promised = sum(f.size - f.written for f in self._incoming.values())
        return max(0, disk.f_bavail * disk.f_frsize - promised)

    def data(self, number: int, data: Buffer) -> None:
        """Write the next bytes of a file. Those of a transfer that has ended are dropped."""
        incoming = self._incoming.get(number)
        if incoming is None:
            return
        if incoming.written + len(data) > incoming.size:
            self._fail(number, _GLIB_FAILED, "more data than announced")
            return
        view = memoryview(data)
        try:
            while view:
                count = os.write(incoming.fd, view)
                incoming.written += count
                view = view[count:]
        except OSError as error:
            self._write_failed(number, error)
            return
        if incoming.written == incoming.size:
            self._finish(number)

    def _write_failed(self, number: int, error: OSError) -> None:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self._incoming.pop(number).remove()
            self._refuse(number, FileXferResult.NOT_ENOUGH_SPACE, bytes(8))
        else:
            self._fail(number, _GLIB_FAILED, str(error))

    def body(self, number: int) -> _FileBody:
        """Return a sink for a DATA message that is too long to arrive whole."""
        return _FileBody(self, number)

    def status(self, message: FileXferStatus) -> MessageError | None:
        """End a transfer that the sender cancels; return an error if there is none."""
        if message.id not in self._incoming:
            cause = f"transfer {message.id} does not exist"
            return MessageError("VDAgentFileXferStatusMessage.id", 0, cause)
        if message.result in (FileXferResult.CAN_SEND_DATA, FileXferResult.SUCCESS):
            cause = f"{message.result} is for the receiver of a file to say"
            return MessageError("VDAgentFileXferStatusMessage.result", 4, cause)
        self._drop(message.id)
        return None

    def cancel_all(self) -> None:
        """Remove what is not complete: the sender is gone."""
        for number in list(self._incoming):
            self._drop(number)

    def _finish(self, number: int) -> None:
        incoming = self._incoming.pop(number)
        try:
            os.close(incoming.fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                incoming.path.unlink()
            self._refuse_error(number, _GLIB_FAILED, str(error))
            return
        self._send(FileXferStatus(number, FileXferResult.SUCCESS))
        self._on_end(incoming.path)

    def _fail(self, number: int, glib_error: int, why: str) -> None:
        self._incoming.pop(number).remove()
        self._refuse_error(number, glib_error, why)

    def _drop(self, number: int) -> None:
        self._incoming.pop(number).remove()
        self._on_end(None)

    def _refuse_error(self, number: int, glib_error: int, why: str) -> None:
        log.warning("file transfer %d refused: %s", number, why)
        detail = b"\0" + glib_error.to_bytes(4, "little")
        self._refuse(number, FileXferResult.ERROR, detail)

    def _refuse(self, number: int, result: FileXferResult, detail: bytes = b"") -> None:
        if not self.detailed:
            result, detail = min(result, FileXferResult.ERROR), b""
        self._send(FileXferStatus(number, result, detail))
        self._on_end(None)


class _FileBody:
    """Hands the pieces of one DATA message on."""

    def __init__(self, receiver: FileReceiver, number: int) -> None:
        self._receiver = receiver
        self._number = number

    def feed(self, data: Buffer) -> None:
        self._receiver.data(self._number, data)

    def end(self, complete: bool) -> None:
        """Nothing is to be done: a client that left has its transfers cancelled anyway."""


def _create(directory: Path, name: str) -> tuple[Path, int]:
    """Create a file of this name, or of this name with a number. Raises OSError."""
    stem, dot, suffix = name.rpartition(".")
    if not stem:
        stem, dot, suffix = name, "", ""
    for number in range(SAME_NAME_MAX):
        path = directory / (f"{stem} ({number}){dot}{suffix}" if number else name)
        with contextlib.suppress(FileExistsError):
            return path, os.open(path, _OPEN_FLAGS, 0o600)
    raise FileExistsError(errno.EEXIST, f"{SAME_NAME_MAX} files of that name exist", name)
