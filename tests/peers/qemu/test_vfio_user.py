"""Stock QEMU over vfio-user where it is less usual: INTx, and memory that is not shared."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os

import pytest
from machine import QemuMachine

from vring_serial.transport.vfio_user import VfioUserServer

MIB = 1 << 20


async def boot(bench, **options):
    socket = {"type": "unix", "path": str(bench.path)}
    device = {"driver": "vfio-user-pci", "addr": "05.0", "socket": socket}
    machine = QemuMachine(bench.directory, ["-device", json.dumps(device)], **options)
    bench.guests.append(machine)
    await machine.start()
    return machine


@pytest.mark.parametrize(
    ("options", "times"),
    [({"append": "pci=nomsi"}, 8), ({"shared": False}, 2)],
    ids=["intx", "not-shared"],
)
async def test_bytes_both_ways(bench_type, tmp_path, options, times):
    payload = os.urandom(MIB)
    wanted = hashlib.sha256(payload * times).hexdigest()
    bench = bench_type(tmp_path, boot, max_ports=4)
    bench.add_port(1, "org.example.data1")
    await bench.serve(VfioUserServer)
    try:
        guest = await bench.boot(files={"payload": payload}, **options)
        interrupts = await guest.run("grep virtio0 /proc/interrupts")
        assert ("MSIX" in interrupts) == ("append" not in options)
        reader, writer = await bench.connect("org.example.data1")
        with contextlib.closing(writer):
            await guest.run(f"for i in $(seq {times}); do cat /payload; done >/dev/vport0p1 &")
            async with asyncio.timeout(120):
                data = await reader.readexactly(times * MIB)
            assert hashlib.sha256(data).hexdigest() == wanted
            writer.write(payload * times)
            command = f"head -c {times * MIB} /dev/vport0p1 | sha256sum"
            assert (await guest.run(command, timeout=120)).split()[0] == wanted
        await writer.wait_closed()
    finally:
        await bench.close()
