"""The pump between a guest and a peer that are processes of their own.

The guest's process runs the driver over shared memory. It fills or empties no buffer, and the plain
socket beside it sends from the same memory; so the ratios compare the ways, not the ends. Each round
runs the plain way first, then ours: the ratio in `extra_info` is that of the medians.
"""

from __future__ import annotations

import mmap
import multiprocessing.connection as mpc
import os
import resource
import socket
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from vring import Pump
from vring.testing import GuestQueue

MESSAGE = 64 << 10
TOTAL = 256 << 20
ROUNDS = 7


class Child:
    """A process that runs commands: (function, arguments); answers with CLOCK_MONOTONIC."""

    def __init__(self, **context: object) -> None:
        self.end, theirs = mpc.Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.end.close()
                while command := theirs.recv():
                    answer = command[0](context, *command[1:])
                    theirs.send((time.monotonic(), time.process_time(), answer))
            finally:
                os._exit(0)
        theirs.close()

    def start(self, *command: object) -> None:
        self.end.send(command)

    def finish(self) -> tuple[float, float, object]:
        return self.end.recv()

    def close(self) -> None:
        self.end.send(None)
        self.end.close()
        os.waitpid(self.pid, 0)


# --- what runs in the guest's process


class Driver:
    """A guest that sleeps when its queue is full (or empty), and kicks when it is asked to."""

    def __init__(self, data: mmap.mmap, size: int, slot: int, *, writable: bool) -> None:
        self.queue = GuestQueue(data, size, slot, writable=writable, event_idx=True)
        self.kick_fd, self.call_fd = os.eventfd(0), os.eventfd(0)

    def sleep(self, after: int = 1) -> None:
        if not self.queue.driver.enable_notifications(after):
            os.eventfd_read(self.call_fd)

    def add(self, lengths: np.ndarray) -> None:
        if self.queue._add(lengths):
            os.eventfd_write(self.kick_fd, 1)


