"""`vring libvirt` as a command, and `vring serve` with a domain that it converted."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
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


# --- the hook


class Hook:
    """libvirt's calls of the hook, for a converted domain that QEMU runs as this user."""

    def __init__(self, directory: Path) -> None:
        label = f"<seclabel model='dac'><label>+{os.getuid()}:+{os.getgid()}</label></seclabel>"
        self.xml = converted(directory).replace(b"</domain>", f"{label}</domain>".encode())
        self.sockets = directory / "vm"
        self.log = directory / "log" / "vm.log"

    def call(
        self, *words: str, options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[bytes]:
        arguments = ("--log-directory", str(self.log.parent), *options, "--", "vm", *words, "-")
        return run("libvirt", "hook", *arguments, data=self.xml)


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[Hook]:
    hook = Hook(tmp_path)
    yield hook
    hook.call("release", "end")


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE)
        client.connect(str(path))


def runs(pid: str) -> bool:
    """Whether a process has not ended, also if nobody asked yet how."""
    try:
        state = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_the_service_lives_as_long_as_the_domain(hook: Hook) -> None:
    """It serves when the hook returns, starts anew if it outlived a domain, and leaves nothing."""
    begun = hook.call("prepare", "begin")
    assert (begun.returncode, begun.stdout, begun.stderr) == (0, b"", b""), hook.log.read_text()
    connect(hook.sockets / "device.sock")
    connect(hook.sockets / "vm.org.example.data")
    assert stat.S_IMODE((hook.sockets / "device.sock").stat().st_mode) == 0o660
    before = (hook.sockets / "device.pid").read_text()
    assert hook.call("prepare", "begin").returncode == 0
    after = (hook.sockets / "device.pid").read_text()
    assert after != before
    assert not runs(before)
    connect(hook.sockets / "device.sock")
    assert hook.call("release", "end").returncode == 0
    assert not runs(after)
    assert not hook.sockets.exists()
    assert hook.call("release", "end").returncode == 0


def test_the_service_is_upgraded(hook: Hook) -> None:
    """The hook that waited for READY=1 is gone by then, and its socket too."""
    assert hook.call("prepare", "begin").returncode == 0
    upgraded = run("upgrade", "--pid-file", str(hook.sockets / "device.pid"))
    assert upgraded.returncode == 0, upgraded.stderr
    connect(hook.sockets / "device.sock")
    assert hook.call("release", "end").returncode == 0
    assert not hook.sockets.exists()


def test_a_copy_of_the_domain_leaves_the_service_alone(hook: Hook) -> None:
    """It names the same sockets, and its start is refused; libvirt releases it then."""
    original = hook.xml
    assert hook.call("prepare", "begin").returncode == 0
    pid = (hook.sockets / "device.pid").read_text()
    hook.xml = original.replace(
        b"<name>", b"<uuid>2f1d1d4e-0000-4000-8000-000000000001</uuid><name>"
    )
    result = hook.call("prepare", "begin")
    assert result.returncode == 1
    assert b"device.sock serves the domain vm: a copy of a domain needs" in result.stderr
    assert hook.call("release", "end").returncode == 0
    assert runs(pid)
    connect(hook.sockets / "device.sock")
    hook.xml = original
    assert hook.call("release", "end").returncode == 0
    assert not hook.sockets.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only a superuser can become another user")
def test_a_service_that_became_another_user_leaves_nothing(hook: Hook) -> None:
    """It cannot remove its sockets then: the hook does."""
    hook.xml = re.sub(rb"<label>.*?</label>", b"<label>nobody:nogroup</label>", hook.xml)
    monitor = hook.sockets / "qmp"
    more = f"--serve=--qmp=unix:{monitor},server=on,wait=off"
    begun = hook.call("prepare", "begin", options=(more,))
    assert begun.returncode == 0, begun.stderr
    assert monitor.is_socket()
    assert hook.call("release", "end").returncode == 0
    assert not hook.sockets.exists()


def test_what_keeps_the_service_from_starting_is_said(hook: Hook) -> None:
    failed = hook.call("prepare", "begin", options=("--serve=--log-level=loud",))
    assert failed.returncode == 1
    assert failed.stderr.startswith(b"vring: vring serve did not start: vring serve: Invalid value")
    assert len(failed.stderr.splitlines()) == 1
    assert not (hook.sockets / "device.sock").exists()


@pytest.mark.parametrize("option", ["--no-keeper", "--descriptor-store"])
def test_the_service_has_a_keeper(hook: Hook, option: str) -> None:
    """What serves without one does not say when it serves."""
    result = hook.call("prepare", "begin", options=(f"--serve={option}",))
    assert result.returncode == 2
    assert f"{option}: the service that the hook starts has a keeper.".encode() in result.stderr


@pytest.mark.parametrize("operation", ["restore", "migrate"])
def test_a_state_that_cannot_be_restored(hook: Hook, operation: str) -> None:
    result = hook.call(operation, "begin")
    assert result.returncode == 1
    assert b"vm: its state cannot be restored" in result.stderr


@pytest.mark.parametrize(
    "words", [("start", "begin"), ("started", "begin"), ("stopped", "end"), ("reconnect", "begin")]
)
def test_other_operations(hook: Hook, words: tuple[str, str]) -> None:
    result = hook.call(*words)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert not hook.sockets.exists()


def test_other_domains(hook: Hook) -> None:
    hook.xml = DOMAIN
    result = hook.call("prepare", "begin")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert not hook.log.exists()


def test_a_label_that_is_none(hook: Hook) -> None:
    hook.xml = re.sub(rb"<label>.*?</label>", b"<label>root</label>", hook.xml)
    result = hook.call("prepare", "begin")
    assert result.returncode == 2
    assert b"<label>: it is no user and group" in result.stderr


def test_the_example_calls_it_for_what_it_is_for(tmp_path: Path) -> None:
    """Other operations cost libvirt no Python."""
    command = tmp_path / "vring"
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)
    said = []
    for words in (("prepare", "begin"), ("start", "begin"), ("release", "end"), ("stopped", "end")):
        result = subprocess.run(
            [EXAMPLES / "libvirt" / "qemu", "vm", *words, "-"],
            env={"PATH": f"{tmp_path}:{os.defpath}"},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        said.append(result.stdout)
    prefix = "libvirt hook -- vm"
    assert said == [f"{prefix} prepare begin -\n", "", f"{prefix} release end -\n", ""]
