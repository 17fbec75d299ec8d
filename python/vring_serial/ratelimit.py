"""Limit log messages that a peer can trigger."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence


class LogBudget:
    """A token bucket for log lines.

    Lines that exceed the budget are dropped and counted. After the first dropped line, the budget
    admits nothing until ``resume`` tokens have accumulated, so that counts are logged rarely.

    Args:
        burst: capacity in tokens.
        rate: tokens added per second.
        resume: tokens needed to continue after a dropped line; at most ``burst``.
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
        """Take ``cost`` tokens and return True, or count the line as dropped and return False."""
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
        """Return the number of dropped lines since the last call, and reset it."""
        count, self._left_out = self._left_out, 0
        return count


class RateLimitedLog:
    """Passes at most ``burst`` messages in ``seconds`` to a logger, and counts the others.

    The count is logged with the first message of the next interval.

    Args:
        log: the logger.
        budget: shared with other logs; each line costs one token.
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
    """Return the first ``most`` words; the last item then tells how many were cut."""
    if len(words) <= most:
        return list(words)
    return [*words[:most], f"({len(words) - most} more)"]
