"""Processes of the benchmark that end with the process that started them, however that ends.

Their standard input is a pipe of which only the starter has the other end, so it reaches end of
file when the starter ends, even by SIGKILL.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
from typing import Any


def start_child(module: str, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a module that calls :func:`end_with_starter`; end it with :func:`end_child`.

    Args:
        options: further options of Popen.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        start_new_session=True,  # an interrupt is for the starter, which then ends us
        **options,
    )


def end_child(process: subprocess.Popen[bytes], timeout: float) -> None:
    """Wait up to ``timeout`` seconds for a child that was told to end, then kill it."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


def end_with_starter() -> None:
    """Kill this process when the standard input ends."""
    threading.Thread(target=_watch, name="starter", daemon=True).start()


def _watch() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":  # with the arguments of `vring`
    end_with_starter()
    runpy.run_module("vring_serial", run_name="__main__")
