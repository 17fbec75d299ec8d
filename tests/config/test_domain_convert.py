"""`vring libvirt convert` and `--revert`: what moves, what stays, and that nothing gets lost."""

from __future__ import annotations

import base64
import re
import zlib

import pytest
from lxml import etree

from tests.support.examples import EXAMPLES
from vring_serial.config import domain_xml
from vring_serial.config.domain_convert import convert
from vring_serial.config.domain_revert import revert
from vring_serial.errors import ConfigError

GUEST_AGENT = (
    "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/>"
    "<address type='virtio-serial' controller='0' bus='0' port='1'/></channel>"
)
DATA = (
    "<channel type='unix'><source mode='bind' path='/run/d.sock'/>"
    "<target type='virtio' name='org.example.data'/>"
    "<address type='virtio-serial' controller='0' bus='0' port='2'/></channel>"
)
SPICEVMC = "<channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>"
SPICE = "<graphics type='spice' autoport='yes'/>"
CONTROLLER = (
    "<controller type='virtio-serial' index='0'>"
    "<address type='pci' domain='0x0000' bus='0x00' slot='0x05' function='0x0'/></controller>"
)
OURS = "{urn:vring:domain:1}domain"


def domain(
    devices: str, top: str = "", machine: str = "pc-q35-10.1", attributes: str = "type='kvm'"
) -> bytes:
    """A domain called vm, indented as libvirt does where it matters."""
    return (
        f"<domain {attributes}>\n  <name>vm</name>\n  <memory>65536</memory>\n{top}"
        f"  <os><type arch='x86_64' machine='{machine}'>hvm</type></os>\n"
        f"  <devices>\n    {devices}\n  </devices>\n</domain>\n"
    ).encode()


def tree(data: bytes) -> etree._Element:
    return etree.fromstring(data)


def devices_of(data: bytes) -> list[str]:
    return [str(element.tag) for element in tree(data).iterfind("devices/*")]


def said(notes: tuple[str, ...]) -> str:
    return "\n".join(notes)


def served(data: bytes) -> list[tuple[int, str, str]]:
    return [
        (port.nr, port.name, port.chardev.kind)
        for controller in domain_xml.parse(data).controllers
        for port in controller.ports
    ]


def as_libvirt_writes_it(data: bytes) -> bytes:
    """Namespaces at the root, no comments, other quotes and spaces, another order."""
    root = tree(data)
    etree.cleanup_namespaces(root, top_nsmap={"qemu": "http://libvirt.org/schemas/domain/qemu/1.0"})
    etree.strip_tags(root, etree.Comment)
    memory = root.find("memory")
    assert memory is not None
    root.append(memory)
    etree.indent(root, " " * 4)
    return etree.tostring(root).replace(b"'", b"&apos;")


# --- converting


@pytest.mark.parametrize("file", ["desktop.xml", "spice-agent.xml"])
def test_an_example_and_back(file: str) -> None:
    before = (EXAMPLES / file).read_bytes()
    after = convert(before).data
    assert after.count(b"<!--") == before.count(b"<!--"), "comments stay"
    expected = {p[1:] for p in served(before)} - {("org.qemu.guest_agent.0", "socket")}
    assert {p[1:] for p in served(after)} == expected
    assert revert(after).data == before


def test_two_controllers_have_two_sockets_and_two_devices() -> None:
    before = (EXAMPLES / "two-controllers.xml").read_bytes()
    after = convert(before, directory="/run/x").data
    topology = domain_xml.parse(after)
    assert len(topology.controllers) == len(topology.sockets) == 2
    arguments = re.findall(r"addr&quot;:&quot;(0x..?)&quot;.*?&quot;(/run/x/[^&]*)", after.decode())
    assert [path for _, path in arguments] == list(topology.sockets)
    assert len({slot for slot, _ in arguments}) == 2
    assert revert(after).data == before


