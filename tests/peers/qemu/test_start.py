"""What stock QEMU says when it starts with our function: nothing."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.bench import DeviceBench
from tests.support.processes import running
from tests.support.qemu_machine import QEMU
from tests.support.qemu_ways import vfio_user_device
from vring_serial.transport.vfio_user.server import VfioUserServer

QUIT = b'{"execute":"qmp_capabilities"}\n{"execute":"quit"}\n'


@pytest.mark.parametrize("options", [{}, {"transitional": True}, {"vectors": 0}, {"vectors": 253}])
async def test_qemu_starts_without_a_warning(tmp_path, caplog, options):
    """Nor do we warn of what it asks for: error recovery and release requests."""
    memory = "memory-backend-memfd,id=mem,size=64M,share=on"
    async with DeviceBench(tmp_path, max_ports=4) as bench:
        await bench.serve(VfioUserServer, **options)
        async with running(
            *(*QEMU, "-S", "-m", "64", "-object", memory, "-M", "q35,memory-backend=mem"),
            *(*vfio_user_device(bench.path, addr="05.0"), "-qmp", "stdio"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        ) as qemu:
            async with asyncio.timeout(60):
                _, said = await qemu.communicate(QUIT)
        assert said.decode() == ""
        assert qemu.returncode == 0
        assert [r.getMessage() for r in caplog.records if r.levelname != "INFO"] == []
