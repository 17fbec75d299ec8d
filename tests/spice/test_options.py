"""Options of the SPICE server, as values, as ``--spice`` and as ``<graphics>``."""

from __future__ import annotations

import time

import pytest

from vring_serial import SpiceOptions
from vring_serial.config import domain_xml
from vring_serial.config.load import load_topology
from vring_serial.config.qemu_options import QemuOptions, parse
from vring_serial.errors import ConfigError, ResourceError

AGENT = {"chardevs": ["spicevmc,id=a,name=vdagent"], "ports": ["chardev=a"]}


def spice(text):
    return parse(**AGENT, spice=text).spice


def refused(text):
    with pytest.raises(ConfigError) as caught:
        spice(text)
    return str(caught.value)


def test_names_are_those_of_qemu():
    config = spice(
        "port=5930,tls-port=5931,addr=::1,ipv6,password-file=/run/pw,disable-copy-paste=on,"
        "disable-agent-file-xfer=on,agent-mouse=off,x509-dir=/etc/tls,x509-key-password=k,"
        "tls-ciphers=HIGH,tls-channel=main,tls-channel=inputs,plaintext-channel=usbredir"
    )
    assert config.explicit
    assert config.where.startswith("--spice")
    assert config.options == SpiceOptions(
        port=5930, tls_port=5931, addr="::1", ipv6=True, password_file="/run/pw",
        disable_copy_paste=True, disable_agent_file_xfer=True, agent_mouse=False,
        x509_dir="/etc/tls", x509_key_password="k", tls_ciphers="HIGH",
        tls_channel=("main", "inputs"), plaintext_channel=("usbredir",),
    )  # fmt: skip
    assert config.options.key_file == "/etc/tls/server-key.pem"
    assert config.options.cert_file == "/etc/tls/server-cert.pem"
    assert config.options.cacert_file == "/etc/tls/ca-cert.pem"


