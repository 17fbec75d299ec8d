"""Workers that die at every step of a message, for programs that tests run as processes.

Such a process is the keeper and the peer. Workers die when they enter a function that keeps, writes
down, answers or takes off something, at the first such call, at the second, and so on; the next
worker goes on.
"""

from __future__ import annotations

import abc
import asyncio
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

from vring_serial import unix_fds
from vring_serial.service import shelf as shelves
from vring_serial.service.descriptor_store import DescriptorStore, Notifier
from vring_serial.service.journal import Journal
from vring_serial.service.shelf import Shelf, open_shelf
from vring_serial.transport import pieces, repeatable
from vring_serial.transport import session as sessions

_TRACED = {repeatable.__file__, pieces.__file__, shelves.__file__}

#: Seconds in which something happens.
_DEADLINE = 30.0

SaidT = TypeVar("SaidT")


def die_at(call: int, count: int, pause: float) -> None:
    """Be killed when a traced function is entered for that time since the first message came.

    Not once more than ``count`` messages have come. Other threads have ``pause`` seconds before
    that.
    """
    left, messages = call, 0

    def trace(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left, messages
        code = frame.f_code
        messages += code.co_filename == sessions.__file__ and code.co_name == "_handle"
        if 1 <= messages <= count and code.co_filename in _TRACED:
            left -= 1
            if not left:
                time.sleep(pause)
                os.kill(os.getpid(), signal.SIGKILL)

    if call:
        sys.settrace(trace)


class DyingWorld(abc.ABC, Generic[SaidT]):
    """A keeper, its worker, and the peer that the worker serves, in one process for a test.

    Args:
        directory: for the socket.
        header: bytes of an answer's header.
        pause: seconds that a dying worker's other threads have before its end.

    Attributes:
        deaths: workers that died of themselves.
        beside: descriptors that came with the last answers.
    """

    def __init__(
        self,
        directory: Path,
        *,
        header: int,
        pause: float = 0.0,
    ) -> None:
        self._path = str(directory / "v")
        self._header = header
        self._pause = pause
        self._journal = Journal.create()
        self._store = DescriptorStore(1000)
        self._keeper, self._worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._peer: socket.socket | None = None
        self._pid = self._pidfd = -1
        self.deaths = 0
        self.beside: list[int] = []
        self._start(0)
        self._wait(lambda: "listener" in self._kept)
        self._peer = socket.socket(socket.AF_UNIX)
        self._peer.connect(self._path)

    def close(self) -> None:
        """Kill the worker, and close all."""
        self._kill()
        unix_fds.close_all(self.beside)
        self._store.close()
        for sock in (self._keeper, self._worker, self._peer):
            assert sock is not None
            sock.close()
        os.close(self._journal)
        os.unlink(self._path)

    @abc.abstractmethod
    async def serve(self, shelf: Shelf) -> None:
        """Serve in a worker until its end."""

    @abc.abstractmethod
    def pack(self, said: SaidT) -> tuple[bytes, list[int]]:
        """Return a message, and the descriptors beside it, which are taken over."""

    @abc.abstractmethod
    def answer_size(self, header: bytes) -> int:
        """Return the bytes of an answer that begins so."""

    @property
    def _kept(self) -> set[str]:
        return {name.partition("#")[0] for name in self._store.descriptors}

    def say(self, said: Sequence[SaidT], die: int = 0, *, apart: bool = False) -> bytes:
        """Send messages, and return the answers; ``die`` in the worker that gets them.

        All are sent before it begins, at once or each by itself.
        """
        unix_fds.close_all(self.beside)
        self.beside = []
        if die:
            self._kill()
        packed = [self.pack(each) for each in said]
        if not apart:
            data, fds = (
                b"".join(data for data, _ in packed),
                [fd for _, fds in packed for fd in fds],
            )
            packed = [(data, fds)]
        rest = b""
        for data, fds in packed:
            assert not rest, "only the last message may be too long for the socket"
            rest = self._send(data, fds)
        if die:
            self._start(die, len(said))
        peer: list[Any] = [self._peer]
        while rest:
            self._wait(lambda: bool(select.select([], peer, [], 0)[1]), sends=True)
            rest = self._send(rest, [])
        answers = b""
        for _ in said:
            answer = self._receive(self._header)
            answers += answer + self._receive(self.answer_size(answer) - self._header)
        return answers

    @contextmanager
    def left(self) -> Iterator[tuple[Journal, set[str]]]:
        """What is written down, and the roles of what is kept, without a worker."""
        self._kill()
        with self.journal() as journal:
            yield journal, {role.rstrip("0123456789") for role in self._kept}
        self._start(0)

    @contextmanager
    def journal(self) -> Iterator[Journal]:
        """What is written down, to be read."""
        with Journal(self._journal, read_only=True) as journal:
            yield journal

    def copy(self) -> tuple[bytes, dict[str, int]]:
        """A copy of the journal, and of the descriptors that are kept, by role; the caller's."""
        self._kill()
        used = int.from_bytes(os.pread(self._journal, 8, 16), "little")
        stored = self._store.descriptors.items()
        fds = {name.partition("#")[0]: os.dup(fds[0]) for name, fds in stored}
        copied = os.pread(self._journal, used, 0), fds
        self._start(0)
        return copied

    def wait_kept(self, role: str) -> None:
        """Wait until something is kept in a role."""
        self._wait(lambda: role in self._kept)

    def wait_readable(self, fd: int) -> bool:
        """Wait until there is something to read from ``fd``; False: for too long there is not."""

        def readable() -> bool:
            return bool(select.select([fd], [], [], 0)[0])

        end = time.monotonic() + _DEADLINE
        while not readable() and time.monotonic() < end:
            self._step([fd], [])
        return readable()

    def replace_worker(self) -> None:
        """Have the worker die now, and another one go on."""
        self._kill()
        self._start(0)

    def _send(self, data: bytes, fds: list[int]) -> bytes:
        """Send as much as fits, and return the rest; the descriptors are closed."""
        assert self._peer is not None
        sent = unix_fds.send(self._peer, data, fds)
        unix_fds.close_all(fds)
        return data[sent:]

    def _receive(self, count: int) -> bytes:
        data = b""
        peer = self._peer
        assert peer is not None
        while len(data) < count:
            self._wait(lambda: bool(select.select([peer], [], [], 0)[0]))
            received = unix_fds.receive(peer, count - len(data), 253)
            self.beside += received.fds
            assert received.data, "the connection was closed"
            data += received.data
        return data

    def _wait(self, condition: Callable[[], bool], *, sends: bool = False) -> None:
        """Keep what the worker stores, and replace one that dies, until the condition holds."""
        while not condition():
            peer: list[Any] = [] if self._peer is None else [self._peer]
            assert self._step(peer, peer if sends else []), "nothing happens"
        self._drain()

    def _step(self, waiting: list[Any], sending: list[Any]) -> bool:
        """Keep what the worker stores, and replace it if it has died; whether anything was."""
        waiting = [*waiting, self._keeper, self._pidfd]
        ready, writable, _ = select.select(waiting, sending, [], _DEADLINE)
        self._drain()
        if self._pidfd in ready:
            status = self._reap()
            assert status == -signal.SIGKILL, status
            self.deaths += 1
            self._start(0)
        return bool(ready or writable)

    def _drain(self) -> None:
        while self._store.receive(self._keeper) is not None:
            pass

    def _reap(self) -> int:
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        os.close(self._pidfd)
        self._drain()
        return status

    def _kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        self._reap()

    def _start(self, die: int, count: int = 1) -> None:
        fds = self._store.descriptors
        left = {name: [os.dup(fd) for fd in kept] for name, kept in fds.items()}
        self._pid = os.fork()
        if not self._pid:
            try:
                self._store.forsake()  # no helper: it would share, and keep, what this process has
                self._keeper.close()
                if self._peer is not None:
                    self._peer.close()
                shelf = open_shelf(self._journal, Notifier(self._worker), left)
                die_at(die, count, self._pause)
                asyncio.run(self.serve(shelf))
            except BaseException:
                sys.excepthook(*sys.exc_info())
            os._exit(1)
        for kept in left.values():
            unix_fds.close_all(kept)
        self._pidfd = os.pidfd_open(self._pid)
