"""Commands that return when they have begun, and go on behind."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable


def in_background() -> Callable[[], None]:
    """Go on in a child, in a session of its own; the caller must have no threads.

    Returns, in the child alone, what it calls when it has begun: this process then ends with
    status 0, and the child has no terminal any more. If the child ends before, this process ends
    with the child's status; a signal that ends it ends the child.
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
