"""Commands that return when they have started, and continue in the background."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable


def in_background() -> Callable[[], None]:
    """Continue in a child process with a new session; the caller must have no threads.

    Returns only in the child, a function to call when the command has started: the parent then
    exits with status 0, and the child has no terminal any more. If the child ends before, the
    parent exits with the child's status; a signal that ends the parent ends the child.
    """
    begun, begins = os.pipe()
    child = os.fork()
    if child:
        os.close(begins)
        try:
            if os.read(begun, 1):
                sys.exit(0)
        except KeyboardInterrupt:
            os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
    os.close(begun)
    os.setsid()

    def left() -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        os.close(null)
        os.write(begins, b"\n")
        os.close(begins)

    return left
