"""The measurements: workloads, numbers of samples and yardsticks."""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from vring_serial.bench.results import Result
from vring_serial.bench.rig import FIFO_PORT, Rig, running

#: Sizes of messages in bytes, from a keystroke to a block of a file.
SIZES = tuple(64 << shift for shift in range(0, 15, 2))
#: Maximum number of bytes of one sample.
SAMPLE_BYTES = 128 << 20
#: Messages of a plain socket's sample: its copy loop in Python is much slower for small messages.
PLAIN_MESSAGES = 50_000
#: Size of a round trip's message in bytes.
PING_SIZE = 64

RINGS = ("split", "packed")
GUEST_TO_HOST = "guest to host"
HOST_TO_GUEST = "host to guest"
PLAIN = "plain socket"
FIFO = "port with a FIFO"
ECHO = "port with a process"
EVENTFD = "eventfd"
#: Marks round trips whose processes share a processor; the others use two.
TOGETHER = "one processor"


@dataclass(frozen=True, slots=True)
class Settings:
    """The extent of the measurements.

    Attributes:
        sizes: sizes of messages of transfers, in bytes.
        ports: for each measurement, the number of ports that work at the same time.
        rings: ``split``, ``packed``, or both.
        rounds: samples of each transfer; one more at the start is discarded.
        messages: maximum number of messages of one sample.
        pings: round trips of each kind.
        queue_size: descriptors per queue.
        receive_size: size of a guest's receive buffer in bytes.
        busy_poll: for the latency with busy-poll, microseconds for which the device polls.
    """

    sizes: Sequence[int] = SIZES
    ports: Sequence[int] = (1, 16)
    rings: Sequence[str] = RINGS
    rounds: int = 5
    messages: int = 250_000
    pings: int = 5000
    queue_size: int = 256
    receive_size: int = 4096
    busy_poll: int = 1000


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a run.

    Attributes:
        title: its name, for the progress line.
        count: the number of its results.
        run: measures, and yields each result when it is complete.
    """

    title: str
    count: int
    run: Callable[[], Iterable[Result]]


# --- transfer


class _Samples:
    """Samples of transfers in GB/s, and the processor time that the device's process needed."""

    def __init__(self) -> None:
        self.speeds: list[float] = []
        self.cpu: list[float] = []

    def add(self, size: int, seconds: float, cpu: float) -> None:
        self.speeds.append(size / seconds / 1e9)
        self.cpu.append(cpu / size * 2**30)

    def result(self, what: str, rig: Rig, ports: int, size: int, beside: float) -> Result:
        result = Result("transfer", what, rig.ring, ports, size, "GB/s", self.speeds[1:])
        result.notes["M/s"] = result.median * 1e3 / size
        result.notes["CPU s/GiB"] = statistics.median(self.cpu[1:])
        result.notes["of plain"] = result.median / beside
        return result


