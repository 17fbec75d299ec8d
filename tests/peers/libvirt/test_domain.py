"""A domain of a real libvirtd's is converted, lives as domains do, and is reverted."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from tests.support.bench import hang_up
from tests.support.libvirt import DATA, NAME, CommandFailedError, LibvirtHost, domain
from tests.support.qemu_machine import kernel
from tests.support.waiting import until

#: As docs/libvirt.md has them.
CONVERT = "virsh dumpxml --inactive vm | vring libvirt convert > new.xml && virsh define new.xml"
REVERT = (
    "virsh dumpxml --inactive vm | vring libvirt convert --revert > old.xml && virsh define old.xml"
)
SOCKETS = f"/run/vring/{NAME}"
QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
NOBODY = 65534
SIZE = 1 << 19


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


def is_gone(libvirt: LibvirtHost) -> bool:
    """Return whether nothing is left of the service."""
    return not libvirt.path(SOCKETS).exists() and not libvirt.processes("vring_serial")


async def test_a_day_in_its_life(libvirt: LibvirtHost) -> None:
    await libvirt.define(domain())
    before = await libvirt.virsh("dumpxml", "--inactive", "vm")
    await libvirt.run("bash", "-c", CONVERT)
    data = libvirt.path(f"{SOCKETS}/{NAME}.{DATA}")

    await libvirt.boot("start", "vm")
    await works(libvirt, data)

    await libvirt.virsh("suspend", "vm")
    async with Echo(data) as coming:
        assert await libvirt.virsh("domstate", "vm") == "paused"
        assert not coming.done()
        await libvirt.virsh("resume", "vm")

    await libvirt.reboot("reboot", "vm", "--mode", "agent")
    await works(libvirt, data)
    await libvirt.restart_daemon()
    await works(libvirt, data)

    await libvirt.virsh("destroy", "vm")
    assert is_gone(libvirt)
    await libvirt.boot("start", "vm")
    await works(libvirt, data)
    await libvirt.virsh("shutdown", "vm", "--mode", "agent")
    await until(lambda: is_gone(libvirt), "the end of the service")
    assert await libvirt.virsh("domstate", "vm") == "shut off"

    await libvirt.run("bash", "-c", REVERT)
    assert await libvirt.virsh("dumpxml", "--inactive", "vm") == before
    await libvirt.boot("start", "vm")
    assert is_gone(libvirt)
    await works(libvirt, await libvirt.channel_path(DATA))


async def test_the_hook_keeps_a_domain_from_starting(libvirt: LibvirtHost) -> None:
    """What is wrong stands in libvirt's error; a saved state is among it."""
    await libvirt.define(domain())
    await libvirt.run("bash", "-c", CONVERT)
    await libvirt.virsh("start", "vm")
    await libvirt.virsh("managedsave", "vm")
    assert is_gone(libvirt)
    with pytest.raises(CommandFailedError, match="vring: vm: its state cannot be restored"):
        await libvirt.virsh("start", "vm")
    await libvirt.virsh("managedsave-remove", "vm")
    taken = libvirt.path(f"{SOCKETS}/{NAME}.{DATA}")
    taken.mkdir(parents=True)
    with pytest.raises(CommandFailedError, match=f"vring: .*vm.{DATA}: exists and is not a socket"):
        await libvirt.virsh("start", "vm")
    taken.rmdir()
    await libvirt.virsh("start", "vm")


async def test_a_domain_that_does_not_start_leaves_no_service(libvirt: LibvirtHost) -> None:
    """The service serves, and then QEMU refuses one of its options."""
    options = "<qemu:arg value='-device'/><qemu:arg value='no-such-device'/>"
    await libvirt.define(
        domain(f"<qemu:commandline xmlns:qemu='{QEMU}'>{options}</qemu:commandline>")
    )
    await libvirt.run("bash", "-c", CONVERT)
    with pytest.raises(CommandFailedError, match="no-such-device"):
        await libvirt.virsh("start", "vm")
    assert "serving" in libvirt.path("/var/log/vring/vm.log").read_text()
    assert is_gone(libvirt)


@pytest.mark.parametrize("label", ["", "nobody:libvirt-qemu"])
async def test_sockets_belong_to_the_user_that_qemu_runs_as(
    libvirt: LibvirtHost, label: str
) -> None:
    """That is libvirt's own, or the domain's."""
    seclabel = f"<seclabel type='static' model='dac'><label>{label}</label></seclabel>"
    await libvirt.define(domain(seclabel if label else ""))
    await libvirt.run("bash", "-c", CONVERT)
    await libvirt.virsh("start", "vm", "--paused")
    (qemu,) = libvirt.processes("qemu-system")
    user = libvirt.path(f"/proc/{qemu}").stat().st_uid
    assert (user == NOBODY) == bool(label)
    for name in ("device.sock", f"vm.{DATA}"):
        status = libvirt.path(f"{SOCKETS}/{name}").stat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (user, 0o660)
    services = libvirt.processes("vring_serial")
    assert {libvirt.path(f"/proc/{pid}").stat().st_uid for pid in services} == {0, user}
    await libvirt.virsh("destroy", "vm")
    assert is_gone(libvirt)
