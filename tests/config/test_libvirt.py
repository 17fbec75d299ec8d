"""Domains as people write them, and what libvirt 11.3 with QEMU 10.0 made of each.

The addresses are those of ``virsh dumpxml`` after ``virsh define``.
"""

from __future__ import annotations

import pytest

from vring_serial.config.domain_xml import parse
from vring_serial.config.topology import Topology
from vring_serial.errors import ConfigError

AGENT = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
SPICE = "<channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>"
VNC = "<graphics type='vnc'/>"
NO_USB = "<controller type='usb' model='none'/>"
OURS = "<controller type='virtio-serial'/>"
LEGACY = "<controller type='virtio-serial' model='virtio-transitional'/>"
VIRTIO_SCSI = "<controller type='scsi' model='virtio-scsi'/>"
NET = "<interface type='user'><model type='virtio'/></interface>"


def topology(devices: str, machine: str = "pc", arch: str = "x86_64") -> Topology:
    """All devices in line 2 of a domain called test."""
    text = (
        f"<domain type='kvm'><name>test</name><os><type arch='{arch}' machine='{machine}'>hvm"
        f"</type></os>\n<devices>{devices}</devices></domain>"
    )
    return parse(text.encode(), channel_directory="/run/vring")


def addresses(domain: Topology) -> dict[int, str]:
    """By index, without the PCI domain; those without an address are left out."""
    return {c.index: str(c.address)[5:] for c in domain.controllers if c.address is not None}


def disk(bus: str = "virtio", name: str = "vda", inside: str = "") -> str:
    return (
        f"<disk type='file' device='disk'><source file='/d'/><target dev='{name}' bus='{bus}'/>"
        f"{inside}</disk>"
    )


def pci(bus: int, slot: int, function: int = 0) -> str:
    return f"<address type='pci' bus='{bus}' slot='{slot}' function='{function}'/>"


def sound(*models: str) -> str:
    return "".join(f"<sound model='{model}'/>" for model in models)


def ports(*models: str) -> str:
    models = ("pcie-root", *models)
    return "".join(
        f"<controller type='pci' index='{index}' model='{model}'/>"
        for index, model in enumerate(models)
    )


ICH9_USB = "".join(
    f"<controller type='usb' index='0' model='ich9-{model}'/>"
    for model in ("ehci1", "uhci1", "uhci2", "uhci3")
)