def test_a_unix_socket():
    options = spice("unix=on,addr=/run/spice.sock,disable-ticketing").options
    assert options.unix
    assert options.addr == "/run/spice.sock"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a key is missing"),
        ("port=5930", "nobody could connect: needs password-file=FILE, or disable-ticketing=on"),
        ("disable-ticketing=on", "needs port=, tls-port=, autoport=on, or unix=on,addr=PATH"),
        ("port=70000,disable-ticketing", "port: 70000 is not between 0 and 65535"),
        ("port=x,disable-ticketing", "port: the value is not a number"),
        ("prot=5930", "item 1 does not begin with a key"),
        ("prot=5930", "did you mean port? known: "),
        ("port=1,port=2", "'port' is given twice"),
        ("port=1,disable-ticketing=maybe", "disable-ticketing: the value is neither on nor off"),
        ("port=1,disable-ticketing,unix", "addr: a path is needed"),
        ("port=1,disable-ticketing,unix,addr=/x", "port: a unix socket has no port"),
        ("port=1,disable-ticketing,ipv4,ipv6", "ipv4, ipv6 and unix exclude one another"),
        ("port=1,disable-ticketing,tls-port=1", "tls-port: 1 is the port without TLS already"),
        ("port=1,disable-ticketing,tls-channel=main", "tls-channel: needs tls-port="),
        ("tls-port=1,disable-ticketing,tls-channel=x", "tls-channel: no such channel; known: "),
        ("port=1,disable-ticketing,gl=on", "QEMU's gl is not served: there is no display here"),
        ("port=1,sasl=on", "QEMU's sasl is not served: use password-file, or a unix socket"),
        ("port=1,disable-ticketing,password-file=x", "exclude each other"),
        ("port=1,password-file=", "password-file is empty"),
        ("port=1,password=,disable-ticketing", "password is empty"),
        ("port=1,tls-ciphers=,disable-ticketing", "tls-ciphers is empty"),
        ("tls-port=1,x509-dir=,disable-ticketing", "x509-dir is empty"),
        ("port=1,disable-ticketing,password-valid-to=1", "there is no password that could expire"),
        ("unix,disable-ticketing,addr=/" + "x" * 108, "has at most 107 bytes"),
        ("port=1,disable-ticketing,addr=" + "x" * 300, "addr: longer than 255 bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(text, message):
    error = refused(text)
    assert error.startswith("--spice")
    assert message in error


@pytest.mark.parametrize(
    "text",
    [
        "port=x,password=hush", "port=1,port=2,password=hush", "port=1,passwd=hush", "hush",
        "port=1,password=a,hush", "port=1,password=a,hush,hush", "port=1password=hush",
        "port=1,disable-ticketing=onpassword=hush", "port=1,password=hush,gl=on", "=hush",
        "tls-port=1,password=x,tls-channel=mainpassword=hush", "password=hush,disable-ticketing",
        "port=1,password=hush" + "x" * 60, "port=1,password=hush" * 10000, "password=hush,=",
        "port=1,password-file=hush,password=hush", "port=1,password=hush,tls-channel=hush",
    ],
)  # fmt: skip
def test_nothing_of_the_text_is_repeated_in_messages(text):
    error = refused(text)
    assert error.startswith("--spice: ")
    assert "hush" not in error


def test_a_password_is_in_no_representation():
    assert "hush" not in repr(spice("port=1,password=hush"))
    assert "hush" not in repr(QemuOptions(spice="port=1,password=hush"))


def test_an_empty_password_is_not_the_same_as_none():
    assert SpiceOptions(port=1, password="").read_password() == b""
    assert SpiceOptions(port=1, disable_ticketing=True).read_password() is None
    with pytest.raises(ConfigError, match="password and disable-ticketing exclude each other"):
        SpiceOptions(port=1, password="", disable_ticketing=True)


def test_the_life_of_a_password():
    assert SpiceOptions(port=1, password="x").password_lifetime() == 0
    assert SpiceOptions(port=1, password="x", password_valid_to=1).password_lifetime() < 0
    soon = int(time.time()) + 1000
    assert 0 < SpiceOptions(port=1, password="x", password_valid_to=soon).password_lifetime() < 1001
    assert SpiceOptions(port=1, password="x", password_valid_to=2**62).password_lifetime() == 2**30


@pytest.mark.parametrize(
    ("content", "password"),
    [(b"hush", b"hush"), (b"hush\n", b"hush"), (b"hush\r\n", b"hush"), (b" h \n", b" h "),
     (b"x" * 59 + b"\r\n", b"x" * 59)],
)  # fmt: skip
def test_a_password_file(tmp_path, content, password):
    file = tmp_path / "password"
    file.write_bytes(content)
    assert SpiceOptions(port=1, password_file=str(file)).read_password() == password


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"", "empty"), (b"\n", "empty"), (b"a\nb\n", "line feed"), (b"a\0", "NUL"),
     (b"x" * 60, "at most 59"), (b"x" * 4096, "at most 59")],
)  # fmt: skip
def test_a_password_file_that_holds_none(tmp_path, content, why):
    file = tmp_path / "password"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=why):
        SpiceOptions(port=1, password_file=str(file)).read_password()


def test_a_password_file_that_is_not_there():
    with pytest.raises(ResourceError, match="/nowhere: No such file"):
        SpiceOptions(port=1, password_file="/nowhere").read_password()


# --- domain XML

CHANNEL = "<channel type='spicevmc'><target type='virtio'/></channel>"


def domain(graphics, channels=CHANNEL):
    text = f"<domain><devices>\n{graphics}\n{channels}</devices></domain>"
    return domain_xml.parse(text.encode(), channel_directory="/run/c")


