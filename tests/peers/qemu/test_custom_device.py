"""examples/custom_device.py: Linux under stock QEMU reads it as a random number generator."""

from __future__ import annotations

import asyncio
import base64
import lzma
import sys
import zlib

import pytest

from tests.support.examples import EXAMPLES
from tests.support.processes import end
from tests.support.qemu_machine import QemuMachine, modules
from tests.support.qemu_ways import vfio_user_device
from tests.support.waiting import until

EXAMPLE = EXAMPLES / "custom_device.py"
DRIVER = "kernel/drivers/char/hw_random/virtio-rng.ko.xz"
BYTES = 1 << 16


def options(way, path):
    """QEMU's, as the example's head says."""
    if way == "vfio-user":
        return vfio_user_device(path)
    device = "vhost-user-test-device-pci,chardev=rng,virtio-id=4,num_vqs=1"
    return ["-chardev", f"socket,id=rng,path={path}", "-device", device]


@pytest.mark.parametrize("way", ["vhost-user", "vfio-user"])
async def test_a_guest_reads_it_as_hwrng(tmp_path, way):
    path = tmp_path / "rng.sock"
    example = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", EXAMPLE, f"--{way}", path, stderr=asyncio.subprocess.PIPE
    )
    driver = lzma.decompress((modules() / DRIVER).read_bytes())
    machine = QemuMachine(tmp_path, options(way, path), files={"virtio-rng.ko": driver})
    try:
        await until(path.exists, "the example listens")
        await machine.start()
        await machine.run("insmod /virtio-rng.ko")
        current = await machine.run("cat /sys/class/misc/hw_random/rng_current")
        assert current.startswith("virtio_rng")
        read = f"head -c {BYTES} /dev/hwrng | base64"
        first, second = [base64.b64decode(await machine.run(read)) for _ in range(2)]
        assert len(first) == len(second) == BYTES
        assert first != second
        assert len(zlib.compress(first)) > BYTES, "random bytes cannot be compressed"
        await machine.aclose()
        example.terminate()
        async with asyncio.timeout(20):
            _, said = await example.communicate()
        assert example.returncode == 0
        assert b"Traceback" not in said
    finally:
        await machine.aclose()
        await end(example)