def transfer(rig: Rig, settings: Settings, ports: int, size: int) -> Iterator[Result]:
    """Measure throughput at one message size, both ways, each round beside a plain socket."""
    count = max(1, min(SAMPLE_BYTES // size, settings.messages) // ports)
    plain = min(count * ports, PLAIN_MESSAGES)
    out, into, beside = _Samples(), _Samples(), _Samples()
    for _ in range(settings.rounds + 1):
        _plain(rig, beside, True, size, plain)
        _through_ports(rig, out, True, ports, size, count)
        _plain(rig, beside, False, size, plain)
        _through_ports(rig, into, False, ports, size, count)
    yardstick = Result("transfer", PLAIN, "", 1, size, "GB/s", beside.speeds[2:])
    yield out.result(GUEST_TO_HOST, rig, ports, size, yardstick.median)
    yield into.result(HOST_TO_GUEST, rig, ports, size, yardstick.median)
    yield yardstick


def _through_ports(
    rig: Rig, samples: _Samples, outwards: bool, ports: int, size: int, count: int
) -> None:
    """Take one sample: a number of messages through each of a number of ports."""
    numbers = rig.ports[:ports]
    total = size * count * ports
    sender, receiver = (rig.guest, rig.peer) if outwards else (rig.peer, rig.guest)
    before = rig.device_cpu_seconds()
    seconds = rig.timed(
        (receiver, "receive", (numbers, total)), (sender, "send", (numbers, size, count))
    )
    samples.add(total, seconds, rig.device_cpu_seconds() - before)


def _plain(rig: Rig, samples: _Samples, outwards: bool, size: int, count: int) -> None:
    """Measure the same messages on a socket between the two processes."""
    sender, receiver = (rig.guest, rig.peer) if outwards else (rig.peer, rig.guest)
    seconds = rig.timed(
        (receiver, "plain_receive", (size * count,)), (sender, "plain_send", (size, count))
    )
    samples.add(size * count, seconds, 0)


def transfer_steps(settings: Settings) -> Iterator[Step]:
    """Yield one step for each number of ports and kind of ring."""
    for ports in settings.ports:
        # Many ports are compared with the size of a file's block and the smallest size.
        sizes = settings.sizes if ports == 1 else sorted({64 << 10, min(settings.sizes)})
        for ring in settings.rings:
            # Each run has its own yardstick, but it is shown only once.
            shown = ports == 1 and ring == settings.rings[0]
            name = f"transfer, {ports} {'port' if ports == 1 else 'ports'}, {ring} ring"
            run = functools.partial(_transfer, settings, ports, sizes, ring, shown)
            yield Step(name, len(sizes) * (3 if shown else 2), run)


def _transfer(
    settings: Settings, ports: int, sizes: Sequence[int], ring: str, yardstick: bool
) -> Iterator[Result]:
    with running(
        ports, queue_size=settings.queue_size, receive_size=settings.receive_size, ring=ring
    ) as rig:
        for size in sizes:
            for result in transfer(rig, settings, ports, size):
                if yardstick or result.what != PLAIN:
                    yield result


# --- latency


def latency(rig: Rig, settings: Settings, *, busy: bool) -> Iterator[Result]:
    """Measure round trips of small messages, alternating with those of eventfds.

    On two processors, where a wake-up crosses processors, and (not with busy-poll) on one.
    """
    processors = sorted(os.sched_getaffinity(0))
    places = {"": [processors[0], processors[-1]]}
    if not busy:
        places[f", {TOGETHER}"] = [processors[0]]
    found: dict[str, dict[str, list[float]]] = {place: {} for place in places}
    turns = 5
    count = max(1, settings.pings // turns)
    for turn in range(turns + 1):
        for place, where in places.items():
            rig.place(where)
            for what, seconds in _round_trips(rig, count, busy).items():
                if turn:  # the first warms up
                    samples = found[place].setdefault(what, [])
                    samples.extend(second * 1e6 for second in seconds)
    for place, kinds in found.items():
        beside = Result("latency", f"{EVENTFD}{place}", "", 1, 8, "us", kinds.pop(EVENTFD))
        for what, samples in kinds.items():
            name = f"{what}, busy-poll" if busy else f"{what}{place}"
            result = Result("latency", name, rig.ring, 1, PING_SIZE, "us", samples)
            result.notes["of eventfd"] = result.median / beside.median
            yield result
        if not busy:
            yield beside


def _round_trips(rig: Rig, count: int, busy: bool) -> dict[str, Sequence[float]]:
    times = {
        EVENTFD: _ping(rig, ("echo_eventfd", count), ("ping_eventfd", count)),
        FIFO: _ping(rig, None, ("ping", FIFO_PORT, PING_SIZE, count, busy)),
    }
    if not busy:  # a third process that wants a processor would only be in the way
        port = rig.ports[0]
        times[ECHO] = _ping(
            rig, ("echo", port, PING_SIZE, count), ("ping", port, PING_SIZE, count, busy)
        )
    return times


def _ping(rig: Rig, echo: tuple[object, ...] | None, ping: tuple[object, ...]) -> Sequence[float]:
    if echo is not None:
        rig.peer.start(str(echo[0]), *echo[1:])
    times: Sequence[float] = rig.guest.call(str(ping[0]), *ping[1:])
    if echo is not None:
        rig.peer.finish()
    return times


def latency_steps(settings: Settings) -> Iterator[Step]:
    """Yield the steps with a device that sleeps between messages, and with busy-poll."""
    for ring in settings.rings:
        first = ring == settings.rings[0]
        for busy in (False, True):
            count = 1 if busy else 6 if first else 4
            name = f"latency, {ring} ring{', busy-poll on both sides' if busy else ''}"
            yield Step(name, count, functools.partial(_latency, settings, ring, busy, first))


def _latency(settings: Settings, ring: str, busy: bool, yardstick: bool) -> Iterator[Result]:
    with running(
        1,
        queue_size=settings.queue_size,
        receive_size=settings.receive_size,
        busy_poll=settings.busy_poll if busy else 0,
        ring=ring,
    ) as rig:
        for result in latency(rig, settings, busy=busy):
            if yardstick or result.ring:
                yield result