@pytest.mark.parametrize(
    ("graphics", "options"),
    [
        (
            "<graphics type='spice' autoport='yes'/>",
            SpiceOptions(autoport=True, addr="127.0.0.1", disable_ticketing=True),
        ),
        (
            "<graphics type='spice' port='-1' listen='0.0.0.0' passwd='hush'/>",
            SpiceOptions(autoport=True, addr="0.0.0.0", password="hush"),
        ),
        (
            "<graphics type='spice' port='5930' tlsPort='5931' autoport='no' defaultMode='secure'>"
            "<listen type='address' address='::1'/><channel name='inputs' mode='insecure'/>"
            "<clipboard copypaste='no'/><filetransfer enable='no'/><mouse mode='server'/>"
            "<image compression='off'/></graphics>",
            SpiceOptions(
                port=5930, tls_port=5931, addr="::1", disable_ticketing=True,
                x509_dir="/etc/pki/libvirt-spice", tls_channel=("default",),
                plaintext_channel=("inputs",), disable_copy_paste=True,
                disable_agent_file_xfer=True, agent_mouse=False,
            ),
        ),
        (
            "<graphics type='spice' passwd=''/>",
            SpiceOptions(autoport=True, addr="127.0.0.1", password=""),
        ),
        (
            "<graphics type='spice' port='-1' tlsPort='-1'/>",
            SpiceOptions(autoport=True, addr="127.0.0.1", disable_ticketing=True),
        ),
        (
            "<graphics type='spice' port='1' passwd='x' passwdValidTo='2100-01-01T00:00:00'/>",
            SpiceOptions(port=1, addr="127.0.0.1", password="x", password_valid_to=4102444800),
        ),
        (
            "<graphics type='spice' autoport='yes' defaultMode='secure'/>",
            SpiceOptions(
                tls_autoport=True, addr="127.0.0.1", disable_ticketing=True,
                x509_dir="/etc/pki/libvirt-spice", tls_channel=("default",),
            ),
        ),
        (
            "<graphics type='spice' autoport='yes'><channel name='main' mode='secure'/></graphics>",
            SpiceOptions(
                autoport=True, tls_autoport=True, addr="127.0.0.1", disable_ticketing=True,
                x509_dir="/etc/pki/libvirt-spice", tls_channel=("main",),
            ),
        ),
        (
            "<graphics type='spice' autoport='no' port='5930' tlsPort='-1'/>",
            SpiceOptions(
                port=5930, tls_autoport=True, addr="127.0.0.1", disable_ticketing=True,
                x509_dir="/etc/pki/libvirt-spice",
            ),
        ),
        (
            "<graphics type='spice'><listen type='network' network='d' address='10.0.0.1'/>"
            "</graphics>",
            SpiceOptions(autoport=True, addr="10.0.0.1", disable_ticketing=True),
        ),
        (
            "<graphics type='spice' listen=''><listen type='address' address=''/></graphics>",
            SpiceOptions(autoport=True, addr="127.0.0.1", disable_ticketing=True),
        ),
        (
            "<graphics type='spice'><listen type='socket'/></graphics>",
            SpiceOptions(unix=True, addr="/run/c/vring.spice.sock", disable_ticketing=True),
        ),
        (
            "<graphics type='spice'><listen type='socket' socket='/run/s'/></graphics>",
            SpiceOptions(unix=True, addr="/run/s", disable_ticketing=True),
        ),
    ],
)  # fmt: skip
def test_graphics_of_a_domain(graphics, options):
    config = domain(graphics).spice
    assert config.options == options
    assert not config.explicit
    assert config.where == "domain:2: <graphics>"


@pytest.mark.parametrize(
    "graphics",
    [
        "",
        "<graphics type='vnc'/>",
        "<graphics type='spice'><listen type='none'/></graphics>",
        "<graphics type='spice' autoport='no' port='0'/>",
        "<graphics type='spice' port='0' tlsPort='0'/>",
        "<graphics type='spice' autoport='no'/>",
    ],
)
def test_domains_without_a_server(graphics):
    assert domain(graphics).spice is None


@pytest.mark.parametrize(
    ("graphics", "message"),
    [
        ("<graphics type='spice' port='x'/>", "port: 'x' is not a number"),
        ("<graphics type='spice' port='70000'/>", "port: 70000 is not between"),
        ("<graphics type='spice' port='1' defaultMode='secure'/>", "need a port with TLS"),
        ("<graphics type='spice' tlsPort='1' defaultMode='insecure'/>", "need a port without TLS"),
        (
            "<graphics type='spice' defaultMode='secure'><listen type='socket'/></graphics>",
            "need a port with TLS",
        ),
        ("<graphics type='spice' passwd='x' passwdValidTo='tomorrow'/>", "is no time such as"),
        ("<graphics type='spice' passwd='x' passwdValidTo='2030-02-31T00:00:00'/>", "is no time"),
        ("<graphics type='spice'/><graphics type='spice'/>", "there is one already"),
        ("<graphics type='spice'><listen type='network'/></graphics>", "name the address"),
        ("<graphics type='spice'><mouse mode='x'/></graphics>", "there is no mode 'x'"),
    ],
)
def test_graphics_that_cannot_be(graphics, message):
    with pytest.raises(ConfigError, match=message) as caught:
        domain(graphics)
    assert str(caught.value).startswith("domain:2: <")


