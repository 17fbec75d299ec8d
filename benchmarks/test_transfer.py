"""The whole product beside its yardsticks: `vring serve`, the embedded guest and a peer, each in a
process of its own, over a real vhost-user socket; a real Linux kernel; and Python as the host end.

The ratios are of medians, and the rounds of what is compared take turns in the same run. The pump
without the device around it is in test_pump.py, chains without bytes in test_ring.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vring import GuestMemory, Region, SplitDriver, SplitQueue
from vring_serial.bench import measure
from vring_serial.bench.results import Result
from vring_serial.bench.rig import Rig, running, serving
from vring_serial.bench.usage import cpu_seconds
from vring_serial.errors import DependencyError
from vring_serial.guest.uml import UmlGuest, find_parts

ROUNDS = 7
SETTINGS = measure.Settings(rounds=ROUNDS, pings=10_000)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running(16) as rig:
        yield rig


def note(benchmark: object, results: list[Result]) -> None:
    for result in results:
        benchmark.extra_info[result.what] = {
            "median": round(result.median, 3),
            "unit": result.unit,
            **{name: round(value, 3) for name, value in result.notes.items()},
        }


@pytest.mark.parametrize("ports", [1, 16])
@pytest.mark.parametrize("size", [64, 4096, 65536, 1 << 20])
def test_transfer(benchmark, rig: Rig, size: int, ports: int) -> None:
    """Messages both ways, and a plain unix socket between guest and peer."""
    results = benchmark.pedantic(
        lambda: list(measure.transfer(rig, SETTINGS, ports, size)), rounds=1
    )
    note(benchmark, results)


@pytest.mark.parametrize("busy", [False, True], ids=["blocking", "polling"])
def test_round_trip(benchmark, busy: bool) -> None:
    """64 bytes to a FIFO and back, to a process and back, and eventfds."""
    with running(1, busy_poll=SETTINGS.busy_poll if busy else 0) as rig:
        results = benchmark.pedantic(
            lambda: list(measure.latency(rig, SETTINGS, busy=busy)), rounds=1
        )
    note(benchmark, results)


# --- Python as the host end

CHAINS, CHUNK = 256, 32 << 10
BASE = 1 << 30


class Consumer:
    """A ring full of written buffers, and a Python program that takes checksums of them."""

    def __init__(self) -> None:
        desc, avail, used = SplitDriver.layout(CHAINS)
        self.data = bytearray(32768 + CHAINS * CHUNK)
        self.data[32768:] = os.urandom(CHAINS * CHUNK)
        memory = GuestMemory([Region(BASE, self.data)])
        parts = (BASE, BASE + desc, BASE + 16384)
        assert desc + avail <= 16384
        assert used <= 16384
        self.driver = SplitDriver(memory, CHAINS, *parts, event_idx=True)
        self.queue = SplitQueue(memory, CHAINS, *parts, event_idx=True)
        self.buffers = np.frombuffer(self.data, np.uint8, CHAINS * CHUNK, 32768)
        self.addresses = BASE + 32768 + CHUNK * np.arange(CHAINS, dtype=np.uint64)
        self.scratch = np.empty(8 * CHUNK, np.uint8)

    def fill(self) -> None:
        self.driver.get_used()
        self.driver.add_many(self.addresses, np.full(CHAINS, CHUNK, np.uint32), False)
        self.driver.publish()

    def views(self) -> int:
        """Each buffer where it lies, through the chain's memoryview."""
        total = 0
        while batch := self.queue.pop_many(8):
            for chain in batch:
                for part in chain.readable:
                    total += int(np.frombuffer(part, np.uint64).sum())
            self.queue.push_many(batch)
        return total % (1 << 64)

    def batches(self) -> int:
        """Each batch joined into one array."""
        total = 0
        while batch := self.queue.pop_many(8):
            length = batch.gather_into(self.scratch)
            total += int(self.scratch[:length].view(np.uint64).sum())
            self.queue.push_many(batch)
        return total % (1 << 64)

    def memcpy(self) -> int:
        """The yardstick: the same pieces copied by numpy from a flat array, and the checksum."""
        total = 0
        for at in range(0, len(self.buffers), len(self.scratch)):
            self.scratch[:] = self.buffers[at : at + len(self.scratch)]
            total += int(self.scratch.view(np.uint64).sum())
        return total % (1 << 64)


@pytest.mark.parametrize("how", ["views", "batches"])
def test_python_consumer(benchmark, how: str) -> None:
    """8 MiB in chains of 32 KiB, checksummed, beside copying and checksumming the same bytes."""
    consumer = Consumer()
    work = getattr(consumer, how)
    plain = []

    def before() -> None:
        start = time.perf_counter()
        expected = consumer.memcpy()
        plain.append(time.perf_counter() - start)
        consumer.fill()
        assert work() == expected
        consumer.fill()

    benchmark.pedantic(work, setup=before, rounds=60)
    ratio = statistics.median(plain) / benchmark.stats["median"]
    benchmark.extra_info["GB/s"] = round(len(consumer.buffers) / benchmark.stats["median"] / 1e9, 2)
    benchmark.extra_info["ratio to memcpy and checksum"] = round(ratio, 2)


# --- a real Linux kernel

UML_BYTES = {"guest_to_host": 64 << 20, "host_to_guest": 16 << 20}
UML_ROUNDS = 5
PEER = """
import socket, sys
end = socket.socket(socket.AF_UNIX); end.connect(sys.argv[1])
left, data = int(sys.argv[3]), memoryview(bytearray(1 << 20))
while left:
    if sys.argv[2] == "guest_to_host":
        left -= end.recv_into(data) or sys.exit("end of file")
    else:
        end.sendall(data[:65536]); left -= 65536
print(flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def peer(path: Path, way: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that takes or gives all bytes of a round, then stays until told."""
    command = [sys.executable, "-c", PEER, str(path), way, str(UML_BYTES[way])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        except BaseException:
            process.kill()  # it may wait for bytes that a round which failed will never move
            raise
        process.stdin.close()


@pytest.mark.parametrize("way", list(UML_BYTES))
def test_user_mode_linux(benchmark, tmp_path: Path, way: str) -> None:
    """dd of 64 KiB blocks in a Linux guest, and the share of the time that our process works."""
    try:
        find_parts()
    except DependencyError as error:
        pytest.skip(str(error))
    size = UML_BYTES[way]
    ends = "if=/dev/zero of=/dev/vport0p2"
    if way == "host_to_guest":
        ends = "if=/dev/vport0p2 of=/dev/null iflag=fullblock"
    command = f"busybox dd {ends} bs=64k count={size >> 16}"
    shares = []
    with serving(tmp_path, [2]) as pid, asyncio.Runner() as runner:
        guest = UmlGuest([tmp_path / "vhost-user"])
        runner.run(guest.start())
        try:

            def run() -> None:
                start, cpu = time.perf_counter(), cpu_seconds(pid)
                assert f"{size >> 16}+0 records in" in runner.run(guest.run(command)).output
                shares.append((cpu_seconds(pid) - cpu) / (time.perf_counter() - start))

            with contextlib.ExitStack() as stack:

                def before() -> None:
                    stack.close()
                    stack.enter_context(peer(tmp_path / "port2", way))
                    time.sleep(0.5)  # the guest reads end of file until it has heard of the peer

                benchmark.pedantic(run, setup=before, rounds=UML_ROUNDS)
        finally:
            runner.run(guest.aclose())
    benchmark.extra_info["MB/s"] = round(size / benchmark.stats["median"] / 1e6)
    benchmark.extra_info["our share of the time"] = round(statistics.median(shares), 3)
