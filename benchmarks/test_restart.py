"""What a keeper costs while nothing dies, and how long streams pause when a worker is killed.

Two services take turns in the same run, without and with a keeper: the ratios are of medians.
The first of a turn is the second of the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vring_serial import EmbeddedGuest
from vring_serial.bench import measure
from vring_serial.bench.rig import FIFO_PORT, FIRST_PORT, Rig
from vring_serial.bench.usage import cpu_seconds, private_bytes, wake_ups

ROUNDS = 7
KILLS = 20
REST = 2.0
ONCE = measure.Settings(rounds=1, messages=50_000, pings=500)


@contextlib.contextmanager
def service(directory: Path, *options: str) -> Iterator[int]:
    """A service with a FIFO and a socket, for a :class:`Rig`; the id of its first process.

    Its log is in ``log``.
    """
    os.mkfifo(directory / "fifo")
    command = [sys.executable, "-m", "vring_serial", "serve", *options]
    command += ["--log-file", f"{directory}/log"]
    command += ["--vhost-user", f"{directory}/vhost-user"]
    command += ["--chardev", f"pipe,id=fifo,path={directory}/fifo"]
    command += ["--port", f"chardev=fifo,nr={FIFO_PORT}"]
    command += ["--chardev", f"socket,id=s,path={directory}/port{FIRST_PORT},server=on,wait=off"]
    command += ["--port", f"chardev=s,nr={FIRST_PORT}"]
    with subprocess.Popen(command) as process:
        try:
            while not served(directory):
                assert process.poll() is None
                time.sleep(0.05)
            yield process.pid
        finally:
            process.terminate()


def served(directory: Path) -> int:
    """How many processes of a service have said that they serve."""
    log = directory / "log"
    return log.read_text().count("serving;") if log.exists() else 0


def worker_of(keeper: int) -> int:
    """The id of a keeper's worker."""
    return int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])