@pytest.mark.parametrize(
    ("attributes", "warning"),
    [
        ("passwd=''", "domain:2: <graphics>: passwd is empty: no SPICE client is let in"),
        (
            "passwd='x' passwdValidTo='2020-01-31T00:00:00'",
            "domain:2: <graphics>: passwd has expired: no SPICE client is let in",
        ),
    ],
)
def test_a_password_that_lets_nobody_in(attributes, warning):
    assert domain(f"<graphics type='spice' {attributes}/>").warnings == (warning,)


#: None of them can be served, and none has to be: no host end needs a SPICE server.
NETWORK = "<graphics type='spice'><listen type='network' network='default'/></graphics>"
NEEDLESS = [
    NETWORK,
    "<graphics type='spice' port='x'/>",
    "<graphics type='spice' passwd='x' passwdValidTo='tomorrow'/>",
    "<graphics type='spice' port='1' defaultMode='secure'/>",
    "<graphics type='spice'/><graphics type='spice'/>",
]


@pytest.mark.parametrize("graphics", NEEDLESS)
def test_a_domain_that_needs_no_server_is_not_refused_for_its_graphics(graphics):
    topology = domain(graphics, "<channel type='pty'><target type='virtio'/></channel>")
    assert topology.spice is None
    assert topology.warnings == ()


@pytest.mark.parametrize("graphics", NEEDLESS)
def test_graphics_are_not_read_where_the_option_takes_their_place(graphics, tmp_path):
    file = tmp_path / "domain.xml"
    file.write_text(f"<domain><devices>{graphics}{CHANNEL}</devices></domain>")
    options = QemuOptions(spice="port=2,disable-ticketing=on")
    assert load_topology(str(file), options).spice.options.port == 2


def test_graphics_serve_a_host_end_that_an_option_adds(tmp_path):
    file = tmp_path / "domain.xml"
    file.write_text("<domain><devices><graphics type='spice' port='7'/></devices></domain>")
    topology = load_topology(str(file), QemuOptions(["spicevmc,id=a"], ["chardev=a"]))
    assert topology.spice.options.port == 7


def test_the_option_comes_before_the_domain(tmp_path):
    file = tmp_path / "domain.xml"
    file.write_text(
        f"<domain><devices><graphics type='spice' port='1'/>{CHANNEL}</devices></domain>"
    )
    options = QemuOptions(spice="port=2,disable-ticketing=on")
    assert load_topology(str(file), options).spice.options.port == 2


# --- spiceport

GRAPHICS = "<graphics type='spice'/>"
SOURCE = "<source channel='org.spice-space.webdav.0'/>"
WEBDAV = (
    f"<channel type='spiceport'>{SOURCE}"
    "<target type='virtio' name='org.spice-space.webdav.0'/></channel>"
)


def test_a_spiceport_of_a_domain():
    topology = domain("<graphics type='spice'/>", WEBDAV)
    (port,) = topology.controllers[0].ports
    assert port.chardev.kind == "spiceport"
    assert port.chardev.options.name == "org.spice-space.webdav.0"


@pytest.mark.parametrize(
    ("graphics", "channels", "message"),
    [
        ("", WEBDAV, "spiceport needs a SPICE server: --spice, or <graphics type='spice'> that"),
        (GRAPHICS, WEBDAV.replace(SOURCE, ""), "<source> is missing"),
        (GRAPHICS, WEBDAV.replace(SOURCE, "<source/>"), "channel is missing"),
        (GRAPHICS, WEBDAV + WEBDAV.replace("name='org", "name='x"), "is taken already"),
        (GRAPHICS, WEBDAV.replace("webdav", "stream"), "is a display"),
    ],
)  # fmt: skip
def test_spiceports_that_cannot_be(graphics, channels, message):
    with pytest.raises(ConfigError, match=message):
        domain(graphics, channels)


def test_a_spiceport_of_options():
    topology = parse(
        ["spiceport,id=p,name=org.example.0"],
        ["chardev=p,name=org.example.0"],
        spice="port=1,disable-ticketing",
    )
    assert topology.controllers[0].ports[0].chardev.options.name == "org.example.0"