def test_the_guest_agent_stays_with_its_controller() -> None:
    before = domain(CONTROLLER + GUEST_AGENT + DATA)
    result = convert(before)
    assert devices_of(result.data) == ["controller", "channel"]
    assert b"/run/d.sock" in etree.tostring(tree(result.data).find(f"metadata/{OURS}"))
    assert served(result.data) == [(2, "org.example.data", "socket")]
    assert "org.qemu.guest_agent.0> in line 6 stays with libvirt" in said(result.notes)
    assert "org.example.data: vring listens at /run/d.sock" in result.notes


def test_a_controller_that_nothing_stays_on_goes() -> None:
    result = convert(domain(CONTROLLER + DATA))
    assert devices_of(result.data) == []


def test_sockets_are_where_the_domain_says() -> None:
    data = convert(domain("<channel type='unix'><target type='virtio' name='a'/></channel>")).data
    topology = domain_xml.parse(data)
    assert topology.sockets == ("/run/vring/vm/device.sock",)
    (port,) = topology.controllers[0].ports
    assert getattr(port.chardev.options, "path", "") == "/run/vring/vm/vm.a"


def test_a_path_of_libvirts_own_is_dropped() -> None:
    path = "/var/lib/libvirt/qemu/channel/target/domain-1-vm/a"
    channel = (
        f"<channel type='unix'><source mode='bind' path='{path}'/>"
        "<target type='virtio' name='a'/></channel>"
    )
    before = domain(channel)
    result = convert(before)
    assert "a: vring listens at /run/vring/vm/vm.a" in result.notes
    assert path.encode() not in result.data
    assert revert(result.data).data == before


# --- SPICE


def test_the_agent_stays_with_a_spice_display() -> None:
    result = convert(domain(SPICE + SPICEVMC + DATA))
    assert "channel" in devices_of(result.data)
    assert "graphics" in devices_of(result.data)
    assert "it goes with the domain's SPICE display" in said(result.notes)
    assert served(result.data) == [(2, "org.example.data", "socket")]
    assert domain_xml.parse(result.data).spice is None


def test_spice_moves_the_server_too() -> None:
    before = domain(SPICE + SPICEVMC)
    result = convert(before, spice=True)
    assert devices_of(result.data) == []
    topology = domain_xml.parse(result.data)
    assert topology.spice is not None
    assert topology.spice.options.autoport
    assert revert(result.data).data == before


def test_without_a_display_the_agent_moves() -> None:
    assert served(convert(domain(SPICEVMC)).data) == [(1, "com.redhat.spice.0", "spicevmc")]