@pytest.mark.parametrize(
    ("devices", "address"),
    [
        pytest.param(AGENT, "00:02.0", id="no display"),
        pytest.param(AGENT + VNC, "00:03.0", id="graphics imply a display"),
        pytest.param(AGENT + "<video><model type='vga'/></video>", "00:03.0", id="a display alone"),
        pytest.param(AGENT + "<video><model type='none'/></video>", "00:02.0", id="video none"),
        pytest.param(AGENT + "<video><model type='ramfb'/></video>", "00:02.0", id="ramfb"),
        pytest.param(
            AGENT + f"<video><model type='vga'/>{pci(0, 5)}</video>",
            "00:02.0",
            id="a display with an address",
        ),
        pytest.param(
            AGENT + "<video><model type='vga'/></video><video><model type='virtio'/></video>",
            "00:03.0",
            id="two displays",
        ),
        pytest.param(
            AGENT + VNC + disk(inside=pci(0, 2)), "00:04.0", id="the display's slot is taken"
        ),
        pytest.param(
            AGENT + disk(), "00:02.0", id="implied USB is in the chipset, disks are later"
        ),
        pytest.param(
            AGENT + disk(inside=pci(0, 2, 1)), "00:03.0", id="a slot in use is not shared"
        ),
        pytest.param(ICH9_USB + AGENT, "00:03.0", id="all functions of ich9 in one slot"),
        pytest.param(
            "<controller type='usb' index='0' model='piix3-uhci'/>"
            "<controller type='usb' index='1' model='piix3-uhci'/>" + AGENT,
            "00:03.0",
            id="a second piix3",
        ),
        pytest.param(
            "<controller type='ide' index='0'/><controller type='fdc' index='0'/>"
            "<controller type='sata' index='0'/><controller type='scsi' index='0'/>" + AGENT,
            "00:04.0",
            id="sata and scsi have slots",
        ),
        pytest.param(AGENT + disk("scsi", "sda"), "00:03.0", id="a disk implies its controller"),
        pytest.param(OURS + AGENT + disk("scsi", "sda"), "00:02.0", id="which is later if ours is"),
        pytest.param(AGENT + disk("sata", "sda"), "00:03.0", id="so does one on SATA"),
        pytest.param(AGENT + disk("ide", "hda") + disk("usb", "sdb"), "00:02.0", id="not on IDE"),
        pytest.param(
            AGENT + "<hostdev mode='subsystem' type='scsi'><source><adapter name='scsi_host0'/>"
            "<address bus='0' target='0' unit='0'/></source></hostdev>",
            "00:03.0",
            id="so does the host's SCSI device",
        ),
        pytest.param(
            AGENT + sound("sb16", "pcspk", "usb", "ich6"), "00:03.0", id="sound cards off PCI"
        ),
        pytest.param(AGENT + sound("ac97", "es1370"), "00:04.0", id="sound cards on PCI"),
        pytest.param(
            AGENT + "<interface type='user'><model type='usb-net'/></interface>"
            "<interface type='user'/><interface type='hostdev'/>",
            "00:03.0",
            id="interfaces on PCI",
        ),
        pytest.param(
            AGENT + "<filesystem><source dir='/tmp'/><target dir='x'/></filesystem>",
            "00:03.0",
            id="a file system",
        ),
        pytest.param(
            "<controller type='pci' index='1' model='pci-bridge'/>" + AGENT,
            "00:03.0",
            id="a bridge has a slot",
        ),
        pytest.param(
            AGENT + "".join(disk(inside=pci(0, slot)) for slot in range(2, 31)),
            "01:01.0",
            id="a bridge takes the last slot",
        ),
    ],
)
def test_addresses_on_pc(devices: str, address: str) -> None:
    assert addresses(topology(devices)) == {0: address}
    assert addresses(topology(devices, "pc-i440fx-9.0")) == {0: address}


def test_no_address_where_a_bridge_has_no_slot() -> None:
    """libvirt refuses such a domain; what the emulator does is its affair."""
    disks = "".join(disk(inside=pci(0, slot)) for slot in range(2, 32))
    assert addresses(topology(AGENT + disks)) == {}


@pytest.mark.parametrize(
    ("devices", "address"),
    [
        pytest.param(AGENT, "02:00.0", id="implied USB comes first"),
        pytest.param(AGENT + VNC, "02:00.0", id="the display is on bus 0"),
        pytest.param(
            OURS + "<controller type='usb' model='qemu-xhci'/>" + AGENT,
            "01:00.0",
            id="USB comes later in the document",
        ),
        pytest.param(ICH9_USB + AGENT, "01:00.0", id="ich9 USB has its slot in the chipset"),
        pytest.param(NO_USB + AGENT + sound("ich9"), "01:00.0", id="so has ich9 sound"),
        pytest.param(NO_USB + AGENT + sound("ich9", "ich9"), "03:00.0", id="but only one"),
        pytest.param(NO_USB + AGENT + sound("ich6"), "03:00.0", id="sound on a new bridge"),
        pytest.param(
            NO_USB + AGENT + NET + sound("ich6"), "04:00.0", id="its bridge gets bus 1 of the net"
        ),
        pytest.param(NO_USB + OURS + VIRTIO_SCSI + AGENT, "01:00.0", id="scsi after ours"),
        pytest.param(NO_USB + VIRTIO_SCSI + OURS + AGENT, "02:00.0", id="scsi before ours"),
        pytest.param(NO_USB + AGENT + disk("scsi", "sda"), "03:00.0", id="implied scsi"),
        pytest.param(
            NO_USB + "<controller type='sata' index='1'/>" + AGENT, "03:00.0", id="a second SATA"
        ),
        pytest.param(
            NO_USB + AGENT + "<interface type='user'><model type='e1000'/></interface>",
            "03:00.0",
            id="e1000",
        ),
        pytest.param(
            NO_USB + AGENT + "<interface type='user'><model type='e1000e'/></interface>",
            "02:00.0",
            id="e1000e",
        ),
        pytest.param(NO_USB + AGENT + "<interface type='user'/>", "03:00.0", id="rtl8139"),
        pytest.param(NO_USB + LEGACY + AGENT, "02:01.0", id="transitional"),
        pytest.param(
            NO_USB + ports("pcie-root-port", "dmi-to-pci-bridge", "pci-bridge") + AGENT + NET,
            "04:00.0",
            id="ports and bridges",
        ),
        pytest.param(
            NO_USB
            + ports("pcie-root-port", "dmi-to-pci-bridge", "pci-bridge")
            + LEGACY
            + AGENT
            + NET,
            "03:01.0",
            id="transitional on a bridge that is there",
        ),
        pytest.param(
            NO_USB + ports("dmi-to-pci-bridge") + LEGACY + AGENT + NET,
            "03:01.0",
            id="transitional on a bridge behind dmi",
        ),
        pytest.param(
            NO_USB + ports("pcie-root-port", "pcie-to-pci-bridge") + LEGACY + AGENT + NET,
            "02:01.0",
            id="transitional on a pcie-to-pci-bridge",
        ),
        pytest.param(
            NO_USB
            + ports("pcie-root-port", "pcie-switch-upstream-port", "pcie-switch-downstream-port")
            + AGENT,
            "03:00.0",
            id="a switch",
        ),
        pytest.param(
            NO_USB + "<controller type='pci' index='3' model='pcie-root-port'/>" + AGENT + NET * 2,
            "03:00.0",
            id="ports that the document leaves out",
        ),
        pytest.param(NO_USB + AGENT + disk(inside=pci(1, 0)), "02:00.0", id="bus 1 is taken"),
    ],
)
def test_addresses_on_q35(devices: str, address: str) -> None:
    assert addresses(topology(devices, "q35")) == {0: address}
    assert addresses(topology(devices, "pc-q35-10.0")) == {0: address}


