"""What the documents say to do without the hook: vring runs first, and then the domain starts."""

from __future__ import annotations

import re
from pathlib import Path

from lxml import etree

from tests.support.libvirt import CONVERT, DATA, NAME, SOCKETS, LibvirtHost, domain
from tests.support.waiting import until_file_says

DOCS = Path(__file__).parents[3] / "docs"
CHANNEL = f"<channel type='unix'><target type='virtio' name='{DATA}'/></channel>"
#: As docs/libvirt.md has it.
SERVE = f"virsh dumpxml {NAME} | vring serve --domain - --socket-owner libvirt-qemu"


async def serve(libvirt: LibvirtHost, command: str) -> None:
    """Run a command of the system's, and return when vring serves."""
    await libvirt.run("bash", "-c", f"({command}) >/run/serve.log 2>&1 </dev/null &")
    await until_file_says(libvirt.path("/run/serve.log"), "serving")


async def has_device(libvirt: LibvirtHost) -> bool:
    """Start the domain; return whether it has vring's device."""
    await libvirt.virsh("start", NAME, "--paused")
    found = await libvirt.virsh("qemu-monitor-command", NAME, "--hmp", "info pci")
    return "1af4:1043" in found


async def test_a_converted_domain(libvirt: LibvirtHost) -> None:
    assert SERVE in re.sub(r"\bvm\b", NAME, (DOCS / "libvirt.md").read_text())
    libvirt.path("/etc/libvirt/hooks/qemu.d/vring").unlink()
    await libvirt.end_daemon()
    await libvirt.start_daemon()
    await libvirt.define(domain())
    await libvirt.run("bash", "-c", CONVERT)
    libvirt.path(SOCKETS).mkdir(parents=True)
    await serve(libvirt, SERVE)
    assert await has_device(libvirt)


async def test_a_domain_that_somebody_changed(libvirt: LibvirtHost) -> None:
    """With the elements that docs/qemu.md has; its channels are in a file of vring's."""
    [block] = re.findall("```xml\n(.*?)```", (DOCS / "qemu.md").read_text(), re.DOTALL)
    elements = [etree.tostring(e).decode() for e in etree.fromstring(block).iterfind("*")]
    assert len(elements) == 2
    channels = f"<domain><name>{NAME}</name><devices>{CHANNEL}</devices></domain>"
    libvirt.path("/run/channels.xml").write_text(channels)
    xml = re.sub(rf"<channel(?:(?!</channel>).)*{DATA}.*?</channel>", "", domain(), flags=re.DOTALL)
    xml = re.sub(r"<console.*?</console>", "", xml, flags=re.DOTALL)
    await libvirt.define(xml.replace("</domain>", f"{''.join(elements)}</domain>"))
    options = "--domain /run/channels.xml --socket-owner libvirt-qemu"
    await serve(libvirt, f"cd /run && vring serve --vfio-user /run/vring.sock {options}")
    assert await has_device(libvirt)
