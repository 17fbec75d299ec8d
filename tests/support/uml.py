"""User-Mode Linux on a served device: one guest for a test, or one for many in turn."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tests.support.bench import DeviceBench, Stream
from tests.support.waiting import until
from vring_serial.chardev.base import Chardev
from vring_serial.device.console.port import Port
from vring_serial.guest.uml import UmlGuest

_CLASS = "/sys/class/virtio-ports"
#: Ends what scripts have left behind.
_END_ALL = """\
kill -9 -1
rm -rf /tmp/* /tmp/.[!.]*
"""
#: Says what is still there when all ports have gone.
_WHAT_IS_LEFT = f"""\
for process in /proc/[0-9]*; do
    case ${{process#/proc/}} in
        1 | $$) ;;
        *) [ ! -e $process/exe ] || tr '\\0' ' ' <$process/cmdline ;;  # the kernel's own have none
    esac
done
ls -A /tmp
ls {_CLASS} 2>&1  # it says so if the driver is not loaded
ls /dev | grep vport
"""


async def boot_uml(bench: DeviceBench, memory_mib: int = 128) -> UmlGuest:
    """Boot a guest on the device, which ends it."""
    guest = UmlGuest([bench.path], memory_mib=memory_mib)
    bench.guests.append(guest)
    await guest.start()
    return guest


class UmlPayload:
    """Random bytes in a file that the guest sees at ``guest_path``, and their checksum."""

    _count = 0

    def __init__(self, guest: UmlGuest, size: int) -> None:
        # A new name each time: the guest may have an old file in its page cache.
        UmlPayload._count += 1
        name = f"payload.{UmlPayload._count}"
        self.size = size
        self.data = os.urandom(size)
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        self.guest_path = f"/mnt/{name}"
        (guest.share / name).write_bytes(self.data)


class PluggedUml:
    """A device and a guest that is booted, whose ports come and go; made by :meth:`start`.

    Attributes:
        bench: the device, without ports in the beginning.
        guest: the guest.
    """

    def __init__(self, bench: DeviceBench, guest: UmlGuest) -> None:
        self.bench = bench
        self.guest = guest
        self._files = frozenset(guest.share.iterdir())

    @classmethod
    async def start(cls, directory: Path) -> PluggedUml:
        """Serve a device in ``directory`` and boot a guest on it."""
        bench = DeviceBench(directory)
        try:
            await bench.serve()
            return cls(bench, await boot_uml(bench))
        except BaseException:
            await bench.aclose()
            raise

    async def plug(
        self, nr: int, name: str, chardev: Chardev | None = None, *, console: bool = False
    ) -> Port:
        """Add a port as DeviceBench.make_port does, and wait until the guest can open it."""
        port = self.bench.make_port(nr, name, chardev, console=console)
        await self.bench.controller.plug_port(port)
        conditions = [
            f"[ -c /dev/vport0p{nr} ]",
            f'[ "$(cat {_CLASS}/vport0p{nr}/name)" = {name} ]',
        ]
        if console:
            conditions.append("true </dev/hvc0")
        await self.guest.run(f"until {' && '.join(conditions)}; do sleep 0.02; done 2>/dev/null")
        return port

    async def connect(self, name: str) -> Stream:
        """A stream to the host end of the port of this name."""
        return await self.bench.connect(name)

    async def settle(self) -> bool:
        """End what runs in the guest, remove all ports and files; whether nothing is left."""
        await self.guest.run(_END_ALL, timeout=10)
        for nr in list(self.bench.controller.ports):
            await self.bench.controller.remove_port(nr)
        for path in set(self.guest.share.iterdir()) - self._files:
            path.unlink()
        await until(self._is_empty, "nothing is left in the guest", timeout=10)
        return True

    async def _is_empty(self) -> bool:
        return not (await self.guest.run(_WHAT_IS_LEFT)).output

    async def aclose(self) -> None:
        """End both."""
        await self.bench.aclose()
