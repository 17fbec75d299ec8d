from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vring_serial.chardev.socket import SocketOptions
from vring_serial.config import qemu_options
from vring_serial.config.qemu_options import parse, split
from vring_serial.config.topology import PortConfig, Topology
from vring_serial.errors import ConfigError


def ports_of(topology: Topology) -> list[PortConfig]:
    return [port for controller in topology.controllers for port in controller.ports]


def fails(**options: Any) -> str:
    """The message with which ``parse`` refuses the options."""
    with pytest.raises(ConfigError) as caught:
        parse(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the command line of the README


def test_the_main_job() -> None:
    topology = parse(
        chardevs=["socket,id=agent,path=/run/agent.sock,server=on,wait=off", "pty,id=con"],
        ports=["chardev=agent,nr=1,name=com.redhat.spice.0"],
        consoles=["chardev=con"],
    )
    (controller,) = topology.controllers
    assert (controller.index, controller.max_ports, controller.address) == (0, 31, None)
    console, agent = controller.ports
    assert (console.nr, console.name, console.console) == (0, "", True)
    assert console.chardev.kind == "pty"
    assert (agent.nr, agent.name, agent.console) == (1, "com.redhat.spice.0", False)
    assert agent.chardev.options == SocketOptions(path="/run/agent.sock", server=True, wait=False)


# --- syntax


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("a=1", [("a", "1")]),
        ("a", [("a", None)]),
        ("a=", [("a", "")]),
        ("a=1,b=2", [("a", "1"), ("b", "2")]),
        ("a=1,", [("a", "1")]),
        ("a=x,,y", [("a", "x,y")]),
        ("a=x,,,b=y", [("a", "x,"), ("b", "y")]),
        ("a=,,", [("a", ",")]),
        ("a=b=c", [("a", "b=c")]),
    ],
)
def test_split(text: str, pairs: list[tuple[str, str | None]]) -> None:
    assert split(text) == pairs


@pytest.mark.parametrize("text", ["", ",", ",a=1", "=1", "a=1,=2"])
def test_split_misses_a_key(text: str) -> None:
    with pytest.raises(ConfigError, match="a key is missing"):
        split(text)


def test_split_refuses_a_key_twice_and_endless_options() -> None:
    with pytest.raises(ConfigError, match="'a' is given twice"):
        split("a=1,b=2,a=3")
    with pytest.raises(ConfigError, match="longer than"):
        split("a=" + "x" * qemu_options.MAX_OPTION_LENGTH)


@given(
    st.lists(st.tuples(st.from_regex(r"[a-z][a-z0-9-]*", fullmatch=True), st.text()), min_size=1)
)
def test_split_reads_what_qemu_quoting_writes(pairs: list[tuple[str, str]]) -> None:
    pairs = list(dict(pairs).items())
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in pairs)
    assert split(text) == pairs


@pytest.mark.parametrize(
    ("text", "server", "wait"),
    [
        ("server=on,wait=off", True, False),
        ("server=yes,wait=no", True, False),
        ("server=true,wait=false", True, False),
        ("server=y,wait=n", True, False),
        ("server,nowait", True, False),
        ("server", True, None),
        ("server,wait", True, True),
        ("server=off", False, None),
        ("noserver", False, None),
    ],
)
def test_booleans(text: str, server: bool, wait: bool | None) -> None:
    topology = parse([f"socket,id=a,path=/x,{text}"], ["chardev=a"])
    assert ports_of(topology)[0].chardev.options == SocketOptions(
        path="/x", server=server, wait=wait
    )


def test_kind_by_its_key_and_by_its_older_name() -> None:
    (port,) = ports_of(parse(["id=a,backend=null"], ["chardev=a"]))
    assert port.chardev.kind == "null"
    (port,) = ports_of(parse(["memory,id=a,size=64K"], ["chardev=a"]))
    assert port.chardev.kind == "ringbuf"
    assert port.chardev.options == type(port.chardev.options)(size=65536)  # type: ignore[call-arg]


def test_hyphens_in_keys() -> None:
    (port,) = ports_of(parse(["socket,id=a,host=h,port=0x50,reconnect-ms=250"], ["chardev=a"]))
    assert port.chardev.options == SocketOptions(host="h", port=80, reconnect_ms=250)


# --- numbers and names


def test_numbers_where_none_are_given() -> None:
    topology = parse(
        [f"null,id=c{i}" for i in range(6)],
        ports=["chardev=c0", "chardev=c1,nr=2", "chardev=c2"],
        consoles=["chardev=c3", "chardev=c4", "chardev=c5,nr=1"],
    )
    numbers = {port.chardev.id: port.nr for port in ports_of(topology)}
    assert numbers == {"c5": 1, "c1": 2, "c3": 0, "c4": 3, "c0": 4, "c2": 5}


def test_a_full_controller_is_followed_by_another() -> None:
    topology = parse(
        [f"null,id=c{i}" for i in range(3)], [f"chardev=c{i}" for i in range(3)], max_ports=3
    )
    assert [(c.index, [p.nr for p in c.ports]) for c in topology.controllers] == [
        (0, [1, 2]),
        (1, [1]),
    ]


