"""Files of ``--config``: what they declare, what is refused where, and that they come back."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.examples import EXAMPLES
from vring_serial.chardev.socket import SocketOptions
from vring_serial.config.load import load_topology
from vring_serial.config.qemu_options import QemuOptions
from vring_serial.config.toml_file import parse
from vring_serial.config.toml_text import as_toml
from vring_serial.config.topology import PciAddress
from vring_serial.config.vms import ServiceConfig, VmConfig, check_vms
from vring_serial.errors import ConfigError

TWO = b"""
qmp = "unix:/run/qmp,server=on,wait=off"
metrics = ["9500", "unix:/run/m"]
workers = "shared"
json-log = true

[vm.desktop]
vfio-user = ["a.sock", "b.sock"]
vectors = 4
user = "nobody"
spice = { port = 5930, addr = "127.0.0.1", disable-ticketing = true, tls-channel = [] }
chardev.agent = { backend = "spicevmc" }
chardev.data = { backend = "socket", path = "data", server = true, wait = false }
port = [{ chardev = "agent" }, { chardev = "data", name = "org.example.data", controller = 1 }]

[[vm.desktop.controller]]
index = 1
max-ports = 4
address = "00:07.0"

[vm."a server"]
vhost-user = "c.sock"
busy-poll = 50

[vm."a server".chardev.con]
backend = "ringbuf"
size = "4K"

[[vm."a server".console]]
chardev = "con"

[vm."a server".chardev.agent]
backend = "null"

