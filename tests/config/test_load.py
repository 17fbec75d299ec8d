from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.examples import EXAMPLES
from vring_serial.config.load import load_topology
from vring_serial.config.qemu_options import QemuOptions
from vring_serial.errors import ConfigError

DOMAIN = str(EXAMPLES / "spice-agent.xml")


def test_options_add_to_a_domain() -> None:
    options = QemuOptions(
        chardevs=["pty,id=con", "null,id=bulk"], ports=["chardev=bulk"], consoles=["chardev=con"]
    )
    (controller,) = load_topology(DOMAIN, options).controllers
    assert str(controller.address) == "0000:00:05.0"
    assert [(port.nr, port.chardev.id) for port in controller.ports] == [
        (0, "con"),
        (1, "channel0"),
        (2, "bulk"),
    ]


def test_domain_and_options_cannot_have_one_number() -> None:
    options = QemuOptions(chardevs=["null,id=x"], ports=["chardev=x,nr=1"])
    with pytest.raises(ConfigError) as caught:
        load_topology(DOMAIN, options)
    assert str(caught.value) == (
        "--port chardev=x,nr=1: port number 1 of controller 0 is taken already "
        f"({DOMAIN}:8: <channel>)"
    )


def test_domain_and_options_cannot_have_one_chardev_id() -> None:
    options = QemuOptions(chardevs=["null,id=channel0"], ports=["chardev=channel0"])
    with pytest.raises(ConfigError, match="chardev id 'channel0' is taken already"):
        load_topology(DOMAIN, options)


def test_max_ports_is_for_controllers_that_do_not_say(tmp_path: Path) -> None:
    path = tmp_path / "domain.xml"
    path.write_text(
        "<domain><devices><controller type='virtio-serial' index='0' ports='4'/>"
        "<controller type='virtio-serial' index='1'/></devices></domain>"
    )
    topology = load_topology(str(path), QemuOptions(max_ports=9))
    assert [controller.max_ports for controller in topology.controllers] == [4, 9]


def test_options_alone_have_no_addresses() -> None:
    options = QemuOptions(chardevs=["null,id=x"], ports=["chardev=x"])
    (controller,) = load_topology(options=options).controllers
    assert controller.address is None


def test_nothing() -> None:
    with pytest.raises(ConfigError, match="nothing to serve"):
        load_topology()
