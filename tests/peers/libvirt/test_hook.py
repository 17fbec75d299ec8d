"""A real libvirtd calls the hook: the service starts and ends with the domain, whatever happens."""

from __future__ import annotations

import re
import stat

import pytest

from tests.support.libvirt import (
    CONVERT,
    DATA,
    NAME,
    SOCKETS,
    CommandFailedError,
    LibvirtHost,
    domain,
)
from tests.support.waiting import until

QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
NOBODY = 65534
#: What a SPICE client begins with (SpiceLinkHeader, SpiceLinkMess: the main channel, no
#: capabilities), and the first word of the server's answer.
LINK = r"""
exec 3<>/dev/tcp/127.0.0.1/5930
printf 'REDQ\2\0\0\0\2\0\0\0\22\0\0\0' >&3
printf '\0\0\0\0\1\0\0\0\0\0\0\0\0\0\22\0\0\0' >&3
head -c 4 <&3
"""


async def test_the_hook_keeps_a_domain_from_starting(libvirt: LibvirtHost) -> None:
    """What is wrong stands in libvirt's error; a saved state is among it."""
    await libvirt.define(domain())
    await libvirt.run("bash", "-c", CONVERT)
    await libvirt.virsh("start", NAME)
    await libvirt.virsh("managedsave", NAME)
    assert libvirt.service_is_gone()
    with pytest.raises(CommandFailedError, match="vring: vm: its state cannot be restored"):
        await libvirt.virsh("start", NAME)
    await libvirt.virsh("managedsave-remove", NAME)
    taken = libvirt.path(f"{SOCKETS}/{NAME}.{DATA}")
    taken.mkdir(parents=True)
    with pytest.raises(CommandFailedError, match=f"vring: .*{DATA}: exists and is not a socket"):
        await libvirt.virsh("start", NAME)
    taken.rmdir()
    await libvirt.virsh("start", NAME)


async def test_a_domain_that_does_not_start_leaves_no_service(libvirt: LibvirtHost) -> None:
    """The service serves, and then QEMU refuses one of its options."""
    options = "<qemu:arg value='-device'/><qemu:arg value='no-such-device'/>"
    await libvirt.define(
        domain(f"<qemu:commandline xmlns:qemu='{QEMU}'>{options}</qemu:commandline>")
    )
    await libvirt.run("bash", "-c", CONVERT)
    with pytest.raises(CommandFailedError, match="no-such-device"):
        await libvirt.virsh("start", NAME)
    assert "serving" in libvirt.path("/var/log/vring/vm.log").read_text()
    assert libvirt.service_is_gone()


@pytest.mark.parametrize("label", ["", "nobody:libvirt-qemu"])
async def test_sockets_belong_to_the_user_that_qemu_runs_as(
    libvirt: LibvirtHost, label: str
) -> None:
    """That is libvirt's own, or the domain's."""
    seclabel = f"<seclabel type='static' model='dac'><label>{label}</label></seclabel>"
    await libvirt.define(domain(seclabel if label else ""))
    await libvirt.run("bash", "-c", CONVERT)
    await libvirt.virsh("start", NAME, "--paused")
    (qemu,) = libvirt.processes("qemu-system")
    user = libvirt.path(f"/proc/{qemu}").stat().st_uid
    assert (user == NOBODY) == bool(label)
    for name in ("device.sock", f"{NAME}.{DATA}"):
        status = libvirt.path(f"{SOCKETS}/{name}").stat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (user, 0o660)
    services = libvirt.processes("vring_serial")
    assert {libvirt.path(f"/proc/{pid}").stat().st_uid for pid in services} == {0, user}
    await libvirt.virsh("destroy", NAME)
    assert libvirt.service_is_gone()


async def test_the_service_ends_after_a_qemu_that_died_unseen(libvirt: LibvirtHost) -> None:
    """libvirtd was not there; it calls the hook when it is back."""
    await libvirt.define(domain())
    await libvirt.run("bash", "-c", CONVERT)
    await libvirt.virsh("start", NAME, "--paused")
    await libvirt.end_daemon()
    await libvirt.kill("qemu-system")
    await libvirt.start_daemon()
    await until(libvirt.service_is_gone, "the end of the service")


async def test_a_service_that_was_killed_is_another_at_the_next_start(libvirt: LibvirtHost) -> None:
    await libvirt.define(domain())
    await libvirt.run("bash", "-c", CONVERT)
    await libvirt.virsh("start", NAME, "--paused")
    await libvirt.kill("vring_serial")
    await libvirt.virsh("destroy", NAME)
    assert libvirt.service_is_gone()
    await libvirt.virsh("start", NAME, "--paused")
    assert libvirt.processes("vring_serial")


async def test_a_copy_gets_sockets_of_its_own(libvirt: LibvirtHost) -> None:
    """Until then it does not start, and the service of the first one stays alone."""
    await libvirt.define(domain())
    await libvirt.run("bash", "-c", CONVERT)
    await libvirt.virsh("start", NAME, "--paused")
    services = libvirt.processes("vring_serial")
    xml = (await libvirt.virsh("dumpxml", "--inactive", NAME)).replace("console.log", "copy.log")
    xml = re.sub("<uuid>.*</uuid>", "", xml.replace(f"<name>{NAME}</name>", "<name>copy</name>"))
    await libvirt.define(xml)
    with pytest.raises(CommandFailedError, match=f"serves the domain {NAME}: a copy"):
        await libvirt.virsh("start", "copy")
    assert libvirt.processes("vring_serial") == services
    again = "vring libvirt convert --revert | vring libvirt convert | virsh define /dev/stdin"
    await libvirt.run("bash", "-c", f"virsh dumpxml --inactive copy | {again}")
    await libvirt.virsh("start", "copy", "--paused")
    assert set(libvirt.processes("vring_serial")) > set(services)
    await libvirt.virsh("destroy", "copy")
    assert libvirt.processes("vring_serial") == services


async def test_a_machine_without_pci_express(libvirt: LibvirtHost) -> None:
    """The device's slot is one that libvirt and QEMU have free there too."""
    await libvirt.define(domain().replace("machine='q35'", "machine='pc'"))
    await libvirt.run("bash", "-c", CONVERT)
    await libvirt.virsh("start", NAME, "--paused")
    found = await libvirt.virsh("qemu-monitor-command", NAME, "--hmp", "info pci")
    assert "1af4:1043" in found


@pytest.mark.peer("libspice-server.so.1")
async def test_clients_find_vrings_spice_server_at_the_displays_port(libvirt: LibvirtHost) -> None:
    """The domain gives its display up; libvirt gives the hook what moved, as it stands."""
    display = (
        "<graphics type='spice' port='5930'><listen type='address' address='127.0.0.1'/></graphics>"
    )
    channel = "<channel type='spicevmc'><target type='virtio'/></channel></devices>"
    libvirt.path("/run/domain.xml").write_text(domain().replace("</devices>", display + channel))
    await libvirt.run("bash", "-c", "vring libvirt convert --spice /run/domain.xml >/run/new.xml")
    await libvirt.virsh("define", "--validate", "/run/new.xml")
    await libvirt.virsh("start", NAME, "--paused")
    assert await libvirt.run("bash", "-c", LINK) == "REDQ"
