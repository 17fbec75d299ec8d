"""Logging what a peer can cause as often as it likes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence


class LogBudget:
    """How much may be logged in all: so much at once, and so much in a second for ever.

    What exceeds it is left out and counted. Once something was left out, everything is until
    ``resume`` is saved up again, so that the count comes seldom.

    Args:
        burst: the most at once, in the unit of what :meth:`admits` is asked for.
        rate: of the same, in a second.
        resume: how much has to be saved up after something was left out.
    """

    def __init__(
        self,
        *,
        burst: float,
        rate: float,
        resume: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst = burst
        self._rate = rate
        self._resume = min(resume, burst)
        self._clock = clock
        self._saved = burst
        self._since = clock()
        self._left_out = 0

    def admits(self, cost: float = 1) -> bool:
        """Whether a line of this cost may be logged; it is paid for, or counted."""
        now = self._clock()
        self._saved = min(self._burst, self._saved + self._rate * (now - self._since))
        self._since = now
        needed = max(cost, self._resume) if self._left_out else cost
        if self._saved < needed:
            self._left_out += 1
            return False
        self._saved -= cost
        return True

    def take_left_out(self) -> int:
        """Lines that were left out, to be told now that there is room; 0 if none were."""
        count, self._left_out = self._left_out, 0
        return count


class RateLimitedLog:
    """Passes at most ``burst`` messages in ``seconds`` to a logger, and counts the others.

    The count is logged with the first message of the next interval.

    Args:
        log: the logger.
        budget: what all that belong together may log, in lines.
    """

    def __init__(
        self,
        log: logging.Logger,
        *,
        burst: int = 10,
        seconds: float = 5.0,
        budget: LogBudget | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._burst = burst
        self._seconds = seconds
        self._budget = budget
        self._clock = clock
        self._since = clock()
        self._count = 0

    def warning(self, message: str, *args: object) -> None:
        """Log at level WARNING, or count."""
        self.log(logging.WARNING, message, *args)

    def log(
        self,
        level: int,
        message: str,
        *args: object,
        extra: Mapping[str, object] | None = None,
        exc_info: BaseException | None = None,
    ) -> None:
        """Log, or count."""
        now = self._clock()
        if now - self._since >= self._seconds:
            if self._count > self._burst:
                self._pass(level, "%d more messages like this", self._count - self._burst)
            self._since = now
            self._count = 0
        self._count += 1
        if self._count <= self._burst:
            self._pass(level, message, *args, extra=extra, exc_info=exc_info)

    def _pass(
        self,
        level: int,
        message: str,
        *args: object,
        extra: Mapping[str, object] | None = None,
        exc_info: BaseException | None = None,
    ) -> None:
        if self._budget is not None:
            if not self._budget.admits():
                return
            if left_out := self._budget.take_left_out():
                self._log.warning("%d lines were left out of the log", left_out)
        self._log.log(level, message, *args, extra=extra, exc_info=exc_info)


def cut(words: Sequence[str], most: int = 40) -> list[str]:
    """The first of ``words``, and how many more there are if there are more than ``most``."""
    if len(words) <= most:
        return list(words)
    return [*words[:most], f"({len(words) - most} more)"]
