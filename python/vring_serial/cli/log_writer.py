"""Writing lines to where they may not be taken, without ever waiting for that."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable

#: Bytes of lines that wait to be written; more are dropped and counted.
QUEUE_BYTES = 256 * 1024
#: Seconds until writing is tried again after an error (a full disk); twice as long each time.
RETRY_SECONDS = 1.0
RETRY_MOST = 30.0


class LineWriter:
    """Writes lines in a thread of its own, which alone waits for a reader that has stopped.

    Once a line was dropped, all are until those that wait are written; then comes the count.

    Args:
        write: writes some bytes and returns how many; may block. Raises OSError or ValueError.
        dropped: makes the line that says how many were dropped.
    """

    def __init__(self, write: Callable[[bytes], int], dropped: Callable[[int], bytes]) -> None:
        self._write = write
        self._dropped_line = dropped
        self._lines: deque[bytes] = deque()
        self._bytes = 0  # of them
        self._dropped = 0
        self._busy = False
        self._failing = False
        self._torn = False  # what was written last is half a line
        self._closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def put(self, line: bytes) -> None:
        """Write ``line``, which ends in a newline, after all others; or drop it."""
        with self._changed:
            if self._dropped or self._bytes + len(line) > QUEUE_BYTES:
                self._dropped += 1
            else:
                self._lines.append(line)
                self._bytes += len(line)
                self._changed.notify_all()

    def flush(self, timeout: float) -> None:
        """Wait until all is written, or cannot be, at most so many seconds."""
        with self._changed:
            self._changed.wait_for(self._idle, timeout)

    def close(self) -> None:
        """Take no more than what waits already; the thread ends with that."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _idle(self) -> bool:
        return self._failing or not (self._lines or self._dropped or self._busy)

    def _run(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                self._busy = False
                self._failing = bool(pause)
                self._changed.notify_all()
                if pause:
                    self._changed.wait_for(lambda: self._closed, pause)
                self._changed.wait_for(lambda: self._lines or self._dropped or self._closed)
                if self._closed and not (self._lines or (self._dropped and not pause)):
                    return
                self._busy = True
                line, count = self._next()
            try:
                self._write_all(line)
                pause = 0.0
            except (OSError, ValueError):
                pause = min(2 * pause, RETRY_MOST) or RETRY_SECONDS
                with self._changed:
                    self._dropped += count + len(self._lines)
                    self._lines.clear()
                    self._bytes = 0

    def _next(self) -> tuple[bytes, int]:
        """What is to be written, and how many lines it stands for."""
        if self._lines:
            line = self._lines.popleft()
            self._bytes -= len(line)
            return line, 1
        count, self._dropped = self._dropped, 0
        return self._dropped_line(count), count

    def _write_all(self, line: bytes) -> None:
        rest = b"\n" + line if self._torn else line
        while rest:
            rest = rest[self._write(rest) :]
            self._torn = bool(rest)


def write_to(fd: int) -> Callable[[bytes], int]:
    """Writes to a descriptor, which others may have made non-blocking."""

    def write(data: bytes) -> int:
        while True:
            try:
                return os.write(fd, data)
            except BlockingIOError:
                poller = select.poll()
                poller.register(fd, select.POLLOUT)
                poller.poll()

    return write
