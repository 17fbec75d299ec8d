from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.examples import EXAMPLES
from vring_serial.chardev import LogOptions
from vring_serial.chardev.file import FileOptions
from vring_serial.chardev.pipe import PipeOptions
from vring_serial.chardev.serial import SerialOptions
from vring_serial.chardev.socket import SocketOptions
from vring_serial.chardev.udp import UdpOptions
from vring_serial.config import domain_xml
from vring_serial.config.domain_xml import load, parse
from vring_serial.config.topology import PciAddress, Topology
from vring_serial.errors import ConfigError, ResourceError

VIRTIO = "<target type='virtio'/>"


def domain(devices: str, before: str = "") -> Topology:
    """The topology of a domain with these devices, each in a line of its own from line 2 on."""
    return parse(f"<domain>{before}<devices>\n{devices}\n</devices></domain>".encode())


def fails(devices: str, before: str = "") -> str:
    """The message with which a domain with these devices is refused: one line."""
    with pytest.raises(ConfigError) as caught:
        domain(devices, before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def numbers(topology: Topology) -> dict[str, tuple[int, int]]:
    """Controller and number of every port, by the id of its host end."""
    return {
        port.chardev.id: (controller.index, port.nr)
        for controller in topology.controllers
        for port in controller.ports
    }


# --- the examples


def test_spice_agent() -> None:
    (controller,) = load(str(EXAMPLES / "spice-agent.xml")).controllers
    assert (controller.index, controller.max_ports) == (0, 31)
    assert str(controller.address) == "0000:00:05.0"
    (port,) = controller.ports
    assert (port.nr, port.name, port.console) == (1, "com.redhat.spice.0", False)
    assert port.chardev.kind == "spicevmc"


def test_desktop() -> None:
    topology = load(str(EXAMPLES / "desktop.xml"), channel_directory="/run/vring")
    assert topology.name == "desktop"
    (warning,) = topology.warnings
    assert warning.endswith(
        "desktop.xml: not virtio-serial, left to the emulator: "
        "<serial> in line 20, <console> with target serial in line 23"
    )
    (controller,) = topology.controllers
    assert controller.max_ports == 16
    assert str(controller.address) == "0000:02:00.0"  # bus 1 is the network interface's
    console, spice, guest_agent = controller.ports
    assert (console.nr, console.console, console.chardev.kind) == (0, True, "pty")
    assert (spice.nr, spice.name) == (1, "com.redhat.spice.0")
    assert (guest_agent.nr, guest_agent.name) == (2, "org.qemu.guest_agent.0")
    assert guest_agent.chardev.options == SocketOptions(
        path="/run/vring/desktop.org.qemu.guest_agent.0", server=True, wait=False
    )


def test_two_controllers() -> None:
    topology = load(str(EXAMPLES / "two-controllers.xml"))
    assert [str(c.address) for c in topology.controllers] == ["0000:00:05.0", "0000:00:06.0"]
    assert numbers(topology) == {"channel0": (0, 1), "channel1": (1, 1), "channel2": (1, 2)}


# --- controllers


def test_a_missing_controller_is_added() -> None:
    (controller,) = domain(f"<channel type='null'>{VIRTIO}</channel>").controllers
    assert (controller.index, controller.max_ports) == (0, 31)
    assert controller.address == PciAddress(slot=2)


def test_the_controller_that_a_channel_names_is_added() -> None:
    topology = domain(
        f"<channel type='null'>{VIRTIO}<address type='virtio-serial' controller='2'/></channel>"
    )
    assert numbers(topology) == {"channel0": (2, 1)}


def test_controllers_without_index_get_the_free_ones() -> None:
    topology = domain(
        "<controller type='virtio-serial' ports='2'/>"
        "<controller type='virtio-serial' index='0' ports='3'/>"
        "<controller type='virtio-serial' ports='4'/>"
    )
    assert [(c.index, c.max_ports) for c in topology.controllers] == [(0, 3), (1, 2), (2, 4)]


def test_a_controller_alone_is_something_to_serve() -> None:
    (controller,) = domain("<controller type='virtio-serial'/>").controllers
    assert controller.ports == ()


def test_no_controller_and_no_port() -> None:
    assert fails("<controller type='usb'/>").startswith("domain: nothing to serve")


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (
            "<controller type='virtio-serial' index='1'/>\n"
            "<controller type='virtio-serial' index='1'/>",
            "domain:3: <controller>: controller 1 is there already (domain:2: <controller>)",
        ),
        (
            "<controller type='virtio-serial' ports='512'/>",
            "domain:2: <controller>: a controller has 1 to 511 ports, not 512",
        ),
        (
            "<controller type='virtio-serial' ports='0'/>",
            "domain:2: <controller>: a controller has at least one port",
        ),
        (
            "<controller type='virtio-serial' ports='many'/>",
            "domain:2: <controller>: ports: 'many' is not a number",
        ),
        (
            "<controller type='virtio-serial' index='256'/>",
            "domain:2: <controller>: controller 256 is above 255",
        ),
        (
            "<controller type='virtio-serial'>\n<address type='drive'/></controller>",
            "domain:3: <address>: there is no type 'drive'; known: ccw, pci, virtio-mmio",
        ),
        (
            "<controller type='virtio-serial'>\n<address type='pci' slot='0x20'/></controller>",
            "domain:3: <address>: PCI slot 0x20 is not below 0x20",
        ),
    ],
)
def test_bad_controller(devices: str, message: str) -> None:
    assert fails(devices) == message


