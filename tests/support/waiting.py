"""Waiting for what can only be looked at; whoever can be told waits for the event instead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

#: Seconds within which what is to happen has happened, on a machine that does much else.
DEADLINE = 30.0
#: Seconds from one look to the next.
PERIOD = 0.001


async def until(
    condition: Callable[[], object], what: str = "", *, timeout: float = DEADLINE
) -> None:
    """Let the event loop run until the condition holds.

    Args:
        condition: is called again and again; what it returns is taken as true or false.
        what: is said when it does not come.
        timeout: in seconds.

    Raises:
        AssertionError: the condition does not hold in time.
    """
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, what or "not in time"
        await asyncio.sleep(PERIOD)


def wait_until(
    condition: Callable[[], object], what: str = "", *, timeout: float = DEADLINE
) -> None:
    """Do the same where no event loop runs: block this thread until the condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, what or "not in time"
        time.sleep(PERIOD)


async def turns(count: int = 20) -> None:
    """Let the event loop make so many turns, each of which does all that is ready."""
    for _ in range(count):
        await asyncio.sleep(0)
