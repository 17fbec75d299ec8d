"""A `vring serve`, a guest with an agent, and `vring agent` beside them, each a process."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.processes import end_now
from tests.support.waiting import DEADLINE, wait_until

VRING = (sys.executable, "-m", "vring_serial")
DOMAIN = """\
<domain><devices>
  <channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>
</devices></domain>
"""


class Session:
    """A server, a guest with an agent that takes files, and the command under test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.downloads = directory / "downloads"
        self.downloads.mkdir()
        self.socket = directory / "agent.sock"
        domain = directory / "domain.xml"
        domain.write_text(DOMAIN)
        self._vhost = vhost = str(directory / "vring.sock")
        self.processes = [
            self.start("serve", "--vhost-user", vhost, "--domain", domain, *self.agent_socket)
        ]
        wait_until(Path(vhost).exists, "vring serve listens")
        self.start_guest()

    def start_guest(self) -> None:
        """Start a guest with an agent; it is the last of the processes."""
        arguments = "--vhost-user", self._vhost, "--agent", "--downloads", self.downloads
        self.processes.append(self.start("guest", *arguments))

    @property
    def agent_socket(self) -> tuple[str, Path]:
        return "--agent-socket", self.socket

    def start(self, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        command = [*VRING, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, **{**pipes, "stdin": subprocess.DEVNULL, **options})

    @contextlib.contextmanager
    def agent(self, *arguments: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
        """The command for a block; it is interrupted behind it, unless the test has done that."""
        process = self.start("agent", "--socket", self.socket, *arguments, **options)
        try:
            yield process
            if process.returncode is None:
                self.interrupt(process)
        finally:
            end_now(process)

    @staticmethod
    def interrupt(process: subprocess.Popen[str]) -> tuple[str, str]:
        """What it has said on both streams and not yet told, when it has ended."""
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=DEADLINE)
        assert process.returncode == 130
        return output

    def run(
        self, *arguments: object, address: str = "", **options: Any
    ) -> subprocess.CompletedProcess[str]:
        socket_path = address or str(self.socket)
        command = [*VRING, "agent", "--socket", socket_path, *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=False, **options
        )

    def close(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=DEADLINE)
            finally:
                end_now(process)
