"""Messages on their way from one link to another, in order and in bounded memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from vring_serial.agent.channel.link import AgentLink
from vring_serial.agent.channel.outbox import kept, message_cost
from vring_serial.agent.channel.spool import Spool
from vring_serial.agent.errors import AgentError, AgentGoneError, AgentTimeoutError
from vring_serial.proto.agent import (
    Buffer,
    ChunkPort,
    FileXferData,
    TypedMessage,
    UnknownMessage,
)
from vring_serial.proto.agent.constants import FILE_DATA_MAX

QUEUE_BYTES = 512 << 10
"""Bytes that may wait in memory before the link they come from is no longer read."""
SPOOLED_MAX = 256 << 20
"""Bytes of long messages that may wait for one receiver before it is given up."""
HOLD_SECONDS = 2.0
"""How long one receiver may keep a link from being read that others share, before it is seen
whether it has taken HOLD_BYTES meanwhile."""
HOLD_BYTES = 512 << 10


@dataclass(frozen=True, slots=True)
class Passing:
    """A message that is passed on.

    Attributes:
        message: the whole of it; or, with a body, what stands before its payload.
        port: the chunk port it came on, which is the one it leaves on.
        body: the payload, or None.
    """

    message: TypedMessage | UnknownMessage
    port: ChunkPort = ChunkPort.CLIENT
    body: Spool | None = None

    @property
    def cost(self) -> int:
        """About how many bytes of memory it takes while it waits, a body aside."""
        return message_cost(self.message)

    @property
    def spooled(self) -> int:
        """Bytes of its body."""
        return self.body.size if self.body is not None else 0

    async def send(self, link: AgentLink) -> None:
        """Send it. Raises as AgentLink.send and AgentLink.send_body."""
        if self.body is None:
            await link.send(self.message, self.port)
            return
        assert isinstance(self.message, UnknownMessage)
        await link.send_body(self.message, self.body.size, self.body.pieces(), self.port)

    def close(self) -> None:
        """Free the body: it was sent, or nobody wants it any more."""
        if self.body is not None:
            self.body.close()


def _to_keep(passing: Passing) -> Passing:
    """Return the message so that it keeps no more in memory than its cost says."""
    message = passing.message
    if isinstance(message, (FileXferData, UnknownMessage)):
        return replace(passing, message=replace(message, data=kept(message.data)))
    return passing


class Relay:
    """One queue and the task that empties it, which lives while there is something in the queue.

    Args:
        deliver: takes each message and waits until there is room for the next.
        on_trouble: told why a message did not get through, unless a link is gone.
        taker: the link of who takes the messages where the links that they come from are others'
            as well: it is given up if it holds those up too long, or lets too much wait.
        is_shared: whether there are others now.
    """

    def __init__(
        self,
        deliver: Callable[[Passing], Awaitable[None]],
        on_trouble: Callable[[AgentError], None],
        *,
        taker: AgentLink | None = None,
        is_shared: Callable[[], bool] = lambda: False,
    ) -> None:
        self._deliver = deliver
        self._on_trouble = on_trouble
        self._taker = taker
        self._is_shared = is_shared
        self._queue: deque[Passing] = deque()
        self._queued = 0
        self._spooled = 0
        self._held: AgentLink | None = None
        self._hold_timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Messages in the queue, apart from the one that is being delivered."""
        return len(self._queue)

    def put(self, source: AgentLink, passing: Passing) -> None:
        """Queue a message; ``source`` is not read while too much of it waits.

        A body is charged to a source of one's own as the rest is. One that is shared is not held
        for it; a receiver with too much of that is given up.
        """
        passing = _to_keep(passing)
        self._queue.append(passing)
        self._count(passing, 1)
        if self._taker is not None and self._spooled > SPOOLED_MAX:
            waiting = f"{self._spooled} bytes of long messages"
            self._taker.fail(AgentError(f"it left {waiting} unread"))
        if self._queued > QUEUE_BYTES and self._held is None:
            self._held = source
            source.hold_reading()
            self._watch_hold()
        if self._task is None:
            self._task = asyncio.ensure_future(self._run())

    def _count(self, passing: Passing, sign: int) -> None:
        self._queued += sign * passing.cost
        if self._taker is None:
            self._queued += sign * passing.spooled
        else:
            self._spooled += sign * passing.spooled

    def _watch_hold(self) -> None:
        if self._taker is not None:
            loop = asyncio.get_running_loop()
            taken = self._taker.taken
            self._hold_timer = loop.call_later(HOLD_SECONDS, self._check_hold, taken)

    def _check_hold(self, taken_before: int) -> None:
        assert self._taker is not None
        taken = self._taker.taken - taken_before
        if taken < HOLD_BYTES and self._is_shared():
            why = f"it took {taken} bytes in {HOLD_SECONDS:g} s while others waited for it"
            self._taker.fail(AgentTimeoutError(why))
        else:
            self._watch_hold()

    async def _run(self) -> None:
        try:
            while self._queue:
                passing = self._queue.popleft()
                try:
                    await self._deliver(passing)
                except AgentGoneError:
                    pass
                except AgentError as error:
                    self._on_trouble(error)
                finally:
                    passing.close()
                    self._count(passing, -1)
                if self._queued <= QUEUE_BYTES // 2:
                    self._release()
        finally:
            # Here and not in a callback of the task: a message queued between the two would wait.
            self._task = None

    def _release(self) -> None:
        if self._hold_timer is not None:
            self._hold_timer.cancel()
            self._hold_timer = None
        if self._held is not None:
            held, self._held = self._held, None
            held.release_reading()

    def clear(self) -> None:
        """Drop what waits; a message that is being delivered goes on."""
        for passing in self._queue:
            self._count(passing, -1)
            passing.close()
        self._queue.clear()
        self._release()

    def stop(self) -> None:
        """Drop everything. The task ends with the loop's next turns."""
        self.clear()
        if self._task is not None:
            self._task.cancel()

    async def aclose(self) -> None:
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
        """Forward ``data`` in messages of at most FILE_DATA_MAX bytes, without copying it."""
        view = memoryview(data)
        for start in range(0, len(view), FILE_DATA_MAX):
            self._forward(FileXferData(self._number, view[start : start + FILE_DATA_MAX]))

    def end(self, complete: bool) -> None:
        """Do nothing: every piece has been forwarded already."""
