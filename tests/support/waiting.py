"""Waiting for what can only be looked at; whoever can be told waits for the event instead.

That nothing happens cannot be waited for: :func:`turns`, :class:`LoopClock` and whatever else comes
after it in order are barriers, behind which it would have happened.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

#: Seconds within which what is to happen has happened, on a machine that does much else.
DEADLINE = 30.0
#: Seconds from one look to the next.
PERIOD = 0.001

#: What is said when something does not come; a function is called at that moment.
What = str | Callable[[], str]


def _check(end: float, what: What, unless: Callable[[], object] | None) -> None:
    given_up = unless is not None and unless()
    if given_up or time.monotonic() >= end:
        text = what if isinstance(what, str) else what()
        raise AssertionError(f"{text or 'what was waited for'}: {given_up or 'not in time'}")


async def until(
    condition: Callable[[], object],
    what: What = "",
    *,
    timeout: float = DEADLINE,
    unless: Callable[[], object] | None = None,
) -> None:
    """Let the event loop run until the condition holds.

    Args:
        condition: is called again and again; what it returns is taken as true or false, and is
            awaited first if it can be.
        what: is said when it does not come.
        timeout: in seconds.
        unless: is called as often; once it returns something true, waiting is given up. What it
            returned is said too.

    Raises:
        AssertionError: the condition does not hold in time, or ``unless`` does.
    """
    end = time.monotonic() + timeout
    while True:
        holds = condition()
        if inspect.isawaitable(holds):
            holds = await holds
        if holds:
            return
        _check(end, what, unless)
        await asyncio.sleep(PERIOD)


async def until_gives(
    ask: Callable[[], Awaitable[object]], wanted: object, *, timeout: float = DEADLINE
) -> None:
    """Ask again and again until this is the answer."""
    answer: list[object] = []

    async def is_right() -> bool:
        answer[:] = [await ask()]
        return answer == [wanted]

    await until(is_right, lambda: f"{wanted!r:.1000} and not {answer!r:.1000}", timeout=timeout)


def wait_until(
    condition: Callable[[], object],
    what: What = "",
    *,
    timeout: float = DEADLINE,
    unless: Callable[[], object] | None = None,
) -> None:
    """Do the same where no event loop runs: block this thread until the condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        _check(end, what, unless)
        time.sleep(PERIOD)


async def until_file_says(
    path: Path, text: str | bytes, count: int = 1, *, unless: Callable[[], object] | None = None
) -> None:
    """Wait until a file is there and contains ``text`` so many times."""
    wanted = text.encode() if isinstance(text, str) else text

    def content() -> bytes:
        return path.read_bytes() if path.exists() else b""

    def what() -> str:
        said = content()[-10000:].decode(errors="replace")
        return f"{text!r} is not {count} times in {path.name}, which ends so:\n{said}\n"

    await until(lambda: content().count(wanted) >= count, what, unless=unless)


async def until_logged(caplog: pytest.LogCaptureFixture, text: str, count: int = 1) -> None:
    """Wait until ``text`` was logged so many times."""
    await until(lambda: caplog.text.count(text) >= count, lambda: f"{text!r} in {caplog.text}")


async def turns(count: int = 20) -> None:
    """Let the event loop make so many turns, each of which does all that is ready."""
    for _ in range(count):
        await asyncio.sleep(0)


class LoopClock:
    """The clock of the running event loop, which can be put forward: timers come due at once.

    Time passes besides, as ever. Whatever waits with the loop's clock is put forward, a test's own
    ``asyncio.timeout`` among it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time
        self._ahead = 0.0
        monkeypatch.setattr(loop, "time", lambda: now() + self._ahead)

    async def forward(self, seconds: float) -> None:
        """Let so much time pass, and then the loop do what is due.

        A timer that starts itself anew comes due once, however many seconds it is.
        """
        self._ahead += seconds
        await turns()
