"""A service manager as far as services can tell: what they say to it, and what it keeps."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from tests.support.processes import end
from tests.support.waiting import until
from vring._files import same_file
from vring_serial.unix_fds import close_all


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


#: Puts descriptors where a service finds them, and becomes the service.
_LAUNCH = """
import os, sys
count = int(sys.argv[1])
high = [os.dup(int(n)) for n in sys.argv[2 : 2 + count]]
for number, fd in enumerate(high):
    os.dup2(fd, 1000 + number)
for number in range(count):
    os.dup2(1000 + number, 3 + number)
    os.close(1000 + number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2 + count], sys.argv[2 + count :])
"""


class StoringManager:
    """Runs one service, keeps its descriptors as systemd does, and starts it again when it dies.

    As systemd's: an open file is kept once, under the name that it had first; more than ``most``
    are not kept; what has hung up is dropped unless the service said FDPOLL=0.

    Args:
        directory: the service's, and where its log is.
        command: of the service.
        most: FileDescriptorStoreMax=.

    Attributes:
        store: names and descriptors, in order.
        starts: how often the service was started.
        process: the service.
    """

    def __init__(self, directory: Path, *command: str, most: int = 512) -> None:
        self.store: list[tuple[str, int]] = []
        self.starts = 0
        self.process: asyncio.subprocess.Process | None = None
        self._directory = directory
        self._command = command
        self._most = most
        self._path = directory / "notify"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.bind(str(self._path))
        self._runs: asyncio.Task[None] | None = None
        # In a thread: a guest in this process may wait for the service, which waits for us.
        self._hearing = threading.Thread(target=self._go_on_hearing, name="manager")
        self._enough = threading.Event()
        self._lock = threading.Lock()

    @property
    def log(self) -> str:
        """What the service said."""
        return (self._directory / "log").read_text()

    async def __aenter__(self) -> StoringManager:
        self._hearing.start()
        self._runs = asyncio.create_task(self._run())
        await self.served(1)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runs is not None
        self._runs.cancel()
        await asyncio.gather(self._runs, return_exceptions=True)
        if self.process is not None:
            await end(self.process, session=True)
        self._enough.set()
        self._hearing.join()
        self._sock.close()
        close_all(fd for _, fd in self.store)

    async def served(self, count: int) -> None:
        """Wait until the service has served so many times."""
        log = self._directory / "log"
        await until(lambda: log.exists() and self.log.count("serving;") >= count, lambda: self.log)

    async def signal(self, number: int) -> None:
        """Send the service a signal, and wait until the next process serves."""
        assert self.process is not None
        served = self.log.count("serving;")
        self.process.send_signal(number)
        await self.served(served + 1)

    async def _run(self) -> None:
        while True:
            fds = [str(fd) for _, fd in self.store]
            environment = {**os.environ, "NOTIFY_SOCKET": str(self._path)}
            if fds:
                environment["LISTEN_FDS"] = str(len(fds))
                environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in self.store)
            with (self._directory / "log").open("ab") as log:
                self.process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-c", _LAUNCH, str(len(fds)), *fds),
                    *(sys.executable, *self._command),
                    cwd=self._directory,
                    stdin=asyncio.subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=[fd for _, fd in self.store],
                    env=environment,
                )
            self.starts += 1
            await self.process.wait()
            self._hear()

    def _go_on_hearing(self) -> None:
        while not self._enough.is_set():
            if select.select([self._sock], [], [], 0.05)[0]:
                self._hear()

    def _hear(self) -> None:
        with self._lock:
            self._take_messages()

    def _take_messages(self) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, 4096, 253)
            except BlockingIOError:
                return
            fields = dict(line.partition("=")[::2] for line in data.decode().split("\n"))
            if fields.get("FDSTORE") == "1":
                assert fields["FDPOLL"] == "0"
                self._add(fields["FDNAME"], fds)
            elif fields.get("FDSTOREREMOVE") == "1":
                gone = [entry for entry in self.store if entry[0] == fields["FDNAME"]]
                self.store = [entry for entry in self.store if entry not in gone]
                close_all(fd for _, fd in gone)

    def _add(self, name: str, fds: list[int]) -> None:
        for fd in fds:
            known = any(same_file(fd, other) for _, other in self.store)
            if known or len(self.store) >= self._most:
                os.close(fd)
            else:
                self.store.append((name, fd))