@pytest.mark.parametrize(
    ("devices", "why"),
    [
        (SPICEVMC, "there is no <graphics type='spice'> for --spice to move"),
        (SPICE + SPICEVMC + "<redirdev bus='usb' type='spicevmc'/>", "<redirdev>: it needs"),
        (SPICE + SPICEVMC + "<audio id='1' type='spice'/>", "<audio>: it needs"),
    ],
)
def test_spice_that_cannot_move(devices: str, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        convert(domain(devices), spice=True)


# --- the slot


def slot(data: bytes) -> str:
    (bus,) = re.findall(
        r"bus&quot;:&quot;([^&]*)&quot;,&quot;addr&quot;:&quot;([^&]*)", data.decode()
    )
    return ":".join(bus)


def pci(number: int) -> str:
    return (
        f"<disk type='file'><target dev='vda' bus='virtio'/>"
        f"<address type='pci' bus='0' slot='{number}' function='0'/></disk>"
    )


@pytest.mark.parametrize(
    ("devices", "top", "machine", "expected"),
    [
        ("", "", "pc-q35-10.1", "pcie.0:0x1c"),
        (pci(0x1C), "", "pc-q35-10.1", "pcie.0:0x19"),
        ("", "", "pc-i440fx-10.1", "pci.0:0x1f"),
        (pci(31) + pci(30), "", "pc", "pci.0:0x1d"),
    ],
)
def test_the_last_slot_that_is_free(devices: str, top: str, machine: str, expected: str) -> None:
    assert slot(convert(domain(DATA + devices, top, machine)).data) == expected


def test_slots_in_options_of_qemus_are_taken() -> None:
    options = "".join(
        f"<q:arg value='{value}'/>"
        for value in ("-device", "x,addr=1f.0", "-device", '{"driver":"x","addr":"0x1e"}')
    )
    space = "xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'"
    before = domain(DATA, f"<q:commandline {space}>{options}</q:commandline>\n", "pc")
    after = convert(before).data
    assert b"addr&quot;:&quot;0x1d" in after
    assert len(tree(after).findall("{*}commandline")) == 1
    assert revert(after).data == before


def test_no_slot_is_left() -> None:
    with pytest.raises(ConfigError, match=re.escape("pci.0 has no free slot")):
        convert(domain(DATA + "".join(pci(number) for number in range(1, 32)), "", "pc"))


# --- memory


def backing(inside: str) -> str:
    return f"  <memoryBacking>{inside}</memoryBacking>\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ["source", "access"]),
        (backing(""), ["source", "access"]),
        (backing("<hugepages/>"), ["hugepages", "access"]),
        (backing("<source type='file'/>"), ["source", "access"]),
        (backing("<source type='memfd'/><access mode='shared'/>"), ["source", "access"]),
    ],
)
def test_memory_is_shared(before: str, after: list[str]) -> None:
    original = domain(DATA, before)
    converted = convert(original).data
    found = tree(converted).find("memoryBacking")
    assert found is not None
    assert [str(element.tag) for element in found] == after
    access = found.find("access")
    assert access is not None
    assert access.get("mode") == "shared"
    # As above when it says something else since: only what was added goes.
    edited = revert(converted.replace(b">vm<", b">other<")).data
    kept = tree(edited).find("memoryBacking")
    assert (kept is None) == (before == "")
    if kept is not None:
        assert etree.tostring(kept).count(b"/>") == max(before.count("/>"), 1)


CELL = "<cpu><numa><cell id='0' cpus='0' memory='65536' memAccess='private'/></numa></cpu>"


