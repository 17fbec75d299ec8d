"""End the process of a pump again and again under a stream; run by test_record as a program.

The parent is the guest's driver and the peer of the host end, each child a device that goes on
where the one before was killed, or halted. Every byte must arrive once, in its place.

Usage: killed_pump.py (split|packed) (out|in) (socket|pipe|pty|file|append) ENDS SEED (kill|halt)
       [console] [plain]

console: what the host end does not take waits in a backlog that outlives the device.
plain: the host end is not said to outlive the device, so that kills lose and double bytes.
"""

from __future__ import annotations

import mmap
import os
import random
import select
import signal
import socket
import sys
import tempfile
import time
import tty
from collections import deque
from contextlib import suppress

import numpy as np

from vring import (
    RECORD_SIZE,
    Backlog,
    GuestMemory,
    PackedDriver,
    PackedQueue,
    Pump,
    Region,
    SplitDriver,
    SplitQueue,
)

SIZE, SLOT = 64, 8192
RINGS = 0x4000
#: Bytes that a console's host end may be behind: less than its backlog holds.
BEHIND = 500_000
#: A prime length: no power of two of bytes that is lost or doubled goes unnoticed.
PATTERN = np.random.default_rng(7).integers(0, 256, 65_521, dtype=np.uint8).tobytes()
PATTERN += PATTERN[: SIZE * SLOT] * (1 + SIZE * SLOT // 65_521)


def pattern(at: int, length: int) -> bytes:
    start = at % 65_521
    return PATTERN[start : start + length]


class SocketEnd:
    """A host end: the device's descriptor, what it is told of it, and the peer's side.

    Attributes:
        fd: the device's.
        exactly: keyword arguments for the pump.
    """

    def __init__(self, outgoing: bool) -> None:
        self.exactly: dict[str, object] = {}
        self._ours, self._peer = socket.socketpair()
        for end in (self._ours, self._peer):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
        self.fd = self._ours.fileno()

    def read(self, most: int) -> bytes:
        return self._peer.recv(most)

    def write(self, data: bytes) -> int:
        return self._peer.send(data)


class PipeEnd:
    """A pipe, with a relay."""

    def __init__(self, outgoing: bool) -> None:
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        self.exactly = {"relay": os.pipe2(flags)}
        self.outgoing = outgoing
        reader, writer = self.pair(flags)
        self.fd, self.peer = (writer, reader) if outgoing else (reader, writer)

    def pair(self, flags: int) -> tuple[int, int]:
        return os.pipe2(flags)

    def read(self, most: int) -> bytes:
        return os.read(self.peer, most)

    def write(self, data: bytes) -> int:
        return os.write(self.peer, data)


class PtyEnd(PipeEnd):
    """A terminal, with a relay; the device has the master."""

    def pair(self, flags: int) -> tuple[int, int]:
        pair = os.openpty()
        tty.setraw(pair[1])
        for fd in pair:
            os.set_blocking(fd, False)
        return pair if not self.outgoing else (pair[1], pair[0])


class FileEnd:
    """A file that grows, and one position that all devices share."""

    #: As much as the device may read ahead is there, so that the file never ends.
    AHEAD = 4 << 20

    def __init__(self, outgoing: bool, flags: int = 0) -> None:
        self.exactly = {"kept": True}
        with tempfile.NamedTemporaryFile() as file:
            self.fd = os.open(file.name, (os.O_WRONLY if outgoing else os.O_RDONLY) | flags)
            self._peer = os.open(file.name, os.O_RDONLY if outgoing else os.O_WRONLY)

    def read(self, most: int) -> bytes:
        return os.read(self._peer, most)

    @property
    def wants(self) -> bool:
        return os.lseek(self._peer, 0, os.SEEK_CUR) < os.lseek(self.fd, 0, os.SEEK_CUR) + self.AHEAD

    def write(self, data: bytes) -> int:
        return os.write(self._peer, data) if self.wants else 0


class AppendEnd(FileEnd):
    """The same with O_APPEND."""

    def __init__(self, outgoing: bool) -> None:
        super().__init__(outgoing, os.O_APPEND)


ENDS = {
    "socket": SocketEnd,
    "pipe": PipeEnd,
    "pty": PtyEnd,
    "file": FileEnd,
    "append": AppendEnd,
}


class Stream:
    """Memory, ring and host end, and how far both ends of the stream are."""

    def __init__(
        self,
        layout: str,
        outgoing: bool,
        end: str,
        chance: random.Random,
        exact: bool,
        console: bool,
    ) -> None:
        self.queue = PackedQueue if layout == "packed" else SplitQueue
        driver = PackedDriver if layout == "packed" else SplitDriver
        self.outgoing = outgoing
        self.chance = chance
        self.memory = mmap.mmap(-1, RINGS + SIZE * SLOT)
        self.record = memoryview(mmap.mmap(-1, 4096))[:RECORD_SIZE]
        self.guest = GuestMemory([Region(0, self.memory)])
        self.parts = (SIZE, 0, 0x1000, 0x2000)
        self.driver = driver(self.guest, *self.parts, event_idx=True)
        self.end = ENDS[end](outgoing)
        self.exactly = self.end.exactly if exact else {}
        self.console = console
        self.backlog = memoryview(mmap.mmap(-1, 1 << 20)) if exact and console else None
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.begun = False
        self.sent = self.received = 0
        self.next_slot = 0
        self.taken: deque[tuple[int, int]] = deque()  # slot and length of what the device has

    def be_the_device(self) -> None:
        queue = self.queue(
            self.guest, *self.parts, event_idx=True, record=self.record, resume=self.begun
        )
        pump = Pump()
        attach = pump.guest_to_host if self.outgoing else pump.host_to_guest
        console: dict[str, object] = {"lossy": True} if self.console else {}
        if self.backlog is not None:
            console["backlog"] = Backlog(self.backlog)
        attach(
            queue,
            **console,
            **{"write_fd" if self.outgoing else "read_fd": self.end.fd},
            **self.exactly,
            kick_fd=self.kick,
            call_fd=-1,
            on_event=lambda *news: os.abort(),
        )
        reader, writer = os.pipe2(os.O_NONBLOCK)
        signal.set_wakeup_fd(writer)
        signal.signal(signal.SIGUSR2, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        parent = os.pidfd_open(os.getppid())
        ready: list[int] = []
        while not {parent, reader} & set(ready):
            pump.dispatch()
            ready = select.select([parent, reader, pump.event_fd], [], [])[0]
        pump.halt()
        os._exit(0)

    def turn(self) -> None:
        """Do what both peers of the device can do now."""
        if self.outgoing:
            with suppress(BlockingIOError):
                self.check(self.end.read(self.chance.choice([100, 5000, 1 << 18])))
        else:
            length = self.chance.randrange(1, 30_000)
            with suppress(BlockingIOError):
                self.sent += self.end.write(pattern(self.sent, length))
            while isinstance(self.end, FileEnd) and self.end.wants:
                self.sent += self.end.write(pattern(self.sent, 30_000))
        for length in self.driver.get_used()[1].tolist():
            slot, there = self.taken.popleft()
            if not self.outgoing:
                assert 0 < length <= there
                at = RINGS + slot * SLOT
                self.check(self.memory[at : at + length])
        while self.driver.num_free and not (self.console and self.sent > self.received + BEHIND):
            self.offer()
        if self.driver.publish():
            os.eventfd_write(self.kick, 1)

    def offer(self) -> None:
        slot, self.next_slot = self.next_slot, (self.next_slot + 1) % SIZE
        length = self.chance.choice([1, 64, 700, 4096, SLOT])
        at = RINGS + slot * SLOT
        if self.outgoing:
            self.memory[at : at + length] = pattern(self.sent, length)
            self.sent += length
            self.driver.add([(at, length)], [])
        else:
            self.driver.add([], [(at, length)])
        self.taken.append((slot, length))

    def check(self, data: bytes) -> None:
        expected = pattern(self.received, len(data))
        if data != expected:
            where = next(i for i in range(len(data)) if data[i] != expected[i])
            raise SystemExit(f"wrong at byte {self.received + where}")
        self.received += len(data)


def main() -> None:
    layout, direction, end, ends, seed, how, *words = sys.argv[1:]
    chance = random.Random(int(seed))
    stream = Stream(
        layout, direction == "out", end, chance, "plain" not in words, "console" in words
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    stream.turn()
    for _ in range(int(ends)):
        pid = os.fork()
        if not pid:
            stream.be_the_device()
        until = time.monotonic() + chance.random() * 0.01
        before = stream.received
        while time.monotonic() < until or stream.received == before:
            stream.turn()
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the device ended by itself"
        stream.begun = True
        stream.turn()  # so that there is something to be killed at
        until = time.monotonic() + chance.random() * 0.0002
        while time.monotonic() < until:
            pass
        os.kill(pid, signal.SIGUSR2 if how == "halt" else signal.SIGKILL)
        os.waitpid(pid, 0)
    print(stream.received)


if __name__ == "__main__":
    main()
