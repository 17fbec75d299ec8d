"""Messages on their way from one link to another, in order and in bounded memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from vring_serial.agent.body import BodyReader
from vring_serial.agent.errors import AgentError, AgentGoneError
from vring_serial.agent.link import AgentLink
from vring_serial.proto.agent import (
    Buffer,
    ChunkPort,
    FileXferData,
    FileXferStart,
    TypedMessage,
    UnknownMessage,
)
from vring_serial.proto.agent.constants import FILE_DATA_MAX

QUEUE_BYTES = 512 << 10
"""Bytes that may wait before the link they come from is no longer read."""


@dataclass(frozen=True, slots=True)
class Passing:
    """A message that is passed on.

    Attributes:
        message: the whole of it; or, with a body, what stands before its payload.
        port: the chunk port it came on, which is the one it leaves on.
        body: the payload that is still coming, of ``size`` bytes, or None.
    """

    message: TypedMessage | UnknownMessage
    port: ChunkPort = ChunkPort.CLIENT
    body: BodyReader | None = None
    size: int = 0

    @property
    def cost(self) -> int:
        """About how many bytes it keeps while it waits."""
        text = len(self.message.info) if isinstance(self.message, FileXferStart) else 0
        return 256 + text + len(self.message.payload)

    async def send(self, link: AgentLink, timeout: float) -> None:
        """Send it; ``timeout`` seconds without more of a payload are too many.

        Raises as AgentLink.send and AgentLink.send_body.
        """
        if self.body is None:
            await link.send(self.message, self.port)
            return
        assert isinstance(self.message, UnknownMessage)
        await link.send_body(self.message, self.size, self.body.pieces(timeout), self.port)

    def drop(self) -> None:
        """Nobody wants it any more."""
        if self.body is not None:
            self.body.fail(AgentError("nobody takes this message"))


class Relay:
    """One queue and the task that empties it, which lives while there is something in the queue.

    Args:
        deliver: takes each message and waits until there is room for the next.
        on_trouble: told why a message did not get through, unless a link is gone.
    """

    def __init__(
        self,
        deliver: Callable[[Passing], Awaitable[None]],
        on_trouble: Callable[[AgentError], None],
    ) -> None:
        self._deliver = deliver
        self._on_trouble = on_trouble
        self._queue: deque[Passing] = deque()
        self._queued = 0
        self._held: AgentLink | None = None
        self._task: asyncio.Task[None] | None = None

    def put(self, source: AgentLink, passing: Passing) -> None:
        """Queue a message; ``source`` is not read while too much of it waits."""
        self._queue.append(passing)
        self._queued += passing.cost
        if self._queued > QUEUE_BYTES and self._held is None:
            self._held = source
            source.hold_reading()
        if self._task is None:
            self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        try:
            while self._queue:
                passing = self._queue.popleft()
                try:
                    await self._deliver(passing)
                except AgentGoneError:
                    passing.drop()
                except AgentError as error:
                    passing.drop()
                    self._on_trouble(error)
                finally:
                    self._queued -= passing.cost
                if self._queued <= QUEUE_BYTES // 2:
                    self._release()
        finally:
            # Here and not in a callback of the task: a message queued between the two would wait.
            self._task = None

    def put_body(
        self, source: AgentLink, port: ChunkPort, head: UnknownMessage, size: int
    ) -> BodyReader:
        """Queue a message whose payload of ``size`` bytes is coming; returns the sink for that."""
        body = BodyReader(source, f"data of message type {head.type}")
        self.put(source, Passing(head, port, body, size))
        return body

    def _release(self) -> None:
        if self._held is not None:
            held, self._held = self._held, None
            held.release_reading()

    def clear(self) -> None:
        """Drop what waits; a message that is being delivered goes on."""
        for passing in self._queue:
            self._queued -= passing.cost
            passing.drop()
        self._queue.clear()
        self._release()

    def stop(self) -> None:
        """Drop everything. The task ends with the loop's next turns."""
        self.clear()
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """As ``stop``, and wait for the end of the task."""
        task = self._task
        self.stop()
        if task is not None:
            await asyncio.gather(task, return_exceptions=True)
            self._task = None  # a task that never ran has not said so


class DataPieces:
    """Turns a FILE_XFER_DATA message that is too long to keep into several shorter ones."""

    def __init__(self, number: int, forward: Callable[[FileXferData], object]) -> None:
        self._number = number
        self._forward = forward

    def feed(self, data: Buffer) -> None:
        view = memoryview(data)
        for start in range(0, len(view), FILE_DATA_MAX):
            self._forward(FileXferData(self._number, view[start : start + FILE_DATA_MAX]))

    def end(self, complete: bool) -> None:
        """Every piece has been handed on already."""