# --- PCI addresses


def address(slot: str, function: str = "0", bus: str = "0") -> str:
    return f"<address type='pci' bus='{bus}' slot='{slot}' function='{function}'/>"


def test_two_controllers_at_one_address() -> None:
    text = fails(
        f"<controller type='virtio-serial' index='0'>{address('0x05')}</controller>\n"
        f"<controller type='virtio-serial' index='1'>{address('5')}</controller>"
    )
    assert text == (
        "domain:3: <controller>: PCI address 0000:00:05.0 is taken already (domain:2: <controller>)"
    )


def test_an_address_that_another_device_has() -> None:
    text = fails(
        f"<disk>{address('5')}</disk>\n<controller type='virtio-serial'>{address('5')}</controller>"
    )
    assert text.endswith("PCI address 0000:00:05.0 is taken already (domain:2: <disk>)")


def test_functions_of_one_slot_are_different_addresses() -> None:
    topology = domain(
        f"<disk>{address('5')}</disk>"
        f"<controller type='virtio-serial'>{address('5', function='1')}</controller>"
    )
    assert str(topology.controllers[0].address) == "0000:00:05.1"


def test_free_slots_are_those_that_nobody_has_or_waits_for() -> None:
    topology = domain(
        f"<interface/><sound/><disk>{address('5', function='1')}</disk>"
        "<controller type='virtio-serial' index='0'/>"
        f"<controller type='virtio-serial' index='1'>{address('7')}</controller>"
        "<controller type='virtio-serial' index='2'/>"
    )  # 0 and 1 are the chipset's, 2 and 3 go to <interface> and <sound>
    assert [c.address.slot for c in topology.controllers if c.address] == [4, 7, 6]


def test_an_address_of_zeros_is_one_that_is_left_out() -> None:
    topology = domain(f"<controller type='virtio-serial'>{address('0')}</controller>")
    assert topology.controllers[0].address == PciAddress(slot=2)


@pytest.mark.parametrize(
    ("machine", "chosen"),
    [
        ("pc-i440fx-10.0", "0000:00:02.0"),
        ("pc-q35-10.0", "0000:01:00.0"),
        ("virt-10.0", "0000:01:00.0"),
        ("s390-ccw-virtio-10.0", "None"),
        ("microvm", "None"),
    ],
)
def test_machines(machine: str, chosen: str) -> None:
    topology = domain(
        "<controller type='virtio-serial'/>", f"<os><type machine='{machine}'>hvm</type></os>"
    )
    assert str(topology.controllers[0].address) == chosen


@pytest.mark.parametrize("type_", ["ccw", "virtio-mmio"])
def test_controllers_elsewhere_than_on_pci(type_: str) -> None:
    topology = domain(f"<controller type='virtio-serial'><address type='{type_}'/></controller>")
    assert topology.controllers[0].address is None


# --- numbers