class Pair:
    """Guest and peer with a service of each kind.

    Attributes:
        keeper: its process id.
        plain, kept: the rig without a keeper, and with one.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.plain = self._boot(stack, lambda pid: pid, "--no-keeper")
        self.kept = self._boot(stack, self._remember)
        self._order = [("plain", self.plain), ("kept", self.kept)]

    def turn(self) -> list[tuple[str, Rig]]:
        """Both rigs with their names, in the other order each time."""
        self._order.reverse()
        return self._order

    def _remember(self, keeper: int) -> int:
        self.keeper = keeper
        return worker_of(keeper)

    def _boot(
        self, stack: contextlib.ExitStack, device_of: Callable[[int], int], *options: str
    ) -> Rig:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vring-bench-")))
        device = device_of(stack.enter_context(service(directory, *options)))
        rig = Rig(directory, device, [FIRST_PORT], "split")
        stack.callback(rig.close)
        rig.boot(256, 4096)
        return rig


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        yield Pair(stack)


def goal(text: str, met: bool) -> dict[str, str]:
    return {"goal": text, "": "met" if met else "missed"}


def test_at_rest(benchmark, pair: Pair) -> None:
    """Private memory with a guest before its traffic, and what happens while nothing does."""
    keeper, worker = pair.keeper, worker_of(pair.keeper)

    def rest() -> dict[int, float]:
        before = {pid: wake_ups(pid) for pid in (keeper, worker)}
        time.sleep(REST)
        return {pid: (wake_ups(pid) - before[pid]) / REST for pid in before}

    wakes = benchmark.pedantic(rest, rounds=1)
    memory = {pid: private_bytes(pid) / 2**20 for pid in (keeper, worker)}
    benchmark.extra_info |= {
        "keeper MiB": memory[keeper],
        "worker MiB": memory[worker],
        "wake-ups a second": sum(wakes.values()),
        **goal(
            "<= 30 MB, <= 12 MB, 0",
            memory[keeper] * 2**20 <= 30e6
            and memory[worker] * 2**20 <= 12e6
            and not any(wakes.values()),
        ),
    }


@pytest.mark.parametrize("size", [64, 4096, 64 << 10])
def test_transfer(benchmark, pair: Pair, size: int) -> None:
    """Rates and processor time of messages out of the guest and into it."""
    samples: dict[str, list[tuple[float, float]]] = {}

    def run() -> None:
        for name, rig in pair.turn():
            out, into, _ = measure.transfer(rig, ONCE, 1, size)
            for way, result in (("out", out), ("in", into)):
                sample = (result.median, result.notes["CPU s/GiB"] * size / 2**30 * 1e9)
                samples.setdefault(f"{name} {way}", []).append(sample)

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    rates, cpu = (
        {name: statistics.median(s[i] for s in found[1:]) for name, found in samples.items()}
        for i in (0, 1)
    )
    ratios = [rates[f"kept {way}"] / rates[f"plain {way}"] for way in ("out", "in")]
    benchmark.extra_info |= {
        "GB/s out": rates["kept out"],
        "of plain out": ratios[0],
        "GB/s in": rates["kept in"],
        "of plain in": ratios[1],
        "CPU ns/message out": round(cpu["kept out"]),
        "of plain, out": cpu["kept out"] / cpu["plain out"],
        "CPU ns/message in": round(cpu["kept in"]),
        "of plain, in": cpu["kept in"] / cpu["plain in"],
        **goal("rates >= 0.97 of plain", min(ratios) >= 0.97),
    }


def test_round_trip(benchmark, pair: Pair) -> None:
    """64 bytes to a FIFO or a process and back, guest and device on two processors or one."""
    plain: dict[str, list[float]] = {}
    kept: dict[str, list[float]] = {}

    def run() -> None:
        for name, rig in pair.turn():
            found = kept if name == "kept" else plain
            for result in measure.latency(rig, ONCE, busy=False):
                if result.ring:
                    found.setdefault(result.what, []).append(result.median)

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    ratios = {
        what: statistics.median(kept[what][1:]) / statistics.median(plain[what][1:])
        for what in plain
    }
    benchmark.extra_info |= {
        **ratios,
        **goal("<= 1.03 of plain", max(ratios.values()) <= 1.03),
    }


async def pauses(directory: Path, keeper: int) -> tuple[list[float], list[float]]:
    """Milliseconds of round trips without a death, and of those in which a worker was killed.

    Both are of 64 bytes from a client through the guest and back.
    """
    guest = EmbeddedGuest(f"{directory}/vhost-user")
    await guest.start()
    reader, writer = await (await guest.wait_port(nr=FIRST_PORT)).open()
    host_reader, host_writer = await asyncio.open_unix_connection(f"{directory}/port{FIRST_PORT}")

    async def echo() -> None:
        while data := await reader.read(4096):
            writer.write(data)

    async def round_trip(kill: bool) -> float:
        victim = worker_of(keeper)
        start = time.perf_counter()
        if kill:
            os.kill(victim, signal.SIGKILL)
        host_writer.write(bytes(64))
        await host_reader.readexactly(64)
        return (time.perf_counter() - start) * 1e3

    echoing = asyncio.create_task(echo())
    quiet, dying = [], []
    for turn in range(KILLS):
        quiet.append([await round_trip(False) for _ in range(20)][-1])
        dying.append(await round_trip(True))
        # Five that die before they serve are given up.
        while served(directory) < 2 + turn:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    echoing.cancel()
    host_writer.close()
    await guest.aclose()
    return quiet, dying


def test_pause(benchmark, tmp_path: Path) -> None:
    """How long a client waits for its answer when the worker is killed as it asks."""
    with service(tmp_path) as keeper:
        quiet, dying = benchmark.pedantic(lambda: asyncio.run(pauses(tmp_path, keeper)), rounds=1)
        cpu = cpu_seconds(keeper)
    benchmark.extra_info |= {
        "ms without a death": statistics.median(quiet),
        "ms with one": statistics.median(dying),
        "longest": max(dying),
        "keeper's CPU ms a death": cpu * 1e3 / KILLS,
        **goal("median <= 100 ms", statistics.median(dying) <= 100),
    }