@pytest.mark.parametrize(
    ("machine", "arch", "devices", "address"),
    [
        ("pseries", "ppc64", NO_USB + AGENT, "00:01.0"),
        ("pseries", "ppc64", AGENT, "00:02.0"),
        ("pseries", "ppc64", AGENT + VNC, "00:02.0"),
        ("pseries-10.0", "ppc64le", NO_USB + AGENT + NET + disk(), "00:02.0"),
        ("pseries", "ppc64", NO_USB + "<controller type='scsi'/>" + AGENT, "00:01.0"),
        (
            "pseries",
            "ppc64",
            NO_USB + AGENT + sound("ich6") + "<interface type='user'/>",
            "00:03.0",
        ),
        ("virt", "aarch64", AGENT, "01:00.0"),
        ("virt-10.0", "armv7l", AGENT, "01:00.0"),
        ("virt", "aarch64", "<controller type='usb' model='qemu-xhci'/>" + AGENT, "02:00.0"),
        ("virt", "aarch64", AGENT + NET, "02:00.0"),
        ("versatilepb", "armv7l", AGENT, "00:02.0"),
    ],
)
def test_addresses_on_other_machines(machine: str, arch: str, devices: str, address: str) -> None:
    assert addresses(topology(devices, machine, arch)) == {0: address}


MMIO = "<address type='virtio-mmio'/>"


@pytest.mark.parametrize(
    ("machine", "arch", "devices"),
    [
        pytest.param("vexpress-a9", "armv7l", AGENT, id="no PCI at all"),
        ("raspi2b", "armv7l", AGENT),
        ("realview-eb", "armv7l", AGENT),
        ("isapc", "x86_64", AGENT),
        ("microvm", "x86_64", AGENT),
        ("s390-ccw-virtio", "s390x", AGENT),
        pytest.param(
            "virt-4.0",
            "aarch64",
            AGENT + NET.replace("</interface>", f"{MMIO}</interface>"),
            id="everything says virtio-mmio",
        ),
        pytest.param("virt", "aarch64", AGENT + disk(inside=MMIO), id="one disk says virtio-mmio"),
    ],
)
def test_controllers_off_pci(machine: str, arch: str, devices: str) -> None:
    assert addresses(topology(devices, machine, arch)) == {}


