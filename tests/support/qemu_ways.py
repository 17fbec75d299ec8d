"""Every way in which stock QEMU can have a served console device, and a guest on each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.bench import MIB, DeviceBench, Transport
from tests.support.exchange import Payload
from tests.support.qemu_machine import QemuMachine
from tests.support.waiting import until
from vring_serial.device.console.events import DeviceEvent
from vring_serial.transport.vfio_user.server import VfioUserServer
from vring_serial.transport.vhost_user.backend import VhostUserBackend

#: Ports that bulk data goes through.
DATA_PORTS = (1, 2, 3, 4)
#: The port of QEMU's own virtio-serial device beside it.
OWN_PORT = "org.example.own"

#: The names of all ports of our device that the guest knows; a port is there before its name is.
PORT_NAMES = "cat /sys/class/virtio-ports/vport0p*/name 2>/dev/null || true"
#: Ends what scripts have left behind, and waits until it has ended: zombies have no program.
_END_ALL = """\
kill -9 -1
rm -rf /tmp/port
for process in /proc/[0-9]*; do
    case ${process#/proc/} in
        1 | $$) ;;
        *) while [ -e $process/exe ]; do sleep 0.05; done ;;
    esac
done
"""


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
        machine: QEMU's options for the machine.
        payload: bytes that the guest has as /payload.
    """

    transport: Transport
    served: Mapping[str, Any]
    device_id: int = 0x1043
    subsystem_id: int = 0x1100
    msix: bool = True
    append: str = ""
    machine: Sequence[str] = ()
    payload: int = 16 * MIB

    def options(self, bench: DeviceBench) -> list[str]:
        """QEMU's options for the device at 00:05.0."""
        if self.transport is VfioUserServer:
            return vfio_user_device(bench.path, addr="05.0")
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
    "vfio-user-iommu": Way(
        VfioUserServer,
        {},
        append="intel_iommu=on",
        machine=("-device", "intel-iommu,caching-mode=on"),
        # Each buffer is mapped and unmapped, and QEMU tells the device of both.
        payload=MIB // 4,
    ),
    "vfio-user-transitional": Way(
        VfioUserServer, {"transitional": True}, device_id=0x1003, subsystem_id=3
    ),
}


def vfio_user_device(path: Path, **properties: str) -> list[str]:
    """QEMU's options for a device that is served at ``path`` over vfio-user."""
    socket = {"type": "unix", "path": str(path)}
    return ["-device", json.dumps({"driver": "vfio-user-pci", "socket": socket, **properties})]


async def boot_qemu(bench: DeviceBench, devices: Sequence[str], **options: Any) -> QemuMachine:
    """Boot a machine with these devices and options of QemuMachine; the bench ends it."""
    machine = QemuMachine(bench.directory, devices, **options)
    bench.guests.append(machine)
    await machine.start()
    return machine


class QemuOnDevice:
    """A device with DATA_PORTS, and a guest on it; made by :meth:`start`.

    Attributes:
        way: how QEMU has the device.
        bench: the device.
        payload: what the guest has as /payload.
        events: what happened on the device since the test began.
        guest: the machine.
        renumbered: a test has made the device another one than vport0 for its guest.
    """

    guest: QemuMachine

    def __init__(self, way: Way, directory: Path) -> None:
        self.way = way
        self.bench = DeviceBench(directory, max_ports=8)
        self.payload = Payload(way.payload)
        self.events: list[DeviceEvent] = []
        self.renumbered = False
        for nr in DATA_PORTS:
            self.bench.add_port(nr, f"org.example.data{nr}")
        self.bench.controller.on_event = self.events.append

    @classmethod
    async def start(cls, way: Way, directory: Path) -> QemuOnDevice:
        """Serve the device and boot."""
        started = cls(way, directory)
        try:
            await started.bench.serve(way.transport, **way.served)
            await started.boot()
        except BaseException:
            await started.aclose()
            raise
        started.events.clear()
        return started

    def _own_device(self) -> list[str]:
        """QEMU's options for a virtio-serial device of its own at 00:06.0, with a port."""
        path = self.bench.socket_path(OWN_PORT)
        return [
            *("-device", "virtio-serial-pci,id=own,addr=06.0"),
            *("-chardev", f"socket,id=own,path={path},server=on,wait=off"),
            *("-device", f"virtserialport,bus=own.0,chardev=own,name={OWN_PORT}"),
        ]

    async def boot(self) -> None:
        """Boot another guest; the one before has been killed."""
        self.guest = await boot_qemu(
            self.bench,
            [*self.way.machine, *self.way.options(self.bench), *self._own_device()],
            cpus=2,
            files={"payload": self.payload.data},
            append=f"reboot=t {self.way.append}",
        )
        await self.ports_are_there()

    async def ports_are_there(self) -> None:
        """The guest takes commands before it knows all ports: their names come last."""
        await self.guest.run(
            f"until [ $({{ {PORT_NAMES}; }} | wc -l) = {len(DATA_PORTS)} ]; do sleep 0.05; done"
        )

    async def settle(self) -> bool:
        """End what runs in the guest; whether it has the ports of the beginning, all closed."""
        if self.renumbered:
            return False
        await self.guest.run(_END_ALL)
        ports = self.bench.controller.ports
        await until(
            lambda: not any(port.guest_open or port.host_open for port in ports.values()),
            "all ports are closed",
        )
        self.events.clear()
        names = "".join(f"org.example.data{nr}\n" for nr in DATA_PORTS)
        return tuple(ports) == DATA_PORTS and await self.guest.run(PORT_NAMES) == names

    async def aclose(self) -> None:
        """End both."""
        await self.bench.aclose()
