"""Files of a file system that does not answer any more."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


class HostileFiles:
    """Files of a file system that does not answer any more; see hostile_fs.py.

    Attributes:
        fuse: a descriptor on it, for reading and writing.
        overlay: one through an overlayfs above it, for reading.
        pid: of a process in the mount namespace that has both.
        size: bytes of either.
    """

    size = 1 << 20

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            program = Path(__file__).parent / "hostile_fs.py"
            self._server = subprocess.Popen(
                [sys.executable, str(program), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stderr=subprocess.PIPE,
                text=True,
            )
            theirs.close()
            _, fds, _, _ = socket.recv_fds(ours, 1, 2)
            if not fds:
                _, why = self._server.communicate()
                assert self._server.returncode == 77, why
                pytest.skip(f"no file system can be mounted here: {why.strip()}")
            self.fuse, self.overlay = fds
            self._control = ours.dup()
        self.pid = self._server.pid

    @property
    def gone(self) -> bool:
        """Whether the server has gone, after which all that is asked fails at once."""
        return self._server.poll() is not None

    def end(self) -> None:
        """Whatever waits for it fails from then on."""
        self._control.close()
        if self._server.poll() is None:
            self._server.communicate()

    def close(self) -> None:
        self.end()
        for fd in (self.fuse, self.overlay):
            with contextlib.suppress(OSError):
                os.close(fd)