def test_a_controller_that_says_pci_is_on_it_beside_virtio_mmio() -> None:
    ours = "<controller type='virtio-serial'><address type='pci'/></controller>"
    domain = topology(ours + AGENT + disk(inside=MMIO), "virt", "aarch64")
    assert addresses(domain) == {0: "01:00.0"}


def controller(index: int | None, more: str = "") -> str:
    given = "" if index is None else f" index='{index}'"
    return f"<controller type='virtio-serial'{given}{more}/>"


@pytest.mark.parametrize(
    ("devices", "given"),
    [
        (controller(1) + controller(0) + AGENT, {0: "00:02.0", 1: "00:03.0"}),
        (controller(2) + controller(None) + AGENT, {2: "00:02.0", 0: "00:03.0"}),
        (controller(1) + VIRTIO_SCSI + controller(0) + AGENT, {0: "00:02.0", 1: "00:03.0"}),
        (controller(0, " ports='1'") + AGENT, {0: "00:02.0", 1: "00:03.0"}),
        (
            VIRTIO_SCSI + AGENT + "<channel type='pty'><target type='virtio' name='b'/>"
            "<address type='virtio-serial' controller='2'/></channel>",
            {0: "00:03.0", 2: "00:04.0"},
        ),
        (
            "<channel type='pty'><target type='virtio' name='a'/>"
            "<address type='virtio-serial' controller='3' bus='0' port='4'/></channel>",
            {3: "00:02.0"},
        ),
    ],
)
def test_addresses_of_several_controllers(devices: str, given: dict[int, str]) -> None:
    assert addresses(topology(devices)) == given


def test_the_chipset_s_addresses_are_its_own() -> None:
    ours = f"<controller type='virtio-serial'>{pci(0, 0x1F)}</controller>"
    with pytest.raises(ConfigError, match=r"0000:00:1f\.0 is taken already \(the chipset\)"):
        topology(ours, "q35")
    assert addresses(topology(ours)) == {0: "00:1f.0"}


def test_more_devices_than_any_machine_has_slots_for_take_little_time() -> None:
    assert addresses(topology(sound("ac97") * 50_000 + AGENT, "q35")) == {}


def test_more_controllers_than_there_may_be() -> None:
    with pytest.raises(ConfigError, match="more than 256 controllers"):
        topology(controller(None) * 50_000)


# --- what libvirt refuses, and what it takes


def unix(source: str, name: str = "a") -> str:
    return f"<channel type='unix'>{source}<target type='virtio' name='{name}'/></channel>"


def connecting(reconnect: str, mode: str = "connect") -> str:
    return unix(f"<source mode='{mode}' path='/tmp/x'><reconnect {reconnect}/></source>")


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (connecting("enabled='yes' timeout='0'"), "<reconnect>: timeout cannot be 0"),
        (connecting("enabled='yes'"), "<reconnect>: timeout is missing"),
        (connecting("enabled='maybe' timeout='4'"), "enabled: 'maybe' is neither"),
        (connecting("enabled='yes' timeout='3'", "bind"), "goes with mode='connect' only"),
        (connecting("enabled='no' timeout='3'", "bind"), "goes with mode='connect' only"),
        (
            connecting("enabled='yes' timeout='3'", "bind")
            .replace("type='unix'", "type='tcp'")
            .replace("path='/tmp/x'", "host='127.0.0.1' service='5'"),
            "goes with mode='connect' only",
        ),
        (unix("<source mode='listen' path='/tmp/a'/>"), "there is no mode 'listen'"),
        (unix("<source mode='' path='/tmp/a'/>"), "there is no mode ''"),
        (controller(0, " model='foo'"), "there is no model 'foo'"),
        (controller(0, " model=''"), "there is no model ''"),
        (controller(0, " vectors='-1'"), "vectors: '-1' is not a number"),
        (
            "<controller type='virtio-serial'><driver packed='maybe'/></controller>",
            "packed: 'maybe' is neither",
        ),
        (
            controller(0, " ports='4'") + "<channel type='pty'><target type='virtio' name='a'/>"
            "<address type='virtio-serial' controller='0' bus='0' port='4'/></channel>",
            "port number 4 is not below 4",
        ),
        (
            "".join(
                f"<channel type='pty'><target type='virtio' name='{name}'/>"
                f"<address type='virtio-serial' controller='0' bus='{bus}' port='3'/></channel>"
                for name, bus in (("a", 2), ("b", 0))
            ),
            "port number 3 of controller 0 is taken already",
        ),
        (
            "<channel type='spiceport'><source channel='org.spice-space.webdav.0'/>"
            "<target type='virtio' name='org.spice-space.webdav.0'/></channel>" + VNC,
            "spiceport needs a SPICE server",
        ),
    ],
)
def test_what_libvirt_refuses(devices: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        topology(devices)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (
            "<channel type='qemu-vdagent'><target type='virtio' name='com.redhat.spice.0'/>"
            "</channel>" + VNC,
            "qemu-vdagent is not served: it is QEMU's own agent end",
        ),
        (
            "<channel type='tcp'><source mode='bind' host='127.0.0.1' service='2445'/>"
            "<protocol type='telnet'/><target type='virtio' name='a'/></channel>",
            "telnet is not served",
        ),
        (
            "<channel type='tcp'><source mode='bind' host='127.0.0.1' service='telnet'/>"
            "<target type='virtio' name='a'/></channel>",
            "service: 'telnet' is not a number",
        ),
    ],
)
def test_what_libvirt_takes_and_we_do_not_serve(devices: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        topology(devices)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "reconnect", ["enabled='no'", "enabled='no' timeout='0'", "timeout='4'", ""]
)
def test_reconnect_that_is_not_enabled(reconnect: str) -> None:
    (port,) = topology(connecting(reconnect)).controllers[0].ports
    assert port.chardev.options.reconnect_delay == 0  # type: ignore[attr-defined]


