"""The command lines in the documentation are accepted as they stand."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from vring_serial.cli.serve import serve_command
from vring_serial.config import toml_file
from vring_serial.config.load import load_topology
from vring_serial.config.qemu_options import QemuOptions
from vring_serial.config.vms import check_vms

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "docs/configuration.md",
    "docs/spice.md",
    "docs/qemu.md",
    "docs/libvirt.md",
    "docs/management.md",
    "docs/console.md",
]


def commands() -> list[str]:
    """Every indented `vring serve` of the pages, with its continuation lines."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text().replace("\\\n", " ")
        for line in text.splitlines():
            if line.startswith("    ") and "vring serve --" in line:
                found.append(line[line.index("vring serve --") :])
    return found


def test_there_are_some() -> None:
    assert len(commands()) >= 3


@pytest.mark.parametrize("command", commands())
def test_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)[2:]
    words = words[: words.index("&")] if "&" in words else words
    given = serve_command.make_context("serve", words).params
    if given["domain"] == "-" or given["config"]:
        return  # what the reader's virsh says, and the reader's file
    keys = ("chardevs", "ports", "consoles", "max_ports", "spice")
    options = QemuOptions(*(given[key] for key in keys))
    topology = load_topology(given["domain"], options)
    assert len(topology.controllers) == len(given["sockets"] or given["vfio_sockets"])


def test_the_file_of_the_documentation() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    example = text.split("```toml\n")[1].split("```")[0]
    domain = str(ROOT / "examples/two-controllers.xml")
    service = toml_file.parse(example.replace("/etc/vring/server.xml", domain).encode())
    check_vms(service.vms)
    assert [len(vm.topology.controllers) for vm in service.vms] == [1, 2]
