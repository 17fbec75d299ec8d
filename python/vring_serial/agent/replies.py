"""To whom the agent's REPLYs belong, which do not say it themselves."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Asker = TypeVar("Asker")

REPLY_WAIT = 2.0
"""Seconds for a REPLY, before those of others may be asked for. An agent answers at once or not at
all: spice-vdagentd 0.22.1 says nothing to monitors that it does not understand."""


class Replies(Generic[Asker]):
    """Who has asked for a REPLY to messages of one type, in order.

    One asker after another: a REPLY would else be taken for the answer to an earlier message that
    the agent has no answer to.
    """

    def __init__(self) -> None:
        self._owed: deque[tuple[Asker, float]] = deque()
        self._asking = asyncio.Lock()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._owed)

    async def ask(self, asker: Asker, send: Callable[[], Awaitable[None]]) -> None:
        """Send a message once the agent owes nobody else a REPLY, or has been silent for too long.

        Raises what ``send`` raises; who fails or leaves before it is done has asked nothing.
        """
        async with self._asking:
            await self._turn(asker)
            await send()
            self._owed.append((asker, time.monotonic()))

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
        """A REPLY came; returns whose it is."""
        self._changed.set()
        return self._owed.popleft()[0] if self._owed else None

    def clear(self) -> list[Asker]:
        """The agent owes nothing any more; returns those that it leaves without an answer."""
        self._changed.set()
        left = [asker for asker, _ in self._owed]
        self._owed.clear()
        return left
