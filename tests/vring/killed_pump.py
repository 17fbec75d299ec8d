"""End the process of a pump again and again under a stream; run by test_record as a program.

The parent is the guest's driver and the peer of a socket or a pipe, each child a device that goes
on where the one before was killed, or halted. Every byte must arrive once, in its place.

Usage: killed_pump.py (split|packed) (out|in) ENDS SEED (socket|pipe) (kill|halt)
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import signal
import socket
import sys
import time
from collections import deque
from contextlib import suppress

import numpy as np

from vring import (
    RECORD_SIZE,
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
#: A prime length: no power of two of bytes that is lost or doubled goes unnoticed.
PATTERN = np.random.default_rng(7).integers(0, 256, 65_521, dtype=np.uint8).tobytes()
PATTERN += PATTERN[: SIZE * SLOT] * (1 + SIZE * SLOT // 65_521)


def pattern(at: int, length: int) -> bytes:
    start = at % 65_521
    return PATTERN[start : start + length]


class Stream:
    """Memory, ring and socket, and how far both ends of the stream are."""

    def __init__(self, layout: str, outgoing: bool, end: str, chance: random.Random) -> None:
        self.queue = PackedQueue if layout == "packed" else SplitQueue
        driver = PackedDriver if layout == "packed" else SplitDriver
        self.outgoing = outgoing
        self.chance = chance
        self.memory = mmap.mmap(-1, RINGS + SIZE * SLOT)
        self.record = memoryview(mmap.mmap(-1, 4096))[:RECORD_SIZE]
        self.guest = GuestMemory([Region(0, self.memory)])
        self.parts = (SIZE, 0, 0x1000, 0x2000)
        self.driver = driver(self.guest, *self.parts, event_idx=True)
        if end == "pipe":
            reader, writer = os.pipe()
            self.device, self.peer = (writer, reader) if outgoing else (reader, writer)
        else:
            self.device, self.peer = (sock.detach() for sock in socket.socketpair())
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        for fd in (self.device, self.peer):
            os.set_blocking(fd, False)
            if end == "pipe":
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 16_384)
                continue
            with socket.socket(fileno=os.dup(fd)) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
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
        name = "write_fd" if self.outgoing else "read_fd"
        attach(
            queue,
            **{name: self.device},
            kick_fd=self.kick,
            call_fd=-1,
            on_event=lambda *news: os.abort(),
        )
        signal.sigwait([signal.SIGUSR2])
        pump.halt()
        os._exit(0)

    def turn(self) -> None:
        """Do what both peers of the device can do now."""
        if self.outgoing:
            with suppress(BlockingIOError):
                self.check(os.read(self.peer, self.chance.choice([100, 5000, 1 << 20])))
        else:
            length = self.chance.randrange(1, 30_000)
            with suppress(BlockingIOError):
                self.sent += os.write(self.peer, pattern(self.sent, length))
        for length in self.driver.get_used()[1].tolist():
            slot, there = self.taken.popleft()
            if not self.outgoing:
                assert 0 < length <= there
                at = RINGS + slot * SLOT
                self.check(self.memory[at : at + length])
        while self.driver.num_free:
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
    layout, direction, ends, seed, end_kind, how = sys.argv[1:]
    chance = random.Random(int(seed))
    stream = Stream(layout, direction == "out", end_kind, chance)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    stream.turn()
    for _ in range(int(ends)):
        pid = os.fork()
        if not pid:
            stream.be_the_device()
        end = time.monotonic() + chance.random() * 0.01
        before = stream.received
        while time.monotonic() < end or stream.received == before:
            stream.turn()
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the device ended by itself"
        stream.begun = True
        stream.turn()  # so that there is something to be killed at
        end = time.monotonic() + chance.random() * 0.0002
        while time.monotonic() < end:
            pass
        os.kill(pid, signal.SIGUSR2 if how == "halt" else signal.SIGKILL)
        os.waitpid(pid, 0)
    print(stream.received)


if __name__ == "__main__":
    main()