def test_numbers_as_libvirt_gives_them() -> None:
    """Given numbers first, then consoles (0 is theirs), then channels from 1 on."""
    fixed = "<address type='virtio-serial' controller='0' port='1'/>"
    zero = "<address type='virtio-serial' controller='0' port='0'/>"
    topology = domain(
        f"<channel type='null'>{VIRTIO}</channel>"
        f"<channel type='null'>{VIRTIO}{fixed}</channel>"
        f"<channel type='null'>{VIRTIO}{zero}</channel>"
        f"<console type='null'>{VIRTIO}</console>"
        f"<console type='null'>{VIRTIO}</console>"
    )
    assert {id: nr for id, (_, nr) in numbers(topology).items()} == {
        "console0": 0,
        "channel1": 1,
        "console1": 2,
        "channel0": 3,
        "channel2": 4,
    }


def test_a_full_controller_is_followed_by_another() -> None:
    channels = f"<channel type='null'>{VIRTIO}</channel>" * 3
    topology = domain(f"<controller type='virtio-serial' ports='3'/>{channels}")
    assert numbers(topology) == {"channel0": (0, 1), "channel1": (0, 2), "channel2": (1, 1)}


CHANNEL_AT = (
    "<channel type='null'><target type='virtio'/><address type='virtio-serial' {}/></channel>"
)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (
            "\n".join([CHANNEL_AT.format("port='4'")] * 2),
            "domain:3: <channel>: port number 4 of controller 0 is taken already "
            "(domain:2: <channel>)",
        ),
        (
            CHANNEL_AT.format("port='31'"),
            "domain:2: <channel>: port number 31 is not below 31, "
            "the number of ports of controller 0",
        ),
        (
            "<controller type='virtio-serial' ports='1'/>" + CHANNEL_AT.format("controller='0'"),
            "domain:2: <channel>: controller 0 has no free port number below 1",
        ),
        (
            CHANNEL_AT.format("bus='first' port='1'"),
            "domain:2: <address>: bus: 'first' is not a number",
        ),
        (
            CHANNEL_AT.format("controller='999'"),
            "domain:2: <channel>: controller 999 is above 255",
        ),
        (
            f"<channel type='null'>{VIRTIO}<address type='pci'/></channel>",
            "domain:2: <address>: there is no type 'pci'; known: ccw, virtio-serial",
        ),
    ],
)
def test_bad_port_address(devices: str, message: str) -> None:
    assert fails(devices) == message


# --- names, targets and identities


def test_name_and_alias() -> None:
    topology = domain(
        "<channel type='null'><alias name='ua-x'/>"
        "<target type='virtio' name='org.example'/></channel>"
    )
    (port,) = topology.controllers[0].ports
    assert (port.name, port.chardev.id) == ("org.example", "ua-x")
    assert port.chardev.where == "domain:2: <channel>"


def test_the_first_console_is_another_name_of_the_first_serial() -> None:
    topology = domain(
        f"<serial type='pty'/><console type='pty'/><parallel type='file'/>"
        "<channel type='unix'><target type='guestfwd' address='10.0.2.1' port='1'/></channel>"
        f"<channel type='null'>{VIRTIO}</channel>"
    )
    assert numbers(topology) == {"channel1": (0, 1)}
    assert topology.warnings == (
        "domain: not virtio-serial, left to the emulator: <serial> in line 2, "
        "<console> with target serial in line 2, <parallel> in line 2, "
        "<channel> with target guestfwd in line 2",
    )


@pytest.mark.parametrize(("append", "appends"), [("", False), ("append='on'", True)])
def test_log(append: str, appends: bool) -> None:
    topology = domain(f"<channel type='null'>{VIRTIO}<log file='/x' {append}/></channel>")
    assert topology.warnings == ()
    (port,) = topology.controllers[0].ports
    assert port.chardev.log == LogOptions(logfile="/x", logappend=appends)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (
            "<channel type='spicevmc'><target type='virtio' name='org.example'/></channel>",
            "domain:2: <channel>: a spicevmc channel is named com.redhat.spice.0, "
            "not 'org.example'",
        ),
        (
            f"<console type='spicevmc'>{VIRTIO}</console>",
            "domain:2: <console>: a console cannot be spicevmc",
        ),
        (
            f"<channel type='spicevmc'>{VIRTIO}</channel>\n" * 2,
            "domain:3: <channel>: name 'com.redhat.spice.0' is taken already "
            "(domain:2: <channel>): a name is unique over all controllers",
        ),
        ("<channel type='null'/>", "domain:2: <channel>: a channel needs a <target>"),
        ("<channel type='null'><target/></channel>", "domain:2: <target>: type is missing"),
        (
            "<channel type='null'><target type='virtoi'/></channel>",
            "domain:2: <target>: there is no type 'virtoi'; did you mean virtio? "
            "known: guestfwd, virtio, xen",
        ),
        (
            f"<channel type='null'>{VIRTIO}<alias name='a'/></channel>\n" * 2,
            "domain:3: <channel>: chardev id 'a' is taken already (domain:2: <channel>)",
        ),
    ],
)
def test_bad_target(devices: str, message: str) -> None:
    assert fails(devices) == message


