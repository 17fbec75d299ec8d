"""`vring libvirt` as a command, and `vring serve` with a domain that it converted."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.examples import EXAMPLES
from tests.support.served import Serve
from tests.support.waiting import DEADLINE

VRING = (sys.executable, "-m", "vring_serial")
CHANNEL = "<channel type='unix'><target type='virtio' name='org.example.data'/></channel>"
DOMAIN = (
    "<domain type='kvm'><name>vm</name><memory>65536</memory><os><type machine='q35'>hvm</type>"
    f"</os><devices>{CHANNEL}</devices></domain>"
).encode()


def run(*arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*VRING, *arguments], input=data, capture_output=True, timeout=60, check=False
    )


def converted(directory: Path) -> bytes:
    result = run("libvirt", "convert", "--directory", str(directory), data=DOMAIN)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_there_and_back() -> None:
    before = (EXAMPLES / "desktop.xml").read_bytes()
    there = run("libvirt", "convert", data=before)
    assert there.returncode == 0
    assert b"<console> in line 26 moves to vring" in there.stderr
    back = run("libvirt", "convert", "--revert", data=there.stdout)
    assert (back.returncode, back.stdout) == (0, before)
    assert back.stderr == b"the domain is what it was, to the letter\n"


@pytest.mark.parametrize(
    ("arguments", "data", "why"),
    [
        ((), b"<domain/>", "vring: standard input:1: <domain>: <name> is missing"),
        (("--revert",), DOMAIN, "vring: standard input:1: <domain>: it was not converted"),
        (("--revert", "--spice"), DOMAIN, "--spice is for converting, not for --revert."),
        (("--directory", "/" + "d" * 100), DOMAIN, "vring: --directory: socket path /ddd"),
    ],
)
def test_refused(arguments: tuple[str, ...], data: bytes, why: str) -> None:
    result = run("libvirt", "convert", *arguments, data=data)
    assert result.returncode == 2
    assert result.stdout == b""
    assert why in result.stderr.decode()
    assert len(result.stderr.splitlines()) == 1


def test_converted_again(tmp_path: Path) -> None:
    result = run("libvirt", "convert", data=converted(tmp_path))
    assert result.returncode == 2
    assert b"it is converted already" in result.stderr


async def test_it_is_served_where_it_says(serve: Serve, tmp_path: Path) -> None:
    """Without --vfio-user; the channel's socket is beside the device's."""
    (tmp_path / "vm").mkdir()
    (tmp_path / "new.xml").write_bytes(converted(tmp_path))
    async with serve("--domain", "new.xml", elsewhere=True):
        for name in ("device.sock", "vm.org.example.data"):
            async with asyncio.timeout(DEADLINE):
                _, writer = await asyncio.open_unix_connection(tmp_path / "vm" / name)
            writer.close()
            await writer.wait_closed()


def test_standard_input(tmp_path: Path) -> None:
    shown = run("config", "show", "--domain", "-", data=converted(tmp_path))
    assert shown.returncode == 0, shown.stderr
    text = shown.stdout.decode()
    assert f"vfio-user = {json.dumps(str(tmp_path / 'vm' / 'device.sock'))}" in text
    assert f"path = {json.dumps(str(tmp_path / 'vm' / 'vm.org.example.data'))}" in text


def test_a_domain_that_names_no_socket() -> None:
    result = run("serve", "--domain", "-", data=DOMAIN)
    assert result.returncode == 2
    assert b"Missing option '--vhost-user' or '--vfio-user'. The domain was not" in result.stderr
