"""Matches each answer of the other end to whoever asked, since the answers carry no id.

It serves REPLYs, at a host's end and in the router, and clipboard data.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from vring_serial.agent.channel.link import AgentLink
from vring_serial.agent.errors import AgentGoneError, AgentTimeoutError
from vring_serial.proto.agent import Message, Reply, message_name

Asker = TypeVar("Asker")

REPLY_WAIT = 2.0
"""Seconds for an answer, before the next may be asked for. An agent answers at once or not at all:
spice-vdagentd 0.22.1 says nothing to monitors that it does not understand."""


class Replies(Generic[Asker]):
    """Who has asked for an answer to messages of one kind, in order.

    One asker after another: an answer would else be taken for that to an earlier message which the
    other end has not answered. An asker that stops waiting is still owed its answer, until
    REPLY_WAIT is over.
    """

    def __init__(self) -> None:
        self._owed: deque[tuple[Asker, float]] = deque()
        self._asking = asyncio.Lock()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._owed)

    async def ask(self, asker: Asker, send: Callable[[], Awaitable[None]]) -> None:
        """Send a message once nobody else is owed an answer, or the other end is silent too long.

        Raises what ``send`` raises; who fails or leaves before it is done has asked nothing.
        """
        async with self._asking:
            await self._turn(asker)
            await send()
            self._owed.append((asker, time.monotonic()))

    @property
    def next(self) -> Asker | None:
        """Who is owed the next answer."""
        return self._owed[0][0] if self._owed else None

    async def _turn(self, asker: Asker) -> None:
        while True:
            self._forget_overdue()
            if all(other is asker for other, _ in self._owed):
                return
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._owed[0][1] + REPLY_WAIT - time.monotonic()):
                    await self._changed.wait()

    def _forget_overdue(self) -> None:
        while self._owed and time.monotonic() - self._owed[0][1] >= REPLY_WAIT:
            self._owed.popleft()

    def answered(self) -> Asker | None:
        """Take an answer; return whose it is."""
        self._changed.set()
        return self._owed.popleft()[0] if self._owed else None

    def clear(self) -> list[Asker]:
        """Nothing is owed any more; returns those that are left without an answer."""
        self._changed.set()
        left = [asker for asker, _ in self._owed]
        self._owed.clear()
        return left


class ReplyCall:
    """An asker that waits for one REPLY, or has stopped waiting for it.

    Attributes:
        reply: the error number that it says.
    """

    def __init__(self) -> None:
        self.reply: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def fail(self, error: AgentGoneError) -> None:
        """There will be none."""
        if not self.reply.done():
            self.reply.set_exception(error)
            self.reply.exception()  # it may be that nobody is waiting at this moment


class ReplyCalls:
    """The calls of one end that wait for REPLYs to what they sent, by the type of the message."""

    def __init__(self) -> None:
        self._replies: dict[int, Replies[ReplyCall]] = {}

    async def ask(self, link: AgentLink, call: ReplyCall, message: Message, timeout: float) -> int:
        """Send a message and wait for the REPLY to it; return the error number that it says.

        An answer to an earlier message of the same call counts for this one as well. Raises
        AgentTimeoutError, AgentGoneError.
        """
        kind = message.type_number

        async def send() -> None:
            async with asyncio.timeout(timeout):
                await link.send(message)

        try:
            await self._replies.setdefault(kind, Replies()).ask(call, send)
            async with asyncio.timeout(timeout):
                return await asyncio.shield(call.reply)
        except TimeoutError:
            raise AgentTimeoutError(
                f"the agent did not answer {message_name(kind)} within {timeout:g} s"
            ) from None

    def receive(self, message: Reply) -> bool:
        """Give a REPLY to the call that it answers; return whether there was one."""
        replies = self._replies.get(message.to)
        call = replies.answered() if replies is not None else None
        if call is not None and not call.reply.done():
            call.reply.set_result(message.error)
        return call is not None

    def fail(self, why: str) -> None:
        """End all calls with AgentGoneError, because no answer will come."""
        for replies in self._replies.values():
            for call in replies.clear():
                call.fail(AgentGoneError(f"{why} before it answered"))
