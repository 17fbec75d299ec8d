"""The Python of docs/embedding.md runs as it stands."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vring
from vring import GuestMemory, Region
from vring.testing import GuestQueue
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.device.testing import ANY_FEATURE, MmioDriver
from vring_serial.transport.inprocess.fronts import InProcessMmio, InProcessPci, PolledHost

PAGE = Path(__file__).parents[3] / "docs" / "embedding.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def run(block: str) -> dict[str, object]:
    names: dict[str, object] = {}
    exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_shortest_way(capsys):
    run(BLOCKS[0])
    assert capsys.readouterr().out == ""


def test_an_idle_processor_waits():
    host = PolledHost()
    run(BLOCKS[1])["wait_for_device"](host, 0.01)
    host.close()


def test_a_snapshot_goes_on():
    names = run(BLOCKS[2])
    host = PolledHost()
    callbacks = {"msi": lambda address, data: None, "intx": lambda level: None}
    device = Controller(max_ports=4)
    device.add_port(Port(1, "org.example.greeting", ProtocolChardev("greeter", asyncio.Protocol)))
    host.complete(device.start())
    pci = InProcessPci(host, device, None, **callbacks)
    pci.config.write(0x3C, 11, 1)
    saved = pci.save()
    names["end"](host, device, pci)
    device, pci = names["go_on"](host, saved, None, asyncio.Protocol, **callbacks)
    assert pci.config.read(0x3C, 1) == 11
    names["end"](host, device, pci)
    with pytest.raises(SystemExit, match="it is torn"):
        names["go_on"](host, saved[:-1], None, asyncio.Protocol, **callbacks)
    host.close()


def test_a_device_of_one_s_own_says_what_its_state_is():
    host = PolledHost()
    counter = run(BLOCKS[3])["Counter"]
    first = counter()
    mmio = InProcessMmio(host, first, None, interrupt=lambda level: None)
    first.state.served = 3
    saved = mmio.save()
    mmio.close()
    second = counter()
    mmio = host.complete(
        InProcessMmio.restore(saved, host, second, None, interrupt=lambda level: None)
    )
    assert second.state.served == 3
    mmio.close()
    host.close()


def test_the_entropy_device():
    host = PolledHost()
    queue = GuestQueue(bytearray(GuestQueue.bytes_needed(8, 64)), 8, 64, writable=True)
    memory = GuestMemory([*queue.memory.regions, Region(0, bytearray(64))])
    mmio = InProcessMmio(host, run(BLOCKS[4])["Entropy"](), memory, interrupt=lambda level: None)
    driver = MmioDriver(mmio.read, mmio.write)
    driver.accept(ANY_FEATURE & ~(1 << 29))
    driver.start_queue(0, 8, queue.rings)
    driver.status = 15
    queue.offer()
    driver.notify(0)
    assert len(queue.receive()) == 8 * 64
    mmio.close()
    host.close()


def test_no_block_is_forgotten():
    assert len(BLOCKS) == 5


def test_the_cython_block_is_translated(tmp_path):
    (block,) = re.findall(r"```cython\n(.*?)```", PAGE.read_text(), re.DOTALL)
    source = tmp_path / "drain.pyx"
    source.write_text(block)
    command = [sys.executable, "-m", "cython", "-3", "-Wextra", "-I", vring.get_include(), source]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
