"""What stock QEMU says when it starts with our function: nothing."""

from __future__ import annotations

import asyncio
import json

import pytest
from machine import QEMU

from tests.support.processes import running
from vring_serial.transport.vfio_user.server import VfioUserServer

QUIT = b'{"execute":"qmp_capabilities"}\n{"execute":"quit"}\n'


@pytest.mark.parametrize("options", [{}, {"transitional": True}, {"vectors": 0}, {"vectors": 253}])
async def test_qemu_starts_without_a_warning(bench_type, tmp_path, caplog, options):
    """Nor do we warn of what it asks for: error recovery and release requests."""
    bench = bench_type(tmp_path, None, max_ports=4)
    await bench.serve(VfioUserServer, **options)
    socket = {"type": "unix", "path": str(bench.path)}
    device = {"driver": "vfio-user-pci", "addr": "05.0", "socket": socket}
    memory = "memory-backend-memfd,id=mem,size=64M,share=on"
    try:
        async with running(
            *(*QEMU, "-S", "-m", "64", "-object", memory, "-M", "q35,memory-backend=mem"),
            *("-device", json.dumps(device), "-qmp", "stdio"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        ) as qemu:
            async with asyncio.timeout(60):
                _, said = await qemu.communicate(QUIT)
        assert said.decode() == ""
        assert qemu.returncode == 0
        assert [r.getMessage() for r in caplog.records if r.levelname != "INFO"] == []
    finally:
        await bench.aclose()
