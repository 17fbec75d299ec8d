"""A service in the background, of which a pid file says whether it runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from vring_serial.errors import ResourceError

#: Seconds within which it serves, and within which it ends.
START_SECONDS = 60.0
STOP_SECONDS = 15.0
#: fcntl(2)'s struct flock: type, whence, start, length, process.
_FLOCK = "@hhqqi4x"
_LONGEST_LINE = 4096


def start_service(arguments: Sequence[str], data: bytes, log: str) -> None:
    """Run ``vring serve`` with these arguments, and return when it serves.

    Args:
        arguments: without the pid file's and the log's.
        data: its standard input.
        log: file that gets its log and its errors.

    Raises ResourceError, with the last line of the log, if it ends instead or takes too long.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="vring-"))
        notify = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        notify.bind(os.path.join(directory, "notify"))
        errors = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o640)
        stack.callback(os.close, errors)
        begin = os.lseek(errors, 0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, "-m", "vring_serial", "serve", *arguments, "--log-file", log],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            env=os.environ | {"NOTIFY_SOCKET": os.path.join(directory, "notify")},
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(data)
        if not _wait_ready(process, notify):
            _end_group(process.pid)
            process.wait()
            raise ResourceError(f"vring serve did not start: {_last_line(errors, begin)} ({log})")


def is_running(pid_path: str) -> bool:
    """Return whether a service holds a pid file."""
    return _holder(pid_path) is not None


def stop_service(pid_path: str) -> None:
    """End the service that holds a pid file, and return when it has ended; none is fine."""
    pid = _holder(pid_path)
    if pid is None:
        return
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if _holder(pid_path) != pid:  # its number may be somebody else's by now
            return
        signal.pidfd_send_signal(fd, signal.SIGTERM)
        if not select.select([fd], [], [], STOP_SECONDS)[0]:
            _end_group(pid)
            select.select([fd], [], [], STOP_SECONDS)
    finally:
        os.close(fd)


def _wait_ready(process: subprocess.Popen[bytes], notify: socket.socket) -> bool:
    """Return whether the service said that it serves, before it ended and in time."""
    end = time.monotonic() + START_SECONDS
    fd = os.pidfd_open(process.pid)
    try:
        while (left := end - time.monotonic()) > 0:
            ready, _, _ = select.select([notify.fileno(), fd], [], [], left)
            if notify.fileno() in ready:
                if b"READY=1" in notify.recv(_LONGEST_LINE).split(b"\n"):
                    return True
            elif fd in ready:
                return False
        return False
    finally:
        os.close(fd)


def _holder(path: str) -> int | None:
    """Return the process that holds the lock on a pid file; None if none does."""
    try:
        with Path(path).open("rb") as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = struct.unpack(
                _FLOCK, fcntl.fcntl(file.fileno(), fcntl.F_GETLK, asked)
            )
    except FileNotFoundError:
        return None
    return None if kind == fcntl.F_UNLCK else int(pid)


def _end_group(pid: int) -> None:
    """Kill a service and its workers, which are a process group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _last_line(log: int, begin: int) -> str:
    """Return the last line that was logged since ``begin``."""
    size = os.fstat(log).st_size
    start = max(begin, size - _LONGEST_LINE)
    lines = os.pread(log, _LONGEST_LINE, start).decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else "it says nothing"
