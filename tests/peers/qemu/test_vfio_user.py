"""Stock QEMU over vfio-user where it is less usual: INTx, and memory that is not shared."""

from __future__ import annotations

import json

import pytest
from exchange import MIB, Exchange, Payload, check, connections
from machine import QemuMachine

from vring_serial.transport.vfio_user.server import VfioUserServer


async def boot(bench, **options):
    socket = {"type": "unix", "path": str(bench.path)}
    device = {"driver": "vfio-user-pci", "addr": "05.0", "socket": socket}
    machine = QemuMachine(bench.directory, ["-device", json.dumps(device)], **options)
    bench.guests.append(machine)
    await machine.start()
    return machine


@pytest.mark.parametrize(
    ("options", "times"),
    [({"append": "pci=nomsi"}, 32), ({"shared": False}, 2)],
    ids=["intx", "not-shared"],
)
async def test_bytes_both_ways(bench_type, tmp_path, options, times):
    payload = Payload(MIB)
    bench = bench_type(tmp_path, boot, max_ports=4)
    bench.add_port(1, "org.example.data1")
    await bench.serve(VfioUserServer)
    try:
        guest = await bench.boot(files={"payload": payload.data}, **options)
        interrupts = await guest.run("grep virtio0 /proc/interrupts")
        assert ("MSIX" in interrupts) == ("append" not in options)
        features = await guest.run("cat /sys/bus/virtio/devices/virtio0/features")
        assert features.strip()[38] == "1", "NOTIFICATION_DATA: each kick carries it"
        await guest.run("until [ -c /dev/vport0p1 ]; do sleep 0.05; done")
        async with connections(bench.connect, "org.example.data1") as [stream]:
            exchange = Exchange(stream, "/dev/vport0p1", payload, times)
            await check(guest, exchange, expected=payload.sha256(times), timeout=120)
    finally:
        await bench.aclose()
