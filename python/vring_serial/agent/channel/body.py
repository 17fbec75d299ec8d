"""The payload of one long message on its way from a link to whoever consumes it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

from vring_serial.agent.channel.link import AgentLink, BodySink
from vring_serial.agent.channel.outbox import held_bytes, kept
from vring_serial.agent.errors import AgentError, AgentGoneError, AgentTimeoutError
from vring_serial.proto.agent import Buffer, UnknownMessage
from vring_serial.ratelimit import RateLimitedLog

T = TypeVar("T")


class BodyReader:
    """A sink while the payload arrives, and an async iterator for who wants it.

    At most one piece more than ``HOLD_AT`` bytes wait in memory: the link is not read while the
    consumer lags behind.

    Args:
        link: where the payload comes from.
        what: it, for messages.
        on_end: called once, when all of it has come or nobody wants the rest.
    """

    HOLD_AT = 1 << 20

    def __init__(
        self, link: AgentLink, what: str, on_end: Callable[[], None] = lambda: None
    ) -> None:
        self.link = link
        self._what = what
        self._waiting: list[Buffer] = []
        self._bytes = 0
        self._held = False
        self._done = False
        self._error: AgentError | None = None
        self._changed = asyncio.Event()
        self._on_end = on_end

    @property
    def failed(self) -> bool:
        """Whether nobody wants the payload any more."""
        return self._error is not None

    def feed(self, data: Buffer) -> None:
        """Keep the next bytes for the consumer; the link is not read while too many wait.

        See :class:`BodySink`. Bytes that nobody wants any more are dropped.
        """
        if self._error is not None:
            return
        data = kept(data)
        self._waiting.append(data)
        self._bytes += held_bytes(data)
        self._changed.set()
        if self._bytes > self.HOLD_AT and not self._held:
            self._held = True
            self.link.hold_reading()

    def end(self, complete: bool) -> None:
        """Let the consumer finish with the bytes that wait; see :class:`BodySink`.

        Unless the payload is complete, the consumer has AgentGoneError instead of the rest.
        """
        if not complete:
            self.fail(AgentGoneError(f"the agent channel closed in the middle of {self._what}"))
        self._done = True
        self._changed.set()
        self._tell_end()

    def fail(self, error: AgentError) -> None:
        """Let whoever waits for the payload have this error instead."""
        self._error = self._error or error
        self._discard()
        self._changed.set()
        self._tell_end()

    def _tell_end(self) -> None:
        on_end, self._on_end = self._on_end, lambda: None
        on_end()

    def _discard(self) -> None:
        self._waiting.clear()
        self._bytes = 0
        if self._held:
            self._held = False
            self.link.release_reading()

    async def pieces(self, timeout: float) -> AsyncGenerator[Buffer]:
        """Iterate over the data as they come. Raises what ended them, or AgentTimeoutError."""
        while self._error is None:
            if self._waiting:
                data = b"".join(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
                self._discard()
                yield data
            elif self._done:
                return
            else:
                await self._change(timeout)
        raise self._error

    async def _change(self, timeout: float) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        except TimeoutError:
            raise AgentTimeoutError(f"no {self._what} came within {timeout:g} s") from None


class _UsersSink:
    """Wraps a user's sink: logs what it raises, and then feeds it no more."""

    def __init__(self, log: RateLimitedLog, sink: BodySink) -> None:
        self._log = log
        self._sink: BodySink | None = sink

    def feed(self, data: Buffer) -> None:
        if self._sink is not None:
            self._guarded(self._sink.feed, data)

    def end(self, complete: bool) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:
            self._guarded(sink.end, complete)

    def _guarded(self, function: Callable[[T], None], argument: T) -> None:
        try:
            function(argument)
        except Exception as error:
            self._sink = None
            self._log.log(logging.ERROR, "a sink of on_body failed", exc_info=error)


def users_sink(
    log: RateLimitedLog,
    make: Callable[[UnknownMessage, int], BodySink | None],
    head: UnknownMessage,
    size: int,
) -> BodySink | None:
    """Return the sink that a user's function makes; None, which discards it, if that raises."""
    try:
        sink = make(head, size)
    except Exception as error:
        log.log(logging.ERROR, "on_body failed", exc_info=error)
        return None
    return None if sink is None else _UsersSink(log, sink)
