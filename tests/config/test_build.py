from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.examples import EXAMPLES
from vring_serial.chardev.null import NullChardev
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.chardev.socket import SocketChardev
from vring_serial.config import build
from vring_serial.config.domain_xml import load
from vring_serial.config.qemu_options import parse
from vring_serial.config.topology import PortConfig
from vring_serial.device.console.events import DriverReady
from vring_serial.errors import ConfigError, ResourceError

DOMAIN = str(EXAMPLES / "spice-agent.xml")


def test_a_controller_with_its_ports() -> None:
    topology = parse(
        ["null,id=a", "socket,id=b,path=/x,server,nowait"],
        ports=["chardev=b,nr=3,name=org.example"],
        consoles=["chardev=a"],
        max_ports=5,
    )
    controller = build.make_controller(topology.controllers[0])
    assert (controller.name, controller.max_ports) == ("virtio-serial0", 5)
    console, port = controller.ports[0], controller.ports[3]
    assert (console.console, console.name) == (True, b"")
    assert isinstance(console.chardev, NullChardev)
    assert (port.console, port.name) == (False, b"org.example")
    assert isinstance(port.chardev, SocketChardev)
    assert port.chardev.id == "b"


def test_every_kind_can_be_made() -> None:
    topology = parse(
        [
            *("null,id=c0", "pty,id=c1", "stdio,id=c2", "ringbuf,id=c3", "file,id=c4,path=/f"),
            *("pipe,id=c5,path=/p", "socket,id=c6,path=/s", "socket,id=c7,host=h,port=1"),
        ],
        [f"chardev=c{i}" for i in range(8)],
    )
    ports = build.make_controller(topology.controllers[0]).ports
    assert [port.chardev.id for port in ports.values()] == [f"c{i}" for i in range(8)]


def test_python_code_behind_a_port() -> None:
    asked: list[PortConfig] = []

    def choose(port: PortConfig) -> build.ProtocolFactory:
        asked.append(port)
        return asyncio.Protocol

    (config,) = load(DOMAIN).controllers
    controller = build.make_controller(config, protocol_factories={"spicevmc": choose})
    assert asked == list(config.ports)
    assert isinstance(controller.ports[1].chardev, ProtocolChardev)


def test_spicevmc_without_code_names_the_place() -> None:
    (config,) = load(DOMAIN).controllers
    with pytest.raises(ConfigError, match=r"spice-agent\.xml:8: <channel>: .*spicevmc"):
        build.make_controller(config)


async def test_a_controller_that_was_made_can_be_started_and_stopped(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    topology = parse([f"socket,id=a,path={path},server,nowait"], ["chardev=a"])
    controller = build.make_controller(topology.controllers[0])
    events: list[object] = []
    controller.on_event = events.append
    await controller.start()
    assert path.is_socket()
    other = build.make_controller(topology.controllers[0])
    with pytest.raises(ResourceError, match=str(path)):
        await other.start()
    await controller.aclose()
    assert not path.exists()
    assert DriverReady() not in events
