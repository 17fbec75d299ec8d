"""Write log lines without ever blocking the caller."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable

#: Bytes of queued lines; further lines are dropped and counted.
QUEUE_BYTES = 256 * 1024
#: Seconds to wait after a write error (such as a full disk); doubled each time up to RETRY_MOST.
RETRY_SECONDS = 1.0
RETRY_MOST = 30.0


class LineWriter:
    """A writer of lines with its own thread; only that thread waits for a reader that stopped.

    After the first dropped line, all lines are dropped until the queue is empty; the count follows.

    Args:
        write: writes bytes and returns how many it wrote; may block, raise OSError or ValueError.
        dropped: formats the line that reports the number of dropped lines.
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
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        """Queue ``line``, which ends in a newline, or drop it."""
        with self._changed:
            if self._dropped or self._bytes + len(line) > QUEUE_BYTES:
                self._dropped += 1
            else:
                self._lines.append(line)
                self._bytes += len(line)
                self._changed.notify_all()

    def flush(self, timeout: float) -> None:
        """Wait until all lines are written or writing fails, for at most ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(self._idle, timeout)

    def close(self) -> None:
        """End the thread once the queued lines are written; do not wait for it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self, timeout: float) -> bool:
        """Wait for the end of the thread after :meth:`close`; return whether it came in time."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

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
        """Return the next line to write and the number of lines that it stands for."""
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
    """Return a blocking write function for ``fd``, also if the descriptor is non-blocking."""

    def write(data: bytes) -> int:
        while True:
            try:
                return os.write(fd, data)
            except BlockingIOError:
                poller = select.poll()
                poller.register(fd, select.POLLOUT)
                poller.poll()

    return write