[[vm."a server".port]]
chardev = "agent"
name = "org.example.data"
"""


def test_machines_with_all_that_options_can_say() -> None:
    service = parse(TWO)
    check_vms(service.vms)
    assert (service.workers, service.json_log, service.log_level) == ("shared", True, None)
    assert service.qmp == ("unix:/run/qmp,server=on,wait=off",)
    assert service.metrics == ("9500", "unix:/run/m")
    desktop, server = service.vms
    assert (desktop.name, server.name) == ("desktop", "a server")
    assert (desktop.vfio_user, desktop.sockets) == (True, ("a.sock", "b.sock"))
    assert (desktop.vectors, desktop.user, server.busy_poll) == (4, "nobody", 50)
    first, second = desktop.topology.controllers
    assert (second.index, second.max_ports, second.address) == (1, 4, PciAddress(slot=7))
    assert [port.name for port in (*first.ports, *second.ports)] == [
        "com.redhat.spice.0",
        "org.example.data",  # as the other machine has one
    ]
    assert second.ports[0].chardev.options == SocketOptions(path="data", server=True, wait=False)
    assert desktop.topology.spice is not None
    assert desktop.topology.spice.explicit
    console, _ = server.topology.controllers[0].ports
    assert (console.console, console.nr, console.chardev.options.size) == (True, 0, 4096)  # type: ignore[attr-defined]


def test_a_domain_with_more_beside_it() -> None:
    domain = EXAMPLES / "spice-agent.xml"
    text = f'[vm.a]\nvhost-user = "v"\ndomain = "{domain}"\nchardev.n.backend = "null"\n'
    (vm,) = parse(f'{text}port = [{{chardev = "n"}}]\n'.encode()).vms
    assert [port.chardev.id for port in vm.topology.controllers[0].ports] == ["channel0", "n"]
    assert vm.name == "a"


HEAD = '[vm.a]\nvhost-user = "v"\n'
PORT = 'chardev.n.backend = "null"\nport = [{chardev = "n"}]\n'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a b", "f:1: not TOML: "),
        ("a = 1\na = 2", "f:2: not TOML: "),
        ("[vm.a]\n\xff", "f:2: not TOML: not UTF-8"),
        ("a = " + "[" * 5000, "f: not TOML: nested too deeply"),
        ("\nworker = 1", "f:2: worker: there is no such key; did you mean workers? known: "),
        ("workers = 'one'", "f:1: workers: there is no 'one'; "),
        ("log-level = 3", "f:1: log-level: is a string, not a number"),
        ("json-log = 'on'", "f:1: json-log: is true or false, not a string"),
        ("metrics = true", "f:1: metrics: is a number or a string, or a list of them, not true"),
        (
            "metrics = [1, 2.5]",
            "f:1: metrics[2]: is a number or a string, not a date or a fraction",
        ),
        ("qmp = 4444", "f:1: qmp: is a string, or a list of them, not a number"),
        ("qmp = ''", "f:1: qmp: is empty"),
        ("socket-mode = 660", 'f:1: socket-mode: is a string such as "0660", not a number'),
        ("socket-mode = 0o660", 'f:1: socket-mode: is a string such as "0660", not a number'),
        ("[vm.a]\nvhost-user = 5", "f:2: vm.a.vhost-user: is a string, or a list of them, not a n"),
        ("qmp = ['a',\n3]", "f:2: qmp[2]: is a string, not a number"),
        ("vm = 3", "f:1: vm: is a table, not a number"),
        ("[vm]\na = 3", "f:2: vm.a: is a table, not a number"),
        ('[vm."a/b"]', "f:1: vm.a/b: 'a/b' cannot be a domain's name"),
        ("[vm.a]", "f:1: vm.a: needs vhost-user or vfio-user: a socket for each controller"),
        (HEAD + "vfio-user = 'w'", "f:3: vm.a.vfio-user: a VM has either vhost-user or vfio-user"),
        (HEAD + PORT + "connectt = true", "f:5: vm.a.connectt: there is no such key; did you"),
        (HEAD + "busy-poll = -1", "f:3: vm.a.busy-poll: -1 is not from 0 to 1000000"),
        (HEAD + "sandbox = ''", "f:3: vm.a.sandbox: is empty"),
        (HEAD + "domain = '-'", "f:3: vm.a.domain: standard input is no domain of a file's"),
        (HEAD + "max-ports = 999", "f:3: vm.a.max-ports: a controller has 1 to 511 ports"),
        (HEAD, "f:1: vm.a: nothing to serve"),
        (HEAD + "chardev = [1]", "f:3: vm.a.chardev: is a table, not a list"),
        (HEAD + "[vm.a.chardev.n]", "f:3: vm.a.chardev.n: needs backend; known: "),
        (HEAD + "chardev.n.backend = 'nul'", "f:3: vm.a.chardev.n.backend: there is no chardev"),
        (HEAD + "chardev.n.backend = 'vc'", "f:3: vm.a.chardev.n.backend: vc is not served: "),
        (HEAD + "chardev.n.backend = 'null'", "f:3: vm.a.chardev.n: no port or console uses it"),
        (
            HEAD + "[vm.a.chardev.n]\nbackend = 'pipe'\npth = 3",
            "f:5: vm.a.chardev.n.pth: pipe has no 'pth'; did you mean path?",
        ),
        (
            HEAD + "[vm.a.chardev.n]\nbackend = 'pipe'\npath = 3",
            "f:5: vm.a.chardev.n.path: is a string, not a number",
        ),
        (
            HEAD + "[vm.a.chardev.n]\nbackend = 'file'\npath = 'x'\ndelay = true",
            "f:6: vm.a.chardev.n.delay: QEMU's delay is not served",
        ),
        (
            HEAD + "[vm.a.chardev.n]\nbackend = 'spicevmc'\nmux = true",
            "f:5: vm.a.chardev.n.mux: ports cannot share spicevmc",
        ),
        (
            HEAD + "[vm.a.chardev.n]\nbackend = 'pty'\nmux = 'on'",
            "f:5: vm.a.chardev.n.mux: is true or false, not a string",
        ),
        (
            HEAD + "[vm.a.chardev.n]\nbackend = 'pty'\nlogfile = 'y'\nlogsize = '2X'",
            "f:6: vm.a.chardev.n.logsize: '2X' is not a size",
        ),
        (
            HEAD + "[vm.a.chardev.n]\nbackend = 'pty'\nlogappend = true",
            "f:5: vm.a.chardev.n.logappend: goes with logfile only",
        ),
        (
            "".join(
                f"[vm.{name}]\nvhost-user = '{name}'\nchardev.p = {{backend = 'null', "
                "logfile = 'x'}\nport = [{chardev = 'p'}]\n"
                for name in "ab"
            ),
            "/x is in use already (f:3: vm.a.chardev.p)",
        ),
        (
            HEAD + "[vm.a.chardev.n]\nbackend = 'socket'\npath = 'x'\nport = 1",
            "f:5: vm.a.chardev.n.path: a socket has a path or a host and a port, not both",
        ),
        (
            HEAD + "[vm.a.chardev.n]\nbackend = 'ringbuf'\nsize = '4X'",
            "f:5: vm.a.chardev.n.size: '4X' is not a size",
        ),
        (HEAD + "[[vm.a.port]]\nnr = 1", "f:3: vm.a.port[1]: needs chardev"),
        (HEAD + "[[vm.a.port]]\nchardev = 'n'", "f:4: vm.a.port[1].chardev: there is no chardev"),
        (
            HEAD + PORT + "[[vm.a.console]]\nchardev = 'n'",
            "f:4: vm.a.port[1].chardev: chardev n is in use already",
        ),
        (
            HEAD + "chardev.n.backend = 'null'\n[[vm.a.port]]\nchardev = 'n'\nnr = 0",
            "f:4: vm.a.port[1]: port number 0 is reserved for a console",
        ),
        (
            HEAD + PORT + "[[vm.a.controller]]\naddress = 'x'",
            "f:6: vm.a.controller[1].address: 'x' is no PCI address",
        ),
        (
            HEAD + PORT + "[[vm.a.controller]]\n[[vm.a.controller]]",
            "f:6: vm.a.controller[2]: controller 0 is there already (f:5: vm.a.controller[1])",
        ),
        (HEAD + PORT + "[vm.a.spice]\nport = 5900", "f:5: vm.a.spice: nobody could connect"),
        (HEAD + PORT + "[vm.a.spice]\nsasl = true", "f:6: vm.a.spice.sasl: QEMU's sasl is not"),
        (HEAD + PORT + "spice.port = 'secret'", "f:5: vm.a.spice.port: is a number, not a string"),
        (HEAD + PORT + "vectors = 3", "f:5: vm.a.vectors: is for vfio-user"),
        (HEAD + PORT + "inband-notifications = 1979-05-27", "is true or false, not a date"),
        (HEAD + PORT + "[vm.b]\nvhost-user = './v'\n" + PORT, "f:6: vm.b.vhost-user ./v: the path"),
        (
            "[vm.a]\nvhost-user = ['v', 'w']\n" + PORT,
            "f:2: vm.a.vhost-user: 2 given, 1 needed: one for each of virtio-serial0",
        ),
        (
            "".join(
                f"[vm.{name}]\nvhost-user = '{name}'\nchardev.p = {{backend = 'pty', path = 'x'}}\n"
                "port = [{chardev = 'p'}]\n"
                for name in "ab"
            ),
            "/x is in use already (f:3: vm.a.chardev.p)",
        ),
    ],
)
def test_what_is_refused_is_told_with_file_line_and_key(text: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_vms(parse(text.encode("latin-1"), file="f").vms)
    assert why in str(caught.value)
    assert str(caught.value).startswith("f:")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


# --- what is written comes back

NAMES = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), min_size=1)
TEXTS = NAMES.filter(lambda text: text.isprintable())
PATHS = TEXTS.filter(lambda text: len(text.encode()) < 90)


def escaped(text: str) -> str:
    return text.replace(",", ",,")


@st.composite
def machines(draw: st.DrawFn, number: int) -> VmConfig:
    """A VM of options, or of a domain XML and options."""
    domain = draw(st.sampled_from([None, "spice-agent", "desktop", "two-controllers"]))
    chardevs, ports, consoles = [], [], []
    for i in range(draw(st.integers(0 if domain else 1, 5))):
        id = f"c{number}-{i}"
        path = escaped(f"{number}-{i}{draw(PATHS)}")
        chardevs.append(
            draw(
                st.sampled_from(
                    [
                        f"null,id={id}",
                        f"pty,id={id}",
                        f"pty,id={id},path={path}",
                        f"file,id={id},path={path},append=on",
                        f"socket,id={id},path={path},server=on,wait=off",
                        f"socket,id={id},path={path},abstract=on,reconnect-ms=7",
                        f"socket,id={id},host={path},port=80,ipv4=off,to=90,server",
                        f"ringbuf,id={id},size=4K",
                    ]
                )
            )
        )
        if draw(st.booleans()):
            name = escaped(f"{i}{draw(TEXTS)[:20]}")
            ports.append(f"chardev={id},name={name}")
        else:
            consoles.append(f"chardev={id}")
    spice = draw(
        st.sampled_from([None, "port=5930,password=a,,b", "unix,addr=s,disable-ticketing"])
    )
    options = QemuOptions(chardevs, ports, consoles, draw(st.sampled_from([None, 8])), spice)
    xml = None if domain is None else str(EXAMPLES / f"{domain}.xml")
    topology = load_topology(xml, options, channel_directory=f"/run/{number}")
    name = draw(TEXTS.filter(lambda text: "/" not in text))
    return VmConfig(
        dataclasses.replace(topology, name=f"{name}{number}", warnings=()),
        tuple(f"{number}.{c.index}" for c in topology.controllers),
        vfio_user=draw(st.booleans()),
        busy_poll=draw(st.sampled_from([0, 50])),
        agent_socket=draw(st.none() | PATHS),
        packed=draw(st.booleans()),
        sandbox=draw(st.sampled_from(["on", "off", "on,seccomp=off"])),
        qmp=draw(st.sampled_from([(), ("unix:q",), ("unix:q", "unix:r")])),
        user=draw(st.none() | TEXTS),
    )


@settings(max_examples=40)
@given(
    st.data(), st.integers(1, 3), st.none() | st.sampled_from(["vm", "shared"]), st.none() | TEXTS
)
def test_what_is_shown_is_read_as_what_it_was(
    data: st.DataObject, count: int, workers: str | None, pid_file: str | None
) -> None:
    vms = tuple(data.draw(machines(number)) for number in range(count))
    service = ServiceConfig(
        vms,
        ("unix:q",),
        ("1", "2"),
        workers,
        "0660",
        pid_file=pid_file,
        log_level="debug",
        json_log=True,
    )
    assert parse(as_toml(service).encode()) == service


def test_what_users_think_of_as_a_number_may_be_one() -> None:
    text = "metrics = 9500\nsocket-owner = 0\nsocket-group = 4\n"
    vm = "[vm.a]\nvhost-user = 'v'\nuser = 65534\n" + PORT
    service = parse((text + vm).encode())
    assert service.metrics == ("9500",)
    assert (service.socket_owner, service.socket_group) == ("0", "4")
    assert service.vms[0].user == "65534"
    assert parse(b"metrics = [9500, 'unix:m']\n" + vm.encode()).metrics == ("9500", "unix:m")


def test_a_path_that_is_no_text_cannot_be_shown() -> None:
    topology = load_topology(None, QemuOptions(["pipe,id=p,path=\udcff"], ["chardev=p"]))
    with pytest.raises(ConfigError, match="is not UTF-8"):
        as_toml(ServiceConfig((VmConfig(topology, ("v",)),)))


def test_ports_that_share_an_end_are_read_and_written() -> None:
    text = (
        HEAD + "[vm.a.chardev.m]\nbackend = 'pty'\nmux = true\n"
        "[[vm.a.console]]\nchardev = 'm'\n[[vm.a.port]]\nchardev = 'm'\n"
    )
    service = parse(text.encode())
    ports = service.vms[0].topology.controllers[0].ports
    assert [(port.nr, port.chardev.id, port.chardev.mux) for port in ports] == [
        (0, "m", True),
        (1, "m", True),
    ]
    check_vms(service.vms)
    written = as_toml(service)
    assert written.count("[vm.a.chardev.m]") == 1
    assert "mux = true" in written
    assert parse(written.encode()) == service
