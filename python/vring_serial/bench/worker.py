"""A process of the benchmark: it runs one side of a port, one command at a time.

The processes are not forked but started by exec: they share only sockets and guest RAM.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from vring_serial.bench.child import end_child, end_with_starter, start_child
from vring_serial.bench.usage import cpu_seconds
from vring_serial.errors import ResourceError

#: Time limit for a process to end after it was told to, in seconds.
END_TIMEOUT = 10.0


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Block SIGINT, SIGTERM and SIGHUP in the main thread until the end of the block.

    For the start of a process: after an exception in between, nobody would end it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        if came:
            signal.raise_signal(came[0])


class Worker:
    """A process that holds one object; :meth:`start` calls the object's methods.

    Args:
        side: ``module:class`` within this package; the process makes it without arguments.
    """

    def __init__(self, side: str) -> None:
        self.name = side
        ours, theirs = socket.socketpair()
        with ours, theirs:
            number = theirs.fileno()
            self._process = start_child(__name__, str(number), side, pass_fds=[number])
            self._connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def start(self, method: str, *arguments: Any) -> None:
        """Start a method in the process; :meth:`finish` waits for it."""
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise self._ended() from error

    def finish(self) -> tuple[float, Any]:
        """Return when the method was done (monotonic seconds), and its result.

        Raises ResourceError with the error in the process.
        """
        try:
            end, error, answer = self._connection.recv()
        except (EOFError, OSError) as lost:
            raise self._ended() from lost
        if error is not None:
            raise ResourceError(f"{self.name}: {error}")
        return end, answer

    def call(self, method: str, *arguments: Any) -> Any:
        """Run a method in the process, and return its result."""
        self.start(method, *arguments)
        return self.finish()[1]

    def cpu_seconds(self) -> float:
        """Return the processor time of the process so far, in seconds."""
        return cpu_seconds(self.pid)

    def _ended(self) -> ResourceError:
        return ResourceError(f"{self.name}: its process ended (status {self._process.poll()})")

    def kill(self) -> None:
        """Kill the process; :meth:`close` must still be called."""
        self._process.kill()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        end_child(self._process, END_TIMEOUT)


def run(fd: int, side: str) -> None:
    """Execute commands from the socket ``fd`` until it is closed."""
    connection = Connection(fd)
    module, _, name = side.partition(":")
    target = getattr(importlib.import_module(f"{__package__}.{module}"), name)()
    try:
        while True:
            method, arguments = connection.recv()
            answer, error = None, None
            try:
                answer = getattr(target, method)(*arguments)
            except Exception as raised:
                error = f"{method}: {type(raised).__name__}: {raised}"
            connection.send((time.monotonic(), error, answer))
    except (EOFError, OSError):
        return
    finally:
        target.close()


if __name__ == "__main__":
    end_with_starter()
    run(int(sys.argv[1]), sys.argv[2])
