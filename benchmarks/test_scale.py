"""Many ports and many devices in one process of `vring serve`: memory, and wake-ups at rest."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vring_serial import EmbeddedGuest
from vring_serial.bench.usage import cpu_seconds, private_bytes, wake_ups

REST = 2.0


@contextlib.contextmanager
def serving(directory: Path, devices: int, ports: int) -> Iterator[int]:
    """One process with so many devices of so many ports, all with sockets; its id."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    domain = directory / "domain.xml"
    domain.write_text(domain_xml(directory, devices, ports))
    command = [sys.executable, "-m", "vring_serial", "serve", "--no-keeper", "--log-level", "error"]
    command += ["--domain", str(domain)]
    for n in range(devices):
        command += ["--vhost-user", f"{directory}/{n}"]
    try:
        with subprocess.Popen(command) as process:
            try:
                while not (directory / str(devices - 1)).exists():
                    assert process.poll() is None
                    time.sleep(0.05)
                yield process.pid
            finally:
                process.terminate()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def domain_xml(directory: Path, devices: int, ports: int) -> str:
    parts = ["<domain type='kvm'><devices>"]
    for n in range(devices):
        parts.append(f"<controller type='virtio-serial' index='{n}' ports='{ports + 1}'/>")
        for nr in range(1, ports + 1):
            parts.append(
                f"<channel type='unix'><source mode='bind' path='{directory}/{n}.{nr}'/>"
                f"<target type='virtio' name='org.example.{n}.{nr}'/>"
                f"<address type='virtio-serial' controller='{n}' bus='0' port='{nr}'/></channel>"
            )
    return "".join([*parts, "</devices></domain>"])


def rest(pid: int) -> dict[str, float]:
    """What the process does while nothing happens."""
    time.sleep(0.5)
    wakes, cpu = wake_ups(pid), cpu_seconds(pid)
    time.sleep(REST)
    return {
        "wake-ups a second": (wake_ups(pid) - wakes) / REST,
        "CPU ms a second": round((cpu_seconds(pid) - cpu) * 1000 / REST, 3),
    }


@pytest.mark.parametrize("ports", [1, 126])
def test_ports_of_one_device(benchmark, tmp_path: Path, ports: int) -> None:
    """vhost-user can name 127 ports, of which libvirt leaves port 0 to consoles."""
    with serving(tmp_path, 1, ports) as pid:
        before = private_bytes(pid)
        guest = EmbeddedGuest(
            str(tmp_path / "0"), memory=512 << 20, max_ports=ports + 1, queue_size=64
        )

        async def use() -> dict[str, float]:
            await guest.start()
            for nr in range(1, ports + 1):
                await (await guest.wait_port(nr=nr)).take_rings()
            found = {"KiB with a guest": (private_bytes(pid) - before) >> 10}
            found |= await asyncio.to_thread(rest, pid)
            await guest.aclose()
            return found

        found = benchmark.pedantic(lambda: asyncio.run(use()), rounds=1)
        benchmark.extra_info |= {"KiB before": before >> 10, **found}


@pytest.mark.parametrize("devices", [1, 256])
def test_devices_of_one_process(benchmark, tmp_path: Path, devices: int) -> None:
    """Each with one port and a guest that has it open."""
    with serving(tmp_path, devices, 1) as pid:
        before = private_bytes(pid)

        async def use() -> dict[str, float]:
            guests = [
                EmbeddedGuest(str(tmp_path / str(n)), memory=8 << 20, queue_size=64)
                for n in range(devices)
            ]
            for guest in guests:
                await guest.start()
                await (await guest.wait_port(nr=1)).take_rings()
            found = {"KiB with guests": (private_bytes(pid) - before) >> 10}
            found |= await asyncio.to_thread(rest, pid)
            for guest in guests:
                await guest.aclose()
            return found

        found = benchmark.pedantic(lambda: asyncio.run(use()), rounds=1)
        benchmark.extra_info |= {"KiB before": before >> 10, **found}