# --- sources


def source(type_: str, inside: str, tag: str = "channel") -> str:
    return f"<{tag} type='{type_}'>{inside}{VIRTIO}</{tag}>"


@pytest.mark.parametrize(
    ("devices", "kind", "options"),
    [
        (source("file", "<source path='/f'/>"), "file", FileOptions(path="/f")),
        (
            source("file", "<source path='/f' append='on'/>"),
            "file",
            FileOptions(path="/f", append=True),
        ),
        (source("pipe", "<source path='/p'/>"), "pipe", PipeOptions(path="/p")),
        (
            source("udp", "<source mode='connect' host='h' service='9'/>"),
            "udp",
            UdpOptions(host="h", port=9),
        ),
        (
            source(
                "udp",
                "<source mode='bind' host='l' service='8'/><source mode='connect' service='9'/>",
            ),
            "udp",
            UdpOptions(port=9, localaddr="l", localport=8),
        ),
        (source("dev", "<source path='/dev/t'/>"), "serial", SerialOptions(path="/dev/t")),
        (
            source("unix", "<source mode='bind' path='/u'/>"),
            "socket",
            SocketOptions(path="/u", server=True, wait=False),
        ),
        (source("unix", "<source path='/u'/>"), "socket", SocketOptions(path="/u")),
        (
            source(
                "unix",
                "<source mode='connect' path='/u'><reconnect enabled='yes' timeout='7'/></source>",
            ),
            "socket",
            SocketOptions(path="/u", reconnect=7),
        ),
        (
            source("unix", "<source path='/u'><reconnect enabled='no'/></source>"),
            "socket",
            SocketOptions(path="/u"),
        ),
        (
            source("unix", ""),
            "socket",
            SocketOptions(path="vring.channel0", server=True, wait=False),
        ),
        (
            source("tcp", "<source host='h' service='7'/><protocol type='raw'/>"),
            "socket",
            SocketOptions(host="h", port=7),
        ),
        (
            source("tcp", "<source mode='bind' host='::1' service='0'/>"),
            "socket",
            SocketOptions(host="::1", port=0, server=True, wait=False),
        ),
    ],
)
def test_source(devices: str, kind: str, options: object) -> None:
    chardev = domain(devices).controllers[0].ports[0].chardev
    assert (chardev.kind, chardev.options) == (kind, options)


@pytest.mark.parametrize("type_", ["null", "pty", "stdio", "spicevmc"])
def test_source_without_options(type_: str) -> None:
    chardev = domain(source(type_, "")).controllers[0].ports[0].chardev
    assert chardev.kind == type_


def test_a_source_without_type_is_a_pty() -> None:
    topology = domain(f"<console>{VIRTIO}</console>")
    assert topology.controllers[0].ports[0].chardev.kind == "pty"


