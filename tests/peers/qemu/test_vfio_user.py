"""Stock QEMU over vfio-user where it is less usual: INTx, and memory that is not shared."""

from __future__ import annotations

import pytest

from tests.support.bench import MIB, DeviceBench
from tests.support.exchange import Exchange, Payload, check, connections
from tests.support.qemu_ways import boot_qemu, vfio_user_device
from vring_serial.transport.vfio_user.server import VfioUserServer


@pytest.mark.parametrize(
    ("options", "times"),
    [({"append": "pci=nomsi"}, 32), ({"shared": False}, 2)],
    ids=["intx", "not-shared"],
)
async def test_bytes_both_ways(tmp_path, options, times):
    payload = Payload(MIB)
    async with DeviceBench(tmp_path, max_ports=4) as bench:
        bench.add_port(1, "org.example.data1")
        await bench.serve(VfioUserServer)
        device = vfio_user_device(bench.path, addr="05.0")
        guest = await boot_qemu(bench, device, files={"payload": payload.data}, **options)
        interrupts = await guest.run("grep virtio0 /proc/interrupts")
        assert ("MSIX" in interrupts) == ("append" not in options)
        features = await guest.run("cat /sys/bus/virtio/devices/virtio0/features")
        assert features.strip()[38] == "1", "NOTIFICATION_DATA: each kick carries it"
        await guest.run("until [ -c /dev/vport0p1 ]; do sleep 0.05; done")
        async with connections(bench.connect, "org.example.data1") as [stream]:
            exchange = Exchange(stream, "/dev/vport0p1", payload, times)
            await check(guest, exchange, expected=payload.sha256(times), timeout=120)