def test_ports_of_several_controllers() -> None:
    topology = parse(["null,id=a", "null,id=b"], ["chardev=a,controller=1", "chardev=b"])
    assert [(c.index, [p.chardev.id for p in c.ports]) for c in topology.controllers] == [
        (0, ["b"]),
        (1, ["a"]),
    ]


def test_spicevmc_has_its_name() -> None:
    (port,) = ports_of(parse(["spicevmc,id=a,name=vdagent"], ["chardev=a"]))
    assert port.name == "com.redhat.spice.0"


# --- what is refused


@pytest.mark.parametrize(
    ("chardev", "message"),
    [
        ("", "a key is missing"),
        ("id=a", "begins with the kind; known: console, file, null"),
        ("sokcet,id=a", "no chardev 'sokcet'; did you mean socket?"),
        ("vc,id=a", "vc is not served"),
        ("parallel,id=a,path=/dev/lp0", "parallel is not served: a port has no lines for it"),
        ("udp,id=a,port=1,mux=on", "ports cannot share udp"),
        ("null", "needs id=NAME"),
        ("null,id=", "needs id=NAME"),
        ("null,id", "needs id=NAME"),
        ("null,id=1a", "'1a' is no id"),
        ("null,id=a,path=/x", "null has no 'path'"),
        ("socket,id=a,pth=/x", "socket has no 'pth'; did you mean path?"),
        ("socket,id=a,path=/x,telnet=on", "QEMU's telnet is not served"),
        ("socket,id=a,path=/x,server=maybe", "server: 'maybe' is neither on nor off"),
        ("socket,id=a,host=h,port=http", "port: 'http' is not a number"),
        ("socket,id=a,host=h,port", "port needs a value"),
        ("socket,id=a,host=h,port=65536", "port: 65536 is not between"),
        ("socket,id=a", "a socket needs a path (unix) or a port (TCP)"),
        ("socket,id=a,path=/x,server,server=off", "'server' is given twice"),
        ("socket,id=a,path=/x,wait=on,nowait", "wait is given twice"),
        ("socket,id=a,path=/x,wait=on", "wait: goes with server=on only"),
        ("socket,id=a,server,path=/" + "x" * 107, "has 108 bytes; a unix socket's has 1 to 107"),
        ("file,id=a", "path: a path is needed"),
        (f"console,id=a,path=/{'x' * 107}", "has 108 bytes; a unix socket's has 1 to 107"),
        ("console,id=a,path=c,scrollback=1G", "scrollback: 1073741824 is not between 0 and"),
        ("console,id=a", "path: a path is needed"),
        ("ringbuf,id=a,size=3", "size: 3 is not a power of two"),
        ("spicevmc,id=a,name=usbredir", "name: 'usbredir' is not served"),
    ],
)
def test_bad_chardev(chardev: str, message: str) -> None:
    text = fails(chardevs=[chardev], ports=["chardev=a"])
    assert text.startswith("--chardev ")
    assert message in text


@pytest.mark.parametrize(
    ("port", "message"),
    [
        ("nr=1", "needs chardev=ID"),
        ("chardev=", "needs chardev=ID"),
        ("chardev=b", "no --chardev has id=b; "),
        ("chardev=a,nr=0", "port number 0 is reserved for a console"),
        ("chardev=a,nr=31", "port number 31 is not below 31, the number of ports of controller 0"),
        ("chardev=a,nr=-1", "nr: '-1' is not a number"),
        ("chardev=a,nr", "nr needs a value"),
        ("chardev=a,number=1", "there is no 'number'; "),
        ("chardev=a,nmae=x", "there is no 'nmae'; did you mean name?"),
        ("chardev=a,controller=256", "controller 256 is above 255"),
        ("chardev=a,name=x\ny", "port name 'x\\ny' has characters that cannot be shown"),
        ("chardev=a,name=" + "x" * 5000, "a port's name has at most 4088 bytes"),
    ],
)
def test_bad_port(port: str, message: str) -> None:
    text = fails(chardevs=["null,id=a"], ports=[port])
    assert text.startswith("--port ")
    assert message in text


def test_chardev_defined_twice_used_twice_or_not_at_all() -> None:
    assert "chardev id 'a' is taken already (--chardev null,id=a)" in fails(
        chardevs=["null,id=a", "pty,id=a"], ports=["chardev=a"]
    )
    assert fails(chardevs=["null,id=a"], ports=["chardev=a", "chardev=a,nr=5"]) == (
        "--port chardev=a,nr=5: chardev a is in use already (--port chardev=a)"
    )
    assert fails(chardevs=["null,id=a", "null,id=b"], ports=["chardev=a"]) == (
        "--chardev null,id=b: no --port or --console uses chardev b"
    )


