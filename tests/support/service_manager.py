"""What a service tells whoever started it, as systemd would hear it."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

from tests.support.waiting import until


class Manager:
    """Listens to one service.

    Args:
        directory: where its socket is.
        watchdog: seconds; None: the service is not watched.

    Attributes:
        told: all lines so far, in order.
    """

    def __init__(self, directory: Path, watchdog: float | None = None) -> None:
        self.told: list[str] = []
        self._path = directory / "notify"
        self._watchdog = watchdog
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.bind(str(self._path))

    @property
    def environment(self) -> Mapping[str, str]:
        """Return what the service finds in its environment."""
        found = {"NOTIFY_SOCKET": str(self._path)}
        if self._watchdog is not None:
            found["WATCHDOG_USEC"] = str(round(self._watchdog * 1e6))
        return found

    def hear(self) -> None:
        """Take what was told since."""
        while True:
            try:
                data = self._sock.recv(4096)
            except BlockingIOError:
                return
            self.told += data.decode().split("\n")

    async def heard(self, line: str, count: int = 1) -> None:
        """Wait until a line was told so many times."""

        def is_told() -> bool:
            self.hear()
            return self.told.count(line) >= count

        await until(is_told, lambda: f"{line!r} {count} times in {self.told}")

    def close(self) -> None:
        """Hear no more."""
        self._sock.close()
