"""Decides which client receives the files that the guest sends (FILES_FROM_GUEST).

A transfer from the guest does not say who asked for it. So one client asks at a time, and the turn
is its own until all files on the list that it was given have come, or have not.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol

from vring_serial.agent.channel.clipboard import Answer, ForwardedSource, pieces_of
from vring_serial.agent.channel.files import FROM_GUEST
from vring_serial.agent.errors import AgentError
from vring_serial.proto.agent import (
    Buffer,
    FileList,
    FileXferData,
    FileXferResult,
    FileXferStart,
    FileXferStatus,
    MessageError,
)
from vring_serial.proto.agent.filelist import PATHS_MAX

LIST_BYTES_MAX = 4 << 20
"""Longest list of files."""
IDLE = 30.0
"""Seconds without progress of a file before the turn passes on. What ends, admits or is a part of a
transfer is progress; to admit one again is not."""


class FilesClient(Protocol):
    """A client that may ask for files."""

    @property
    def takes_files(self) -> bool:
        """Whether it has announced FILES_FROM_GUEST."""

    def file_from_guest(self, message: FileXferStart | FileXferData | FileXferStatus) -> None:
        """Pass a message of a transfer from the guest on to it."""


@dataclass(slots=True)
class _Turn:
    client: FilesClient | None
    expected: int | None = None  # files; None until the list is there
    started: int = 0
    ended: int = 0
    timer: asyncio.TimerHandle | None = None


class GuestFiles:
    """The transfers from one guest.

    Args:
        to_guest: sends a status to the guest.
    """

    def __init__(self, to_guest: Callable[[FileXferStatus], None]) -> None:
        self._to_guest = to_guest
        self._free = asyncio.Lock()
        self._turn: _Turn | None = None
        self._open: dict[int, bool] = {}  # and whether the client has admitted it

    # --- the list

    async def begin(self, client: FilesClient) -> _Turn:
        """Wait for a turn of this client's."""
        await self._free.acquire()
        self._turn = turn = _Turn(client)
        return turn

    def listed(self, turn: _Turn, data: bytes) -> None:
        """Note the guest's list, whose files follow."""
        try:
            turn.expected = len(FileList.unpack(data).paths)
        except MessageError:
            turn.expected = 0
        if turn is self._turn:
            self._count(turn, 0)

    def end(self, turn: _Turn) -> None:
        """End a turn, so that the next client may ask. Does nothing if it has ended."""
        if turn is not self._turn:
            return
        self._turn = None
        if turn.timer is not None:
            turn.timer.cancel()
        self._refuse_open()
        self._free.release()

    def _refuse_open(self) -> None:
        for number in self._open:
            self._to_guest(FileXferStatus(number, FileXferResult.CANCELLED))
        self._open.clear()

    def _count(self, turn: _Turn, ended: int) -> None:
        """Something happened, and so many files more have come to their end."""
        turn.ended += ended
        if turn.timer is not None:
            turn.timer.cancel()
        if turn.expected is not None and turn.ended >= turn.expected:
            self.end(turn)
        else:
            turn.timer = asyncio.get_running_loop().call_later(IDLE, self.end, turn)

    # --- the transfers

    @property
    def under_way(self) -> int:
        """Transfers that have begun and not ended."""
        return len(self._open)

    def from_guest(self, message: FileXferStart | FileXferData | FileXferStatus) -> bool:
        """Pass on a message of a transfer that the guest began; return whether it was of one."""
        turn = self._turn
        if isinstance(message, FileXferStart):
            client = turn.client if turn is not None else None
            if client is None or not client.takes_files or not self._may_start(turn, message.id):
                self._to_guest(FileXferStatus(message.id, FileXferResult.CANCELLED))
                if turn is not None:
                    self._count(turn, 1)
                return True
            self._open[message.id] = False
        elif message.id not in self._open:
            return False
        assert turn is not None
        if turn.client is not None:
            turn.client.file_from_guest(message)
        if not isinstance(message, FileXferData) or len(message.data):
            self._after(turn, message)
        return True

    def _may_start(self, turn: _Turn | None, number: int) -> bool:
        """Count a transfer of this turn; no more are passed on than the list can have."""
        if turn is None or number < FROM_GUEST or number in self._open:
            return False
        turn.started += 1
        return turn.started <= (PATHS_MAX if turn.expected is None else turn.expected)

    def from_client(self, client: FilesClient, status: FileXferStatus) -> bool:
        """Pass on a client's status; returns whether it was of a transfer from the guest to it."""
        turn = self._turn
        if turn is None or turn.client is not client or status.id not in self._open:
            return False
        if status.result == FileXferResult.CAN_SEND_DATA:
            if self._open[status.id]:
                return True
            self._open[status.id] = True
        self._to_guest(status)
        self._after(turn, status)
        return True

    def _after(self, turn: _Turn, message: FileXferStart | FileXferData | FileXferStatus) -> None:
        ended = (
            isinstance(message, FileXferStatus) and message.result != FileXferResult.CAN_SEND_DATA
        )
        if ended:
            del self._open[message.id]
        self._count(turn, ended)

    def client_left(self, client: FilesClient) -> None:
        """Refuse what the guest still has for it."""
        turn = self._turn
        if turn is not None and turn.client is client:
            turn.client = None
            ended = len(self._open)
            self._refuse_open()
            self._count(turn, ended)

    def guest_left(self) -> None:
        """There is nothing to wait for any more."""
        self._open.clear()
        if self._turn is not None:
            self.end(self._turn)


@dataclass(frozen=True, slots=True)
class GuestFileList(ForwardedSource):
    """The guest's list of files, and a turn for who asks for it.

    Attributes:
        files: of the guest.
        client: who may ask.
    """

    files: GuestFiles
    client: FilesClient

    @contextlib.asynccontextmanager
    async def asked(self) -> AsyncGenerator[Answer]:
        turn = await self.files.begin(self.client)
        try:
            async with self.owner.asked(self.selection, self.type, self.timeout) as reader:
                if reader.size > LIST_BYTES_MAX:
                    raise AgentError(f"a list of files of {reader.size} bytes")
                data = b"".join([piece async for piece in reader.pieces(self.timeout)])
        except BaseException:
            self.files.end(turn)
            raise
        self.files.listed(turn, data)
        yield _Whole(data)


class _Whole:
    """An answer that is all there."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = data

    def pieces(self, timeout: float) -> AsyncGenerator[Buffer]:
        return pieces_of(self._data)
