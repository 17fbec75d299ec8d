"""A domain of a real libvirtd's is converted, lives as domains do, and is reverted."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from tests.support.bench import hang_up
from tests.support.libvirt import (
    CONVERT,
    DATA,
    NAME,
    REVERT,
    SOCKETS,
    LibvirtHost,
    domain,
)
from tests.support.qemu_machine import kernel
from tests.support.waiting import until

SIZE = 1 << 19
#: A channel that an operator adds to the domain that runs: one of QEMU's.
LATER = "<channel type='null'><target type='virtio' name='org.example.later'/></channel>"


class Echo:
    """Bytes for a port of the guest's, and the same bytes back from it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = os.urandom(SIZE)

    async def __aenter__(self) -> asyncio.Task[None]:
        reader, self._writer = await asyncio.open_unix_connection(self._path)
        self._writer.write(self._bytes)
        self._coming = asyncio.create_task(self._receive(reader))
        return self._coming

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        async with asyncio.timeout(60):
            assert await reader.readexactly(SIZE) == self._bytes

    async def __aexit__(self, *error: object) -> None:
        try:
            await self._coming
        finally:
            await hang_up(self._writer)


async def works(libvirt: LibvirtHost, data: Path) -> None:
    """Bytes go to the guest and back, and libvirt has its own agent there."""
    async with Echo(data):
        release = (await libvirt.agent("guest-get-osinfo"))["kernel-release"]
        assert kernel().name == f"vmlinuz-{release}"


async def test_a_day_in_its_life(libvirt: LibvirtHost) -> None:
    await libvirt.define(domain())
    before = await libvirt.virsh("dumpxml", "--inactive", NAME)
    await libvirt.run("bash", "-c", CONVERT)
    data = libvirt.path(f"{SOCKETS}/{NAME}.{DATA}")

    await libvirt.boot("start", NAME)
    await works(libvirt, data)

    await libvirt.virsh("attach-device", NAME, "/dev/stdin", "--live", data=LATER)
    await libvirt.shell.run(
        "until grep -qx org.example.later /sys/class/virtio-ports/*/name; do sleep 0.05; done"
    )
    await works(libvirt, data)

    await libvirt.run("vring", "upgrade", "--pid-file", f"{SOCKETS}/device.pid")
    await works(libvirt, data)

    await libvirt.virsh("suspend", NAME)
    async with Echo(data) as coming:
        assert await libvirt.virsh("domstate", NAME) == "paused"
        assert not coming.done()
        await libvirt.virsh("resume", NAME)

    await libvirt.reboot("reboot", NAME, "--mode", "agent")
    await works(libvirt, data)
    await libvirt.end_daemon()
    await libvirt.start_daemon()
    await works(libvirt, data)

    await libvirt.virsh("destroy", NAME)
    assert libvirt.service_is_gone()
    await libvirt.boot("start", NAME)
    await works(libvirt, data)
    await libvirt.virsh("shutdown", NAME, "--mode", "agent")
    await until(lambda: libvirt.service_is_gone(), "the end of the service")
    assert await libvirt.virsh("domstate", NAME) == "shut off"

    await libvirt.run("bash", "-c", REVERT)
    assert await libvirt.virsh("dumpxml", "--inactive", NAME) == before


async def test_a_reverted_domain_has_qemus_own_device(libvirt: LibvirtHost) -> None:
    """It was reverted while it ran: its service ends with that run."""
    await libvirt.define(domain())
    await libvirt.run("bash", "-c", CONVERT)
    await libvirt.virsh("start", NAME, "--paused")
    await libvirt.run("bash", "-c", REVERT)
    assert libvirt.processes("vring_serial")
    await libvirt.virsh("destroy", NAME)
    assert libvirt.service_is_gone()
    await libvirt.boot("start", NAME)
    assert not libvirt.processes("vring_serial")
    await works(libvirt, await libvirt.channel_path(DATA))


async def test_what_was_edited_stays_when_the_rest_is_reverted(libvirt: LibvirtHost) -> None:
    await libvirt.define(domain())
    before = await libvirt.virsh("dumpxml", "--inactive", NAME)
    await libvirt.run("bash", "-c", CONVERT)
    await libvirt.virsh("desc", NAME, "--config", "said later")
    await libvirt.run("bash", "-c", REVERT)
    assert await libvirt.virsh("desc", NAME) == "said later"
    await libvirt.virsh("desc", NAME, "--config", "")
    assert await libvirt.virsh("dumpxml", "--inactive", NAME) == before
