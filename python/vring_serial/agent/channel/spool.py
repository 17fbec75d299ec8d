"""Long messages kept whole until they can be passed on: in memory while short, then in a file.

What has been passed on in part cannot be taken back: the sender of a half message that leaves, or
stops, would take the receiver's session along, and a receiver that reads slowly would keep the
sender from everybody else. So one end's long message is received to its end before another end is
sent any of it.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, Callable

from vring_serial.agent.errors import AgentError
from vring_serial.proto.agent import Buffer
from vring_serial.proto.agent.constants import PIECE_MAX

MEMORY_MAX = 1 << 20
"""Bytes of one message in memory; the rest of a longer one is in an unnamed temporary file."""
MESSAGE_MAX = 100 << 20
"""Longest message that is kept, in bytes: the longest clipboard that spice-gtk takes."""
ROOM = 1 << 30
"""Bytes of all messages that are kept at a time."""


class SpoolRoom:
    """The room that all spools of one router have together."""

    def __init__(self) -> None:
        self.used = 0

    def take(self, size: int) -> None:
        """Take room for ``size`` bytes. Raises AgentError if there is not so much left."""
        if self.used + size > ROOM:
            raise AgentError(f"{self.used} bytes of long messages wait already")
        self.used += size


class Spool:
    """One long message: a sink while it arrives, then the source for any number of receivers.

    It is freed when the last of its users has closed it. Whoever makes it is its first user.

    Args:
        room: shared with all others.
        size: bytes of the message. Raises AgentError beyond MESSAGE_MAX.
        what: it is, for messages.
        on_end: told when all of it is there (None), or why it never will be.
        idle: seconds without more of it after which it is given up; None for ever.

    Attributes:
        size: bytes.
        error: why it never will be whole, or None.
    """

    def __init__(
        self,
        room: SpoolRoom,
        size: int,
        what: str,
        on_end: Callable[[AgentError | None], None] = lambda _: None,
        *,
        idle: float | None = None,
    ) -> None:
        if size > MESSAGE_MAX:
            raise AgentError(f"{what} of {size} bytes, at most {MESSAGE_MAX} are passed on")
        self.size = size
        self.error: AgentError | None = None
        self._room = room
        self._what = what
        self._on_end = on_end
        self._idle = idle
        self._users = 1
        self._written = 0
        self._ended = False
        self._file = tempfile.SpooledTemporaryFile(max_size=MEMORY_MAX)  # noqa: SIM115
        self._timer: asyncio.TimerHandle | None = None
        self._watch()

    def _watch(self) -> None:
        if self._idle is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._idle, self._check_progress, self._written)

    def _check_progress(self, written_before: int) -> None:
        if self._written > written_before:
            self._watch()
        else:
            self._end(AgentError(f"no more of {self._what} came within {self._idle:g} s"))

    def feed(self, data: Buffer) -> None:
        """Take the next bytes. If they cannot be kept, ``on_end`` is told why."""
        if self._ended:
            return
        try:
            self._room.take(len(data))
            self._written += len(data)
            self._file.write(data)
        except AgentError as error:
            self._end(AgentError(f"{self._what} cannot be kept: {error}"))
        except OSError as error:
            self._end(AgentError(f"{self._what} cannot be kept: {error.strerror}"))

    def end(self, complete: bool) -> None:
        """End the message: no more follows."""
        error = None if complete else AgentError(f"who sent {self._what} left in the middle of it")
        self._end(error)

    def _end(self, error: AgentError | None) -> None:
        if self._ended:
            return
        self._ended = True
        self.error = error
        if self._timer is not None:
            self._timer.cancel()
        self._on_end(error)

    def share(self) -> Spool:
        """Add a user, which closes the spool when it has read it, or will not."""
        self._users += 1
        return self

    async def pieces(self) -> AsyncGenerator[Buffer]:
        """Iterate over the message from its start. Raises AgentError if the file cannot be read."""
        at = 0
        while at < self.size:
            try:
                self._file.seek(at)
                piece = self._file.read(min(PIECE_MAX, self.size - at))
            except OSError as error:
                raise AgentError(f"{self._what} cannot be read back: {error.strerror}") from None
            at += len(piece)
            yield piece

    def close(self) -> None:
        """Remove a user."""
        self._users -= 1
        if self._users == 0:
            self._ended = True
            if self._timer is not None:
                self._timer.cancel()
            self._file.close()
            self._room.used -= self._written
            self._written = 0
