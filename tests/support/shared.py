"""What takes long to start and serves many tests, one after another."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, Protocol, TypeVar

log = logging.getLogger(__name__)


class Reusable(Protocol):
    """What can be brought back to the state in which it started."""

    async def settle(self) -> bool:
        """Clear away what a test has left; whether all is as it was at the start."""

    async def aclose(self) -> None:
        """End it."""


T = TypeVar("T", bound=Reusable)


class Shared(Generic[T]):
    """One of them for many tests; a test that spoils it spoils it for itself alone.

    Args:
        start: starts a new one.
    """

    def __init__(self, start: Callable[[], Awaitable[T]]) -> None:
        self._start = start
        self._current: T | None = None

    @asynccontextmanager
    async def turn(self, failed: Callable[[], bool]) -> AsyncIterator[T]:
        """Have it for one test, as it is at the start.

        It is ended if the test has failed, or has left something that cannot be cleared away.

        Args:
            failed: is asked after the test; the fixture of that name in tests/peers/conftest.py.
        """
        if self._current is None:
            self._current = await self._start()
        try:
            yield self._current
        finally:
            if failed() or not await self._is_settled(self._current):
                await self.aclose()

    async def _is_settled(self, current: T) -> bool:
        try:
            settled = await current.settle()
        except Exception:
            log.exception("a test has left what cannot be cleared away; the next one starts anew")
            return False
        if not settled:
            log.warning("a test has left what cannot be cleared away; the next one starts anew")
        return settled

    async def aclose(self) -> None:
        """End the one there is."""
        current, self._current = self._current, None
        if current is not None:
            await current.aclose()
