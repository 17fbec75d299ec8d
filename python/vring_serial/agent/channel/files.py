"""Sending files over an agent channel: START offers one, STATUS admits it, DATA carries it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from vring_serial.agent.channel.link import AgentLink
from vring_serial.agent.errors import (
    AgentGoneError,
    AgentTimeoutError,
    FileRefusedError,
    FileTransferError,
)
from vring_serial.proto.agent import (
    FileInfo,
    FileXferData,
    FileXferResult,
    FileXferStart,
    FileXferStatus,
    MessageError,
)
from vring_serial.proto.agent.constants import FILE_DATA_MAX

Progress = Callable[[int, int], None]
"""Called with (bytes sent, bytes in all), at the start and after every piece."""

FROM_GUEST = 1 << 31
"""Numbers of transfers from the guest begin here: a status does not say who sends its file."""
Result = TypeVar("Result")
_GLIB_ERRORS = {
    1: "not found",
    2: "it exists there already",
    4: "not a regular file",
    9: "the file name is too long",
    10: "the file name is not valid",
    12: "no space left",
    14: "permission denied",
    21: "the directory is read-only",
}


def refusal(status: FileXferStatus, size: int) -> str:
    """Return what a STATUS that ends a transfer says, for people."""
    match status.result:
        case FileXferResult.CANCELLED:
            return "the guest cancelled it"
        case FileXferResult.NOT_ENOUGH_SPACE:
            free = status.free_space
            known = "" if free is None else f": {free} bytes are free, {size} are needed"
            return f"not enough space in the guest{known}"
        case FileXferResult.SESSION_LOCKED:
            return "the guest's session is locked"
        case FileXferResult.VDAGENT_NOT_CONNECTED:
            return "nobody is logged in to the guest's desktop"
        case FileXferResult.DISABLED:
            return "the guest does not take files"
        case FileXferResult.ERROR:
            number = status.glib_error
            why = "" if number is None else f": {_GLIB_ERRORS.get(number, f'GIO error {number}')}"
            return f"the guest failed to take it{why}"
        case FileXferResult.SUCCESS:
            return "the guest had enough of it before its end"
    return f"the guest answered with the unknown status {status.result}"


@dataclass(slots=True)
class _Outgoing:
    """A transfer that the other end knows of."""

    id: int
    size: int
    admitted: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Future[FileXferStatus] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class FileSender:
    """All files that are on their way to the other end of one channel after another.

    Args:
        first_id: the transfers get this number and those after it.
    """

    def __init__(self, first_id: int = 1) -> None:
        self._first_id = first_id
        self._link: AgentLink | None = None
        self._outgoing: dict[int, _Outgoing] = {}
        self._last_id = first_id - 1

    def begin_session(self, link: AgentLink) -> None:
        """Start anew with the other end, which knows of no transfer."""
        self.end_session("the agent started anew")
        self._link = link

    def end_session(self, why: str) -> None:
        """End all transfers: the other end is gone."""
        self._link = None
        for outgoing in self._outgoing.values():
            outgoing.admitted.set()
            if not outgoing.ended.done():
                outgoing.ended.set_exception(AgentGoneError(f"{why} during the file transfer"))
                outgoing.ended.exception()  # it may be that nobody is waiting at this moment
        self._outgoing.clear()

    def receive_status(self, status: FileXferStatus) -> MessageError | None:
        """Take a STATUS; return an error if it belongs to no transfer that could have one."""
        outgoing = self._outgoing.get(status.id)
        if outgoing is None:
            if self._first_id <= status.id <= self._last_id:
                return None  # of a transfer that was cancelled while this was on its way
            cause = f"transfer {status.id} does not exist"
            return MessageError("VDAgentFileXferStatusMessage.id", 0, cause)
        if status.result == FileXferResult.CAN_SEND_DATA:
            outgoing.admitted.set()
        elif not outgoing.ended.done():
            outgoing.ended.set_result(status)
            outgoing.admitted.set()
        return None

    def refuse(self, path: Path) -> None:
        """Offer a file that cannot be read after all, so that the other end knows that."""
        if self._link is not None:
            with contextlib.suppress(FileTransferError), self._transfer(self._link, 0) as outgoing:
                self._link.post(FileXferStart(outgoing.id, FileInfo(path.name, 1).pack()))
                raise FileTransferError(f"{path} cannot be read")

    async def send(
        self, path: Path, *, name: str | None, on_progress: Progress | None, timeout: float
    ) -> None:
        """Send one file; see :meth:`HostAgent.send_file`."""
        with _open(path) as file:
            link = self._link
            if link is None:
                raise AgentGoneError("no agent is connected")
            size = os.fstat(file.fileno()).st_size
            with self._transfer(link, size) as outgoing:
                info = FileInfo(name or path.name, size).pack()
                await link.send(FileXferStart(outgoing.id, info))
                offered = outgoing.admitted.wait()
                await _within(timeout, offered, f"did not answer the offer of {path}")
                sent = await self._send_data(link, outgoing, file, on_progress, timeout)
                confirmed = asyncio.shield(outgoing.ended)
                status = await _within(timeout, confirmed, f"did not confirm {path}")
        if status.result != FileXferResult.SUCCESS or sent < size:
            raise FileRefusedError(f"{path}: {refusal(status, size)}")

    @contextlib.contextmanager
    def _transfer(self, link: AgentLink, size: int) -> Iterator[_Outgoing]:
        """Begin a transfer; cancel it on the other end if the block fails before its end."""
        self._last_id = self._first_id + (self._last_id + 1 - self._first_id) % (FROM_GUEST - 1)
        outgoing = self._outgoing[self._last_id] = _Outgoing(self._last_id, size)
        try:
            yield outgoing
        except BaseException:
            if not outgoing.ended.done():
                link.post(FileXferStatus(outgoing.id, FileXferResult.CANCELLED))
            raise
        finally:
            self._outgoing.pop(outgoing.id, None)

    async def _send_data(
        self,
        link: AgentLink,
        outgoing: _Outgoing,
        file: io.FileIO,
        on_progress: Progress | None,
        timeout: float,
    ) -> int:
        """Send the file's bytes until the other end has ended the transfer; returns how many."""
        size = outgoing.size
        piece = memoryview(bytearray(FILE_DATA_MAX))
        sent = 0
        if on_progress is not None:
            on_progress(0, size)
        while not outgoing.ended.done():
            # An empty file is one piece of no bytes; no other has an empty piece.
            wanted = min(FILE_DATA_MAX, size - sent)
            if file.readinto(piece[:wanted]) < wanted:
                raise FileTransferError(f"{file.name}: became shorter while it was sent")
            message = FileXferData(outgoing.id, piece[:wanted])
            await _within(timeout, link.send(message), f"took no more of {file.name}")
            sent += wanted
            if on_progress is not None:
                on_progress(sent, size)
            if sent == size:
                break
        return sent


def _open(path: Path) -> io.FileIO:
    """Open the file for reading, if it is a regular one. Raises FileTransferError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise FileTransferError(f"{path}: {error.strerror}") from None
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        file = io.FileIO(fd)
        file.name = str(path)
        return file
    os.close(fd)
    what = "a directory; send the files in it" if stat.S_ISDIR(mode) else "not a regular file"
    raise FileTransferError(f"{path}: is {what}")


async def _within(timeout: float, work: Awaitable[Result], what: str) -> Result:
    """Return the result of ``work``; AgentTimeoutError says what the agent did not do."""
    try:
        async with asyncio.timeout(timeout):
            return await work
    except TimeoutError:
        raise AgentTimeoutError(f"the agent {what} within {timeout:g} s") from None