def guest_sends(context: dict, length: int, count: int) -> None:
    driver = context["driver"]
    lengths = np.full(driver.queue.size, length, np.uint32)
    sent = used = 0
    while used < count:
        n = min(driver.queue.driver.num_free, count - sent)
        if n:
            driver.add(lengths[:n])
            sent += n
        used += len(driver.queue.collect())
        if not driver.queue.driver.num_free or sent == count:
            driver.sleep(min(driver.queue.size // 2, count - used))


def guest_receives(context: dict, total: int) -> None:
    driver = context["driver"]
    driver.add(np.full(driver.queue.driver.num_free, driver.queue.slot, np.uint32))
    received = 0
    while received < total:
        lengths = driver.queue.collect()
        if len(lengths):
            received += int(lengths.sum())
            driver.add(np.full(len(lengths), driver.queue.slot, np.uint32))
        else:
            driver.sleep()


def guest_pings(context: dict, count: int, poll: bool) -> list[float]:
    """Round trips of 64 bytes through the port and back, in seconds."""
    out, into = context["out"], context["into"]
    length = np.full(1, 64, np.uint32)
    slot = np.full(1, into.queue.slot, np.uint32)
    times = []
    into.add(np.full(into.queue.driver.num_free, into.queue.slot, np.uint32))
    out.queue.driver.disable_notifications()
    for _ in range(count):
        start = time.perf_counter()
        out.add(length)
        while not len(into.queue.collect()):
            if not poll:
                into.sleep()
        times.append(time.perf_counter() - start)
        into.add(slot)
        out.queue.collect()
    return times


def buffers_of(context: dict) -> list[memoryview]:
    """What a process sends from or receives into: the guest its queue's buffers, the peer one."""
    if "driver" in context:
        return [memoryview(slot) for slot in context["driver"].queue.slots]
    return [memoryview(bytearray(1 << 20))]


def plain_sends(context: dict, fd: int, length: int, count: int) -> None:
    buffers = buffers_of(context)
    end = socket.socket(fileno=os.dup(fd))
    for i in range(count):
        end.sendall(buffers[i % len(buffers)][:length])
    end.close()


def plain_receives(context: dict, fd: int, total: int) -> None:
    buffers = buffers_of(context)
    end = socket.socket(fileno=os.dup(fd))
    i = 0
    while total:
        total -= end.recv_into(buffers[i % len(buffers)])
        i += 1
    end.close()


def eventfd_pings(context: dict, count: int) -> list[float]:
    there, back = context["there"], context["back"]
    times = []
    for _ in range(count):
        start = time.perf_counter()
        os.eventfd_write(there, 1)
        os.eventfd_read(back)
        times.append(time.perf_counter() - start)
    return times


def eventfd_pongs(context: dict, count: int) -> None:
    there, back = context["there"], context["back"]
    for _ in range(count):
        os.eventfd_read(there)
        os.eventfd_write(back, 1)


# --- the device's side


def ignore(event: object, detail: object) -> None:
    """Nothing happens to these ports."""


def shared(size: int, slot: int) -> mmap.mmap:
    return mmap.mmap(-1, GuestQueue.bytes_needed(size, slot))


@pytest.fixture
def closing() -> Iterator[Callable]:
    held = []
    yield lambda *things: held.extend(things) or things[0]
    for thing in reversed(held):
        thing.close()


class Stream:
    """A port under way from a guest's process to a peer's, or back, and a plain socket beside it."""

    def __init__(self, closing: Callable, *, incoming: bool, length: int, slot: int = 0) -> None:
        self.incoming, self.length = incoming, length
        slot = slot or length
        self.driver = Driver(shared(256, slot), 256, slot, writable=incoming)
        ours, self.theirs = socket.socketpair()
        self.left, self.right = socket.socketpair()
        ours.setblocking(False)
        closing(ours, self.theirs, self.left, self.right)
        self.guest = closing(Child(driver=self.driver))
        self.peer = closing(Child())
        self.pump = closing(Pump())
        queue = self.driver.queue.device_queue()
        options = {
            "kick_fd": self.driver.kick_fd,
            "call_fd": self.driver.call_fd,
            "on_event": ignore,
        }
        if incoming:
            self.flow = self.pump.host_to_guest(queue, read_fd=ours.fileno(), **options)
        else:
            self.flow = self.pump.guest_to_host(queue, write_fd=ours.fileno(), **options)

    def ours(self, total: int) -> float:
        """Seconds for so many bytes through the port."""
        count = total // self.length
        start = time.monotonic()
        if self.incoming:
            self.guest.start(guest_receives, total)
            self.peer.start(plain_sends, self.theirs.fileno(), self.length, count)
        else:
            self.peer.start(plain_receives, self.theirs.fileno(), total)
            self.guest.start(guest_sends, self.length, count)
        return self.finish() - start

    def plain(self, total: int) -> float:
        """Seconds for the same bytes over a plain socket between the same two processes."""
        sender, receiver = (self.peer, self.guest) if self.incoming else (self.guest, self.peer)
        start = time.monotonic()
        receiver.start(plain_receives, self.right.fileno(), total)
        sender.start(plain_sends, self.left.fileno(), self.length, total // self.length)
        return self.finish() - start

    def finish(self) -> float:
        """When both are done; notes the CPU time that each has used so far."""
        guest, peer = self.guest.finish(), self.peer.finish()
        self.cpu = {"guest": guest[1], "peer": peer[1]}
        return max(guest[0], peer[0])


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("incoming", [False, True], ids=["guest_to_host", "host_to_guest"])
def test_stream_beside_a_plain_socket(benchmark, closing: Callable, incoming: bool) -> None:
    stream = Stream(closing, incoming=incoming, length=MESSAGE)
    plain, ours, cpu = [], [], []

    def before() -> None:
        plain.append(stream.plain(TOTAL))

    def run() -> None:
        start = cpu_seconds()
        ours.append(stream.ours(TOTAL))
        cpu.append(cpu_seconds() - start)

    benchmark.pedantic(run, setup=before, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info |= {
        "GB/s": round(TOTAL / statistics.median(ours[1:]) / 1e9, 2),
        "plain GB/s": round(TOTAL / statistics.median(plain[1:]) / 1e9, 2),
        "ratio to plain": round(statistics.median(plain[1:]) / statistics.median(ours[1:]), 2),
        "pump CPU s/GiB": round(statistics.median(cpu[1:]) / TOTAL * 2**30, 3),
        **counters(stream),
    }


def counters(stream: Stream) -> dict[str, object]:
    told = stream.flow.counters
    return {
        "chains/batch": round(told.chains / max(told.batches, 1), 1),
        "kicks": told.kicks,
        "calls": told.calls,
        "calls saved": told.calls_saved,
        "throttled s": round(told.throttled_ns / 1e9, 2),
    }


def test_small_messages(benchmark, closing: Callable) -> None:
    """64 bytes each, into a socket that another process reads."""
    stream = Stream(closing, incoming=False, length=64)
    total = 64 * 2_000_000
    seconds, cpu = [], []

    def run() -> None:
        start = cpu_seconds()
        seconds.append(stream.ours(total))
        cpu.append(cpu_seconds() - start)

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info |= {
        "million/s": round(2 / statistics.median(seconds[1:]), 2),
        "million/s of pump CPU": round(2 / statistics.median(cpu[1:]), 2),
        **counters(stream),
    }
