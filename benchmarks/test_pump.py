"""The pump between a guest and a peer that are processes of their own.

The guest's process runs the driver over shared memory. It fills or empties no buffer, and the plain
socket beside it uses the same memory; so the ratios compare the ways, not the ends. Each round runs
the plain way first, then ours: the ratio in `extra_info` is that of the medians.
"""

from __future__ import annotations

import mmap
import multiprocessing.connection as mpc
import os
import resource
import select
import socket
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from vring import Pump
from vring.testing import GuestQueue
from vring_serial.bench.usage import pin

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
        if self.queue.add(lengths):
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
        if received < total:
            driver.sleep(min(driver.queue.size // 2, -(-(total - received) // driver.queue.slot)))


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
        while not into.queue.driver.enable_notifications():
            if not poll:
                os.eventfd_read(into.call_fd)
        times.append(time.perf_counter() - start)
        into.queue.collect()
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
    """A port from a guest's process to a peer's, or back, and a plain socket beside it."""

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
        self.cpu = {"guest": 0.0, "peer": 0.0}
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
    plain, ours, cpu, guest, guest_plain = [], [], [], [], []

    def before() -> None:
        start = stream.cpu["guest"]
        plain.append(stream.plain(TOTAL))
        guest_plain.append(stream.cpu["guest"] - start)

    def run() -> None:
        start, stream_cpu = cpu_seconds(), stream.cpu["guest"]
        ours.append(stream.ours(TOTAL))
        cpu.append(cpu_seconds() - start)
        guest.append(stream.cpu["guest"] - stream_cpu)

    benchmark.pedantic(run, setup=before, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info |= {
        "GB/s": round(TOTAL / statistics.median(ours[1:]) / 1e9, 2),
        "plain GB/s": round(TOTAL / statistics.median(plain[1:]) / 1e9, 2),
        "ratio to plain": round(statistics.median(plain[1:]) / statistics.median(ours[1:]), 2),
        "pump CPU s/GiB": per_gib(cpu),
        "guest CPU s/GiB": per_gib(guest),
        "guest CPU s/GiB, plain": per_gib(guest_plain),
        **counters(stream),
    }


def per_gib(seconds: list[float]) -> float:
    return round(statistics.median(seconds[1:]) / TOTAL * 2**30, 3)


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


@pytest.mark.parametrize(
    ("poll", "together"),
    [(False, False), (False, True), (True, False)],
    ids=["blocking", "blocking, one processor", "polling"],
)
def test_round_trip(benchmark, closing: Callable, poll: bool, together: bool) -> None:
    """64 bytes through a port whose host end is a pipe back, beside an eventfd there and back.

    The guest has a processor of its own, or shares one with whoever answers it.
    """
    out = Driver(shared(64, 4096), 64, 4096, writable=False)
    into = Driver(shared(64, 4096), 64, 4096, writable=True)
    fds = {"there": os.eventfd(0), "back": os.eventfd(0)}
    guest, echo = closing(Child(out=out, into=into, **fds)), closing(Child(**fds))
    pump = closing(Pump(busy_poll_us=1000 if poll else 0))
    processors = sorted(os.sched_getaffinity(0))
    pin(guest.pid, processors[0])
    for pid in (os.getpid(), echo.pid):
        pin(pid, processors[0 if together else -1])
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    for driver, move in [
        (out, lambda *a, **k: pump.guest_to_host(*a, write_fd=write_end, **k)),
        (into, lambda *a, **k: pump.host_to_guest(*a, read_fd=read_end, **k)),
    ]:
        move(
            driver.queue.device_queue(),
            kick_fd=driver.kick_fd,
            call_fd=driver.call_fd,
            on_event=ignore,
        )
    plain, ours = [], []

    def before() -> None:
        echo.start(eventfd_pongs, 3000)
        guest.start(eventfd_pings, 3000)
        plain.extend(guest.finish()[2])
        echo.finish()

    def run() -> None:
        guest.start(guest_pings, 3000, poll)
        ours.extend(guest.finish()[2])

    benchmark.pedantic(run, setup=before, rounds=ROUNDS, warmup_rounds=1)
    pump.close()
    os.close(read_end)
    os.close(write_end)
    os.sched_setaffinity(0, processors)
    percentiles = statistics.quantiles(ours, n=100)
    benchmark.extra_info |= {
        "median us": round(statistics.median(ours) * 1e6, 2),
        "99% us": round(percentiles[98] * 1e6, 2),
        "eventfd median us": round(statistics.median(plain) * 1e6, 2),
        "ratio to eventfd": round(statistics.median(ours) / statistics.median(plain), 2),
    }


def proxy(left: socket.socket, right: socket.socket, total: int) -> None:
    """What a program in plain Python does between two sockets."""
    data = memoryview(bytearray(MESSAGE))
    while total:
        n = left.recv_into(data)
        right.sendall(data[:n])
        total -= n


def test_cpu_of_a_copy_loop_in_python(benchmark, closing: Callable) -> None:
    """What the pump's CPU time per GiB is to be compared with."""
    left, left_end = socket.socketpair()
    right, right_end = socket.socketpair()
    closing(left, left_end, right, right_end)
    source, sink = closing(Child()), closing(Child())
    cpu = []

    def run() -> None:
        start = cpu_seconds()
        sink.start(plain_receives, right_end.fileno(), TOTAL)
        source.start(plain_sends, left_end.fileno(), MESSAGE, TOTAL // MESSAGE)
        proxy(left, right, TOTAL)
        source.finish()
        sink.finish()
        cpu.append(cpu_seconds() - start)

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["CPU s/GiB"] = per_gib(cpu)


def guest_sends_on_all(context: dict, count: int) -> None:
    """Messages over all ports, each as full as it gets; sleeps until half of a port is used."""
    drivers = {driver.call_fd: driver for driver in context["drivers"]}
    lengths = np.full(context["drivers"][0].queue.size, context["drivers"][0].queue.slot, np.uint32)
    called = select.epoll()
    for fd in drivers:
        called.register(fd, select.EPOLLIN | select.EPOLLET)
    sent = used = 0
    ready = list(drivers.values())
    while used < count:
        for driver in ready:
            ring = driver.queue.driver
            waiting = True
            while waiting:
                used += len(driver.queue.collect())
                n = min(ring.num_free, count - sent)
                if n:
                    driver.add(lengths[:n])
                    sent += n
                waiting = ring.in_flight and ring.enable_notifications(-(-ring.in_flight // 2))
        ready = [drivers[fd] for fd, _ in called.poll(-1, len(drivers))] if used < count else []
    called.close()


def receives_on_all(context: dict, total: int) -> None:
    data = bytearray(1 << 20)
    ready = select.epoll()
    ends = {end.fileno(): end for end in context["ends"]}
    for fd in ends:
        ready.register(fd, select.EPOLLIN)
    while total:
        for fd, _ in ready.poll():
            total -= ends[fd].recv_into(data)
    ready.close()


class Ports:
    """So many ports of a guest's process, each to its socket, read by one process."""

    def __init__(self, closing: Callable, ports: int) -> None:
        # About the same memory in all, for its caching is not the question; and a port's queue is
        # half as long as QEMU's, so that one turn can fill its socket.
        size = 32768 if ports == 1 else 64
        self.drivers = [
            Driver(shared(size, 4096), size, 4096, writable=False) for _ in range(ports)
        ]
        ends = [socket.socketpair() for _ in self.drivers]
        for ours, theirs in ends:
            ours.setblocking(False)
            closing(ours, theirs)
        self.guest = closing(Child(drivers=self.drivers))
        self.peer = closing(Child(ends=[theirs for _, theirs in ends]))
        self.pump = closing(Pump())
        for driver, (ours, _) in zip(self.drivers, ends, strict=True):
            self.pump.guest_to_host(
                driver.queue.device_queue(),
                write_fd=ours.fileno(),
                kick_fd=driver.kick_fd,
                call_fd=driver.call_fd,
                on_event=ignore,
            )
        self.seconds: list[float] = []
        self.cpu: list[float] = []

    def run(self) -> None:
        start, cpu = time.monotonic(), cpu_seconds()
        self.peer.start(receives_on_all, TOTAL)
        self.guest.start(guest_sends_on_all, TOTAL // 4096)
        self.guest.finish()
        self.seconds.append(self.peer.finish()[0] - start)
        self.cpu.append(cpu_seconds() - cpu)


def test_many_ports(benchmark, closing: Callable) -> None:
    """The same bytes over one port and over as many as a device has, in turns."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    one, many = Ports(closing, 1), Ports(closing, 511)
    benchmark.pedantic(many.run, setup=one.run, rounds=3 * ROUNDS, warmup_rounds=1)
    ratios = [a / b for a, b in zip(one.seconds[1:], many.seconds[1:], strict=True)]
    benchmark.extra_info |= {
        "GB/s, one port": round(TOTAL / statistics.median(one.seconds[1:]) / 1e9, 2),
        "GB/s, 511 ports": round(TOTAL / statistics.median(many.seconds[1:]) / 1e9, 2),
        "ratio to one port": round(statistics.median(ratios), 2),
        "pump CPU s/GiB, one port": per_gib(one.cpu),
        "pump CPU s/GiB, 511 ports": per_gib(many.cpu),
    }


def test_memory_and_attach(benchmark, closing: Callable) -> None:
    """An idle port: bytes of this process for its flow, and the time to attach and detach it."""
    driver = Driver(shared(256, 64), 256, 64, writable=False)
    queue = driver.queue.device_queue()
    pump = closing(Pump())
    options = {"write_fd": -1, "kick_fd": driver.kick_fd, "call_fd": -1, "on_event": ignore}
    benchmark(lambda: pump.guest_to_host(queue, **options).detach())
    queues = [driver.queue.device_queue() for _ in range(10_000)]
    before = resident()
    flows = [pump.guest_to_host(queue, **options) for queue in queues]
    benchmark.extra_info["bytes per flow"] = (resident() - before) // len(flows)


def resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()
