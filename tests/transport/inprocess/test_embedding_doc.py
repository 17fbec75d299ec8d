"""The Python of docs/embedding.md runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import vring
from vring import GuestMemory, Region
from vring.testing import GuestQueue
from vring_serial.device.testing import ANY_FEATURE, MmioDriver
from vring_serial.transport.inprocess.fronts import InProcessMmio, PolledHost

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


def test_the_entropy_device():
    host = PolledHost()
    queue = GuestQueue(bytearray(GuestQueue.bytes_needed(8, 64)), 8, 64, writable=True)
    memory = GuestMemory([*queue.memory.regions, Region(0, bytearray(64))])
    mmio = InProcessMmio(host, run(BLOCKS[2])["Entropy"](), memory, interrupt=lambda level: None)
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
    assert len(BLOCKS) == 3


def test_the_cython_block_is_translated(tmp_path):
    (block,) = re.findall(r"```cython\n(.*?)```", PAGE.read_text(), re.DOTALL)
    source = tmp_path / "drain.pyx"
    source.write_text(block)
    command = [sys.executable, "-m", "cython", "-3", "-Wextra", "-I", vring.get_include(), source]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
