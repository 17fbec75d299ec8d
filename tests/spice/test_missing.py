"""Without the library: one line that names the package, and everything else as it was."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys

import pytest

from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.cli.spice_end import SpiceEnds, _ClientLog
from vring_serial.config import domain_xml
from vring_serial.config.build import make_controller
from vring_serial.config.qemu_options import parse
from vring_serial.errors import DependencyError
from vring_serial.spice import library
from vring_serial.spice.core import ClientEvent

DOMAIN = b"""<domain><devices><graphics type='spice' autoport='yes'/>
<channel type='spicevmc'><target type='virtio'/></channel>
<channel type='spiceport'><source channel='org.example.0'/>
<target type='virtio' name='org.example.0'/></channel></devices></domain>"""


@pytest.fixture(autouse=True)
def not_loaded():
    """Each test loads the library, or fails to, for the first time."""
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(library, "SONAME", "libspice-server.so.is-not-there")


def test_the_line_names_the_package(no_library):
    with pytest.raises(DependencyError, match="Debian's package libspice-server1 brings it"):
        library.load()


def test_the_line_names_cffi(monkeypatch):
    monkeypatch.setitem(sys.modules, "cffi", None)
    with pytest.raises(DependencyError, match="python3-cffi"):
        library.load()


@pytest.mark.peer("libspice-server.so.1")
def test_a_process_without_memory_to_write_and_execute_is_told_so():
    """As systemd's MemoryDenyWriteExecute= leaves it."""
    program = """
import ctypes, sys
from vring_serial.errors import ResourceError
from vring_serial.spice import library
PR_SET_MDWE, REFUSE_EXEC_GAIN = 65, 1
if ctypes.CDLL(None).prctl(PR_SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0):
    sys.exit("this kernel has no PR_SET_MDWE")
try:
    library.load()
except ResourceError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    if "PR_SET_MDWE" in done.stderr:
        pytest.skip("this kernel has no PR_SET_MDWE (Linux 6.3)")
    assert "systemd: MemoryDenyWriteExecute=no" in done.stdout, done.stderr


def test_an_option_needs_the_library(no_library):
    topology = parse(["spicevmc,id=a"], ["chardev=a"], spice="port=5930,disable-ticketing=on")
    with pytest.raises(DependencyError, match="libspice-server1"):
        SpiceEnds(topology)


async def test_a_domain_is_served_without_it(no_library, capfd):
    topology = domain_xml.parse(DOMAIN)
    ends = SpiceEnds(topology)
    await ends.start()
    (config,) = topology.controllers
    controller = make_controller(
        config,
        protocol_factories={"spicevmc": lambda port: asyncio.Protocol},
        chardev_makers=ends.makers,
    )
    await controller.start()
    agent, port = (controller.ports[nr].chardev for nr in (1, 2))
    assert isinstance(agent, ProtocolChardev)
    assert agent.end is not None
    assert port.end is None
    assert port.description == "no SPICE server"
    await controller.aclose()
    await ends.aclose()


def test_the_agent_may_be_shared_with_the_server():
    text = "port=5930,disable-ticketing=on"
    topology = parse(["spicevmc,id=a"], ["chardev=a"], spice=text)
    alone, sharing = SpiceEnds(topology), SpiceEnds(topology, agent_shared=True)
    assert "spicevmc" in alone.makers
    assert alone.agent_device() is None
    # The port's end is then the router's, and the server is a client of that.
    assert "spicevmc" not in sharing.makers
    assert sharing.agent_device() is not None


async def test_a_domain_without_ports_for_it_needs_no_server(no_library):
    topology = domain_xml.parse(
        b"<domain><devices><graphics type='spice'/><channel type='pty'>"
        b"<target type='virtio'/></channel></devices></domain>"
    )
    ends = SpiceEnds(topology)
    assert ends.makers.keys() == {"spiceport"}


def test_clients_that_come_and_go_in_a_loop_are_counted(caplog):
    with caplog.at_level(logging.INFO, "vring_serial.cli"):
        on_client = _ClientLog()
        for number in range(500):
            on_client(ClientEvent("127.0.0.1:7", True, connected=not number % 2))
    assert 2 <= len(caplog.records) <= 20
    first = caplog.records[0]
    assert first.getMessage() == "SPICE: client 127.0.0.1:7 connected with TLS"
    assert (first.event, first.fields["tls"]) == ("spice_client_connected", True)