ADDRESSED = "<channel type='pty'><target type='virtio' name='a'/><address type={}/></channel>"
CONSOLE = "<console type='pty'><target type='virtio'/>{}</console>"


@pytest.mark.parametrize(
    ("devices", "nr"),
    [
        (ADDRESSED.format("'virtio-serial' controller='0' bus='2'"), 1),
        (ADDRESSED.format("'virtio-serial' controller='0' bus='2' port='3'"), 3),
        (ADDRESSED.format("'ccw' cssid='0xfe' ssid='0' devno='1'"), 1),
        (CONSOLE.format("<address type='ccw' cssid='0xfe' ssid='0' devno='0x0001'/>"), 0),
        ("<console type='pty'><source path='/dev/pts/5'/><target type='virtio' port='0'/>"
         "</console>", 0),
        ("<console type='pty'><target type='serial' port='0'/></console>"
         "<console type='pty'><target type='virtio' port='1'/></console>", 0),
        (unix("<source mode='bind' path='/tmp/a'/>").replace(
            "name='a'", "address='virtio-serial' port='2'"), 1),
        ("<emulator>/q</emulator></devices><devices>" + AGENT, 1),
        (unix("<source mode='' path=''/>", "org.qemu.guest_agent.0"), 1),
        (unix("<source mode='bind' path='/tmp/a'/>") .replace(
            "</channel>", "<alias name='ua-mine'/><acpi index='1'/></channel>"), 1),
        ("<channel type='tcp'><source mode='bind' host='127.0.0.1' service='2445' tls='no'/>"
         "<protocol type='raw'/><target type='virtio' name='a'/></channel>", 1),
        ("<channel type='pty'><log file='/l' append='off'/><target type='virtio' name='a'/>"
         "</channel>", 1),
        (SPICE + VNC + "<graphics type='spice' autoport='yes'/>", 1),
        (SPICE + "<graphics type='spice' port='-1' tlsPort='-1'/>", 1),
        (AGENT + "<graphics type='spice'><listen type='network' network='default'/></graphics>", 1),
        (SPICE + "<graphics type='spice' autoport='yes'><listen type='network' "
         "network='default' address='192.168.122.1'/></graphics>", 1),
        (AGENT + "<graphics type='spice' port='5900' passwd='x' "
         "passwdValidTo='2030-01-01T00:00:00'/>", 1),
    ],
)  # fmt: skip
def test_the_number_of_a_port_that_libvirt_takes(devices: str, nr: int) -> None:
    (port,) = topology(devices).controllers[0].ports
    assert port.nr == nr


