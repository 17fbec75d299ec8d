"""A served device and a guest of Debian testing's kernel in Debian testing's QEMU on it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from exchange import MIB, Payload
from machine import QemuMachine

from vring_serial.transport.vfio_user.server import VfioUserServer
from vring_serial.transport.vhost_user.backend import VhostUserBackend

#: Ports of the shared device that bulk data goes through.
DATA_PORTS = (1, 2, 3, 4)
#: The port of QEMU's own virtio-serial device beside it.
OWN_PORT = "org.example.own"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.peer("qemu-root"))


@dataclass(frozen=True)
class Way:
    """One way for QEMU to have our device.

    Attributes:
        transport: what serves the device.
        served: options of that.
        device_id: what the guest reads in configuration space.
        subsystem_id: likewise.
        msix: whether the device has MSI-X.
        append: words for the guest's kernel.
    """

    transport: type
    served: Mapping[str, Any]
    device_id: int = 0x1043
    subsystem_id: int = 0x1100
    msix: bool = True
    append: str = ""

    def options(self, bench: Any) -> list[str]:
        """QEMU's options for the device at 00:05.0."""
        if self.transport is VfioUserServer:
            socket = {"type": "unix", "path": str(bench.path)}
            device = {"driver": "vfio-user-pci", "addr": "05.0", "socket": socket}
            return ["-device", json.dumps(device)]
        words = (
            "vhost-user-test-device-pci,chardev=vring,virtio-id=3,vq_size=128,config_size=12,"
            f"num_vqs={bench.controller.num_queues},addr=05.0"
        )
        return ["-chardev", f"socket,id=vring,path={bench.path}", "-device", words]


WAYS = {
    "vhost-user": Way(VhostUserBackend, {}, msix=False),
    "vhost-user-packed": Way(VhostUserBackend, {"packed": True}, msix=False),
    "vfio-user": Way(VfioUserServer, {}),
    "vfio-user-packed": Way(VfioUserServer, {"packed": True}),
    "vfio-user-legacy": Way(
        VfioUserServer,
        {"transitional": True},
        device_id=0x1003,
        subsystem_id=3,
        append="virtio_pci.force_legacy=1",
    ),
    "vfio-user-transitional": Way(
        VfioUserServer, {"transitional": True}, device_id=0x1003, subsystem_id=3
    ),
}


def own_device(bench: Any) -> list[str]:
    """QEMU's options for a virtio-serial device of its own at 00:06.0, with a port."""
    return [
        *("-device", "virtio-serial-pci,id=own,addr=06.0"),
        *("-chardev", f"socket,id=own,path={bench.socket_path(OWN_PORT)},server=on,wait=off"),
        *("-device", f"virtserialport,bus=own.0,chardev=own,name={OWN_PORT}"),
    ]


async def boot(bench: Any, way: Way, **options: Any) -> QemuMachine:
    machine = QemuMachine(bench.directory, [*way.options(bench), *own_device(bench)], **options)
    bench.guests.append(machine)
    await machine.start()
    return machine


class Shared:
    """One device and one guest for many tests; each gets the guest booted and the ports idle.

    Attributes:
        bench: the device.
        events: what happened on it in this test.
        guest: the machine.
        renumbered: the device is no longer vport0, until the guest boots again.
    """

    def __init__(self, bench: Any, way: Way) -> None:
        self.bench = bench
        self.way = way
        self.payload = Payload(16 * MIB)
        self.events: list[Any] = []
        self.guest: Any = None
        self.renumbered = False
        bench.controller.on_event = self.events.append

    async def begin(self) -> None:
        """Boot if the guest is not there, or not as tests expect it."""
        if self.guest is None or self.renumbered:
            await self.boot()
        self.events.clear()

    async def boot(self) -> None:
        await self.kill()
        self.renumbered = False
        self.guest = await self.bench.boot(
            self.way,
            cpus=2,
            files={"payload": self.payload.data},
            append=f"reboot=t {self.way.append}",
        )
        await self.ports_are_there()

    async def ports_are_there(self) -> None:
        """The guest takes commands before it knows all ports: their names come last."""
        names = "cat /sys/class/virtio-ports/vport0p*/name 2>/dev/null | wc -l"
        await self.guest.run(f"until [ $({names}) = {len(DATA_PORTS)} ]; do sleep 0.05; done")

    async def kill(self) -> None:
        if self.guest is not None:
            await self.guest.aclose()
            self.guest = None


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=WAYS)
async def shared(
    request: pytest.FixtureRequest,
    bench_type: type[Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Shared]:
    way = WAYS[request.param]
    bench = bench_type(tmp_path_factory.mktemp(request.param), boot, max_ports=8)
    for nr in DATA_PORTS:
        bench.add_port(nr, f"org.example.data{nr}")
    shared = Shared(bench, way)
    try:
        await bench.serve(way.transport, **way.served)
        yield shared
    finally:
        await bench.aclose()
