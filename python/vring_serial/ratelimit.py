"""Logging what a peer can cause as often as it likes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping


class RateLimitedLog:
    """Passes at most ``burst`` messages in ``seconds`` to a logger, and counts the others.

    The count is logged with the first message of the next interval.
    """

    def __init__(
        self,
        log: logging.Logger,
        *,
        burst: int = 10,
        seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._burst = burst
        self._seconds = seconds
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
                self._log.log(level, "%d more messages like this", self._count - self._burst)
            self._since = now
            self._count = 0
        self._count += 1
        if self._count <= self._burst:
            self._log.log(level, message, *args, extra=extra, exc_info=exc_info)