@pytest.mark.parametrize(
    ("top", "devices", "why"),
    [
        (backing("<source type='anonymous'/>"), "", "<source>: memory of this source cannot be"),
        (backing("<access mode='private'/>"), "", "<access>: the domain does not want"),
        (CELL, "", "<cell>: memAccess='private'"),
        ("", "<memory model='dimm' access='private'/>", "<memory>: access='private'"),
        ("<launchSecurity type='sev'/>", "", "<launchSecurity>: the guest's memory is encrypted"),
    ],
)
def test_memory_that_cannot_be_shared(top: str, devices: str, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        convert(domain(DATA + devices, top))


# --- what cannot be converted


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (convert(domain(DATA)).data, "it is converted already; --revert takes that back"),
        (domain(DATA, attributes="type='kvm' id='3'"), "virsh dumpxml --inactive"),
        (domain(DATA, attributes="type='xen'"), "a domain of type xen is not QEMU's"),
        (domain(""), "there is no channel or console to move"),
        (domain(GUEST_AGENT), "to move (<channel org.qemu.guest_agent.0> in line 6 stays"),
        (domain(DATA).replace(b">vm<", b">..<"), "it cannot name a directory"),
        (domain(DATA).replace(b"<name>vm</name>", b""), "<name> is missing"),
        (domain(DATA, machine="isapc"), "its machine has no PCI bus"),
        (b"<network/>", "the root of a domain is <domain>"),
        (b"<!DOCTYPE x><domain/>", "a DOCTYPE is not accepted"),
        (b"<domain", "not XML"),
    ],
)
def test_what_cannot_be_converted(data: bytes, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        convert(data)


def test_what_vring_cannot_serve_stays() -> None:
    other = "<channel type='qemu-vdagent'><target type='virtio' name='x'/></channel>"
    result = convert(domain(DATA + other))
    assert devices_of(result.data) == ["channel"]
    assert "stays with libvirt: a source of type qemu-vdagent is not served" in said(result.notes)


@pytest.mark.parametrize(
    ("inside", "why"),
    [
        (f"<v:domain xmlns:v='{OURS[1:-8]}0'/>", "another version of vring"),
        (f"<v:domain xmlns:v='{OURS[1:-7]}'/>", "it names no socket"),
        (f"<v:domain xmlns:v='{OURS[1:-7]}'/>" * 2, "<v:domain>: a domain is converted once"),
    ],
)
def test_metadata_that_is_not_as_it_was_left(inside: str, why: str) -> None:
    data = domain(DATA, f"<metadata>{inside}</metadata>")
    for reader in (convert, revert, domain_xml.parse):
        with pytest.raises(ConfigError, match=re.escape(why)):
            reader(data)


# --- and back


def test_libvirts_way_to_write_it_down_changes_nothing() -> None:
    before = domain(CONTROLLER + GUEST_AGENT + DATA)
    result = revert(as_libvirt_writes_it(convert(before).data))
    assert result.data == before
    assert result.notes == ("the domain is what it was, to the letter",)


def test_edited_since() -> None:
    """What was added goes, what moved comes back, and the new disk stays."""
    before = domain(CONTROLLER + DATA, "  <metadata><x xmlns='urn:x'/></metadata>\n")
    after = convert(before).data.replace(b"<devices>\n  </devices>", b"<devices/>")
    root = tree(after)
    found = root.find("devices")
    assert found is not None
    found.append(etree.fromstring(pci(0x0A)))
    result = revert(etree.tostring(root))
    assert result.notes[0].startswith("it was edited since")
    assert devices_of(result.data) == ["disk", "controller", "channel"]
    assert b"vring" not in result.data
    assert b"memoryBacking" not in result.data
    assert b"commandline" not in result.data
    assert b"urn:x" in result.data
    assert served(result.data) == served(before)
    again = convert(result.data).data
    assert revert(again).data == result.data


def test_a_place_that_was_given_away() -> None:
    root = tree(convert(domain(CONTROLLER + GUEST_AGENT + DATA)).data)
    gone = tree(convert(domain(CONTROLLER + DATA)).data)
    for data, other in (
        (root, DATA.replace("org.example.data", "o").replace("d.sock", "o.sock")),
        (gone, pci(5)),
    ):
        found = data.find("devices")
        assert found is not None
        found.append(etree.fromstring(other))
        result = revert(etree.tostring(data))
        assert "its address is another device's now; libvirt chooses one" in said(result.notes)
        domain_xml.parse(result.data)  # nothing collides


def test_what_moved_may_be_edited() -> None:
    after = convert(domain(DATA)).data.replace(b"/run/d.sock", b"/run/e.sock")
    assert b"/run/e.sock" in revert(after).data


@pytest.mark.parametrize("change", [(b'sha256="', b'sha256="0'), (b'">eN', b'">AA')])
def test_a_damaged_copy(change: tuple[bytes, bytes]) -> None:
    result = revert(convert(domain(DATA)).data.replace(*change))
    assert "the copy of the domain from before is damaged" in said(result.notes)
    assert served(result.data) == served(domain(DATA))


def test_a_copy_that_never_ends_is_bounded() -> None:
    """A record of a few kilobytes that unpacks to more than a domain can have."""
    bomb = base64.b64encode(zlib.compress(b"\0" * (64 << 20)))
    data = re.sub(rb">eN[^<]*<", b">" + bomb + b"<", convert(domain(DATA)).data)
    assert "damaged" in said(revert(data).notes)


@pytest.mark.parametrize("data", [domain(DATA), (EXAMPLES / "desktop.xml").read_bytes()])
def test_what_was_not_converted(data: bytes) -> None:
    with pytest.raises(ConfigError, match="it was not converted: there is nothing to revert"):
        revert(data)