def test_ports_that_share_an_end() -> None:
    chardevs = ["stdio,id=a,signal=off,mux=on"]
    topology = parse(chardevs, ["chardev=a,name=x", "chardev=a,controller=1"], ["chardev=a"])
    ports = ports_of(topology)
    assert [port.chardev for port in ports] == [ports[0].chardev] * 3
    assert ports[0].chardev.mux
    for text in ("mux=off", "nomux"):
        (port,) = ports_of(parse([f"pty,id=a,{text}"], ["chardev=a"]))
        assert not port.chardev.mux
    assert "4 ports share chardev a already" in fails(chardevs=chardevs, ports=["chardev=a"] * 5)
    assert "ports cannot share spicevmc" in fails(chardevs=["spicevmc,id=a,mux"])
    assert "mux: 'x' is neither on nor off" in fails(chardevs=["pty,id=a,mux=x"])
    assert "chardev id 'a-base' is taken already" in fails(chardevs=[*chardevs, "null,id=a-base"])


def test_number_or_name_twice() -> None:
    chardevs = ["null,id=a", "null,id=b"]
    assert fails(chardevs=chardevs, ports=["chardev=a,nr=3", "chardev=b,nr=3"]) == (
        "--port chardev=b,nr=3: port number 3 of controller 0 is taken already "
        "(--port chardev=a,nr=3)"
    )
    assert "name 'x' is taken already (--port chardev=a,name=x)" in fails(
        chardevs=chardevs, ports=["chardev=a,name=x", "chardev=b,name=x,controller=1"]
    )


def test_wrong_spicevmc() -> None:
    assert "is named com.redhat.spice.0, not 'agent'" in fails(
        chardevs=["spicevmc,id=a"], ports=["chardev=a,name=agent"]
    )
    assert "a console cannot be spicevmc" in fails(
        chardevs=["spicevmc,id=a"], consoles=["chardev=a"]
    )


def test_what_only_one_host_end_can_have() -> None:
    ports = ["chardev=a", "chardev=b"]
    assert "/x is in use already (--chardev socket,id=a,path=/x,server" in fails(
        chardevs=["socket,id=a,path=/x,server", "socket,id=b,path=/./x,server"], ports=ports
    )
    consoles = ["console,id=a,path=/x", "console,id=b,path=/x"]
    assert "/x is in use already" in fails(chardevs=consoles, ports=ports)
    assert "stdio is in use already" in fails(chardevs=["stdio,id=a", "stdio,id=b"], ports=ports)
    one_name = [f"socket,id={id},path=x,abstract,server" for id in "ab"]
    assert "abstract x is in use already" in fails(chardevs=one_name, ports=ports)
    logs = ["null,id=a,logfile=/x,logsize=1M", "pty,id=b,logfile=/x.2"]
    assert "/x.2 is in use already" in fails(chardevs=logs, ports=ports)
    logged_twice = ["file,id=a,path=/x", "pty,id=b,logfile=/x"]
    assert "/x is a log already" in fails(chardevs=logged_twice, ports=ports)
    two_clients = ["socket,id=a,path=/x", "socket,id=b,path=/x"]
    assert len(ports_of(parse(two_clients, ports))) == 2


@pytest.mark.parametrize("max_ports", [-1, 0, 512])
def test_bad_max_ports(max_ports: int) -> None:
    assert fails(chardevs=["null,id=a"], ports=["chardev=a"], max_ports=max_ports) == (
        f"--max-ports: a controller has 1 to 511 ports, not {max_ports}"
    )


def test_a_controller_of_one_port_has_room_for_a_console_only() -> None:
    assert len(ports_of(parse(["null,id=a"], consoles=["chardev=a"], max_ports=1))) == 1
    assert "only port 0, which is a console's" in fails(
        chardevs=["null,id=a"], ports=["chardev=a"], max_ports=1
    )


def test_nothing_to_serve() -> None:
    assert fails().startswith("nothing to serve")


# --- any string

_WORDS = [
    *("socket", "pty", "null", "ringbuf", "spicevmc", "file", "stdio", "id", "path", "server"),
    *("chardev", "nr", "name", "controller", "wait", "port", "host", "size", "on", "off", "a"),
    *("=", ",", ",,", "0", "1", "0x7f", "65536", "\0", "\ud800", "ß", "\n", "/x", "backend"),
]
_options = st.text(max_size=30) | st.lists(st.sampled_from(_WORDS), max_size=12).map("".join)


def parse_or_where(*options: Any) -> tuple[Topology | None, str]:
    """What ``parse`` makes of the options, or the place that its error names."""
    try:
        return parse(*options), ""
    except ConfigError as error:
        return None, error.where


@given(st.lists(_options, max_size=2), st.lists(_options, max_size=2), st.integers(-2, 600))
def test_any_strings_give_a_topology_or_a_clear_error(
    chardevs: list[str], ports: list[str], max_ports: int
) -> None:
    topology, where = parse_or_where(["null,id=ok", *chardevs], ["chardev=ok"], ports, max_ports)
    if topology is None:
        assert where.startswith(("--chardev", "--port", "--console", "--max-ports"))
    else:
        assert ports_of(topology)


@given(_options)
def test_any_chardev_alone(text: str) -> None:
    """As above, with nothing before it that could fail first."""
    topology, where = parse_or_where([f"socket,id=a,{text}"], ["chardev=a"])
    if topology is None:
        assert where.startswith("--chardev")
    else:
        assert ports_of(topology)[0].chardev.id == "a"