@pytest.mark.parametrize("type_", ["vc", "nmdm", "qemu-vdagent", "dbus"])
def test_known_source_that_is_not_served(type_: str) -> None:
    message = fails(source(type_, "<source path='/x'/>"))
    assert message.startswith(f"domain:2: <channel>: a source of type {type_} is not served: ")


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (
            source("unixx", ""),
            "domain:2: <channel>: there is no type 'unixx'; did you mean unix? known: dbus, dev, "
            "file, nmdm, null, pipe, pty, qemu-vdagent, spiceport, spicevmc, stdio, tcp, udp, "
            "unix, vc",
        ),
        (source("file", ""), "domain:2: <channel>: <source> is missing"),
        (source("udp", ""), "domain:2: <channel>: <source mode='connect'> is missing"),
        (source("file", "<source/>"), "domain:2: <source>: path is missing"),
        (source("pipe", "<source path=''/>"), "domain:2: <source>: path is missing"),
        (
            source("file", "<source path='/f' append='perhaps'/>"),
            "domain:2: <source>: append: 'perhaps' is neither on nor off",
        ),
        (
            source("unix", "<source mode='listen' path='/u'/>"),
            "domain:2: <source>: there is no mode 'listen'; known: bind, connect",
        ),
        (
            source("unix", "", tag="console"),
            "domain:2: <console>: a unix console needs a <source> with a path",
        ),
        (source("tcp", ""), "domain:2: <channel>: <source> is missing"),
        (source("tcp", "<source service='1'/>"), "domain:2: <source>: host is missing"),
        (source("tcp", "<source host='h'/>"), "domain:2: <source>: service is missing"),
        (
            source("tcp", "<source host='h' service='0'/>"),
            "domain:2: <source>: port: 0 is not between 1 and 65535",
        ),
        (
            source("tcp", "<source host='h' service='1'/><protocol type='telnet'/>"),
            "domain:2: <protocol>: telnet is not served: only raw is",
        ),
        (
            source("tcp", "<source host='h' service='1' tls='yes'/>"),
            "domain:2: <source>: tls is not served",
        ),
    ],
)
def test_bad_source(devices: str, message: str) -> None:
    assert fails(devices) == message


# --- the document


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "domain:1: not XML: "),
        (b"<domain>\n<devices>\n</domain>", "domain:3: not XML: Opening and ending tag mismatch"),
        (b"\xff\xfe\x00", "domain:1: not XML: "),
        (b"<network/>", "domain:1: <network>: the root of a domain is <domain>"),
        (b"<domain><name>a/b</name></domain>", "domain:1: <name>: 'a/b' cannot be a domain's name"),
        (b"<domain><name/></domain>", "domain:1: <name>: '' cannot be a domain's name"),
        (b"<!DOCTYPE domain><domain/>", "domain: a DOCTYPE is not accepted"),
        (
            b"<!DOCTYPE d [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><domain><name>&x;</name></domain>",
            "domain: a DOCTYPE is not accepted",
        ),
    ],
)
def test_bad_document(text: bytes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value).startswith(message)


def test_an_entity_bomb_is_refused_in_little_time() -> None:
    entities = "".join(
        f"<!ENTITY e{i} '{f'&e{i - 1};' * 10 if i else 'x' * 100}'>" for i in range(12)
    )
    bomb = f"<!DOCTYPE d [{entities}]><domain><name a='&e11;'>&e11;</name></domain>"
    with pytest.raises(ConfigError):
        parse(bomb.encode())


def test_depth_is_bounded() -> None:
    with pytest.raises(ConfigError, match="not XML"):
        parse(b"<domain>" + b"<a>" * 100_000)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"none\.xml: No such file or directory"):
        load(str(tmp_path / "none.xml"))
    with pytest.raises(ResourceError, match="Is a directory"):
        load(str(tmp_path))


def test_a_file_that_is_no_domain_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "big.xml"
    with path.open("wb") as file:
        file.truncate(domain_xml.MAX_XML_BYTES + 1)
    with pytest.raises(ConfigError, match="longer than 4 MiB"):
        load(str(path))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    data = (EXAMPLES / "spice-agent.xml").read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert load("-").name == "spice-agent"


_fragments = st.sampled_from(
    [
        *("<devices>", "</devices>", "<channel type='unix'>", "</channel>", "<console>"),
        *("<controller type='virtio-serial'>", "<controller type='virtio-serial' index='1'/>"),
        *(
            "</controller>",
            "</console>",
            "<target type='virtio'/>",
            "<target type='virtio' name=''/>",
        ),
        *("<source mode='bind' path='/x'/>", "<source/>", "<alias name='channel0'/>", "<!-- -->"),
        *("<address type='pci' slot='5'/>", "<address type='virtio-serial' port='1'/>", "&lt;"),
        *("<name>x</name>", "<channel type='spicevmc'>", "<serial/>", "text", "&undefined;"),
    ]
)


@given(st.lists(_fragments, max_size=15).map("".join) | st.text(max_size=50))
def test_any_text_gives_a_topology_or_a_clear_error(text: str) -> None:
    data = f"<domain>\n<devices>{text}</devices></domain>".encode(errors="replace")
    try:
        topology, message = parse(data), ""
    except ConfigError as error:
        topology, message = None, str(error)
    assert message.startswith("domain:") if topology is None else topology.controllers