def test_more_ports_than_a_controller_has() -> None:
    channels = "".join(
        f"<channel type='pty'><target type='virtio' name='c{i}'/></channel>" for i in range(33)
    )
    domain = topology(channels)
    assert [[port.nr for port in c.ports] for c in domain.controllers] == [
        list(range(1, 31)),
        [1, 2, 3],
    ]
    assert addresses(domain) == {0: "00:02.0", 1: "00:03.0"}


# --- sockets of channels


@pytest.mark.parametrize(
    ("path", "listens"),
    [
        ("/var/lib/libvirt/qemu/channel/target/test.org.qemu.guest_agent.0", True),
        ("/var/lib/libvirt/qemu/channel/target/domain-3-test/org.qemu.guest_agent.0", True),
        ("/run/libvirt/qemu/channel/3-test/org.qemu.guest_agent.0", True),
        ("/home/u/.config/libvirt/qemu/lib/channel/target/domain-3-test/a", True),
        ("/run/user/1000/libvirt/qemu/run/channel/3-test/a", True),
        ("/tmp/x", False),
        ("/var/lib/libvirt/qemu/channel/a/b/c", False),
    ],
)
def test_a_path_of_libvirts_own_making_without_a_mode(path: str, listens: bool) -> None:
    (port,) = topology(unix(f"<source path='{path}'/>")).controllers[0].ports
    assert port.chardev.options.path == path  # type: ignore[attr-defined]
    assert port.chardev.options.server is listens  # type: ignore[attr-defined]
    (port,) = topology(unix(f"<source mode='connect' path='{path}'/>")).controllers[0].ports
    assert port.chardev.options.server is False  # type: ignore[attr-defined]


def test_a_path_that_would_be_too_long_has_a_short_name_in_it() -> None:
    name = "a-virtual-machine-with-a-very-long-name-" + "x" * 60
    text = f"<domain><name>{name}</name><devices>{AGENT}</devices></domain>"
    (port,) = parse(text.encode(), channel_directory="/run/vring").controllers[0].ports
    path = "/run/vring/a-virtual-machine-wi.org.qemu.guest_agent.0"
    assert port.chardev.options.path == path  # type: ignore[attr-defined]


def test_a_path_that_is_too_long_all_the_same() -> None:
    with pytest.raises(ConfigError, match="a unix socket's has 1 to 107"):
        parse(f"<domain><devices>{AGENT}</devices></domain>".encode(), channel_directory="x" * 90)


# --- what is asked of the controller


@pytest.mark.parametrize(
    ("element", "transitional", "packed", "vectors"),
    [
        ("<controller type='virtio-serial'/>", None, None, None),
        ("<controller type='virtio-serial' model='virtio'/>", None, None, None),
        (LEGACY, True, None, None),
        ("<controller type='virtio-serial' model='virtio-non-transitional'/>", False, None, None),
        ("<controller type='virtio-serial' vectors='0'/>", None, None, 0),
        (
            "<controller type='virtio-serial' vectors='4'><driver packed='on'/></controller>",
            None,
            True,
            4,
        ),
        (
            "<controller type='virtio-serial'><driver packed='off' iommu='off'/></controller>",
            None,
            False,
            None,
        ),
    ],
)
def test_what_a_controller_is_asked_to_be(
    element: str, transitional: bool | None, packed: bool | None, vectors: int | None
) -> None:
    domain = topology(element)
    (config,) = domain.controllers
    assert (config.transitional, config.packed, config.vectors) == (transitional, packed, vectors)
    assert domain.warnings == ()


def test_what_is_not_served_is_named_in_one_line() -> None:
    domain = topology(
        "<controller type='virtio-serial'>\n"
        "<driver iommu='on' ats='on' packed='on' page_per_vq='on'/></controller>"
        "<channel type='unix'>\n<source mode='bind' path='/tmp/a'>"
        "<seclabel model='dac' relabel='no'/></source>\n<log file='/l'/>"
        "<target type='virtio' name='a'/></channel>"
    )
    assert domain.warnings == (
        "domain: not served, without effect: <driver iommu=> in line 3, <driver ats=> in line 3, "
        "<driver page_per_vq=> in line 3, <seclabel> in line 4",
    )
