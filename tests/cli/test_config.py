"""``vring config`` and ``vring serve --config``: several VMs in one service."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.examples import EXAMPLES
from tests.support.served import Serve, close, connect, guest_of
from vring_serial.chardev import LogOptions
from vring_serial.cli import vring
from vring_serial.config import toml_file

TWO = "".join(
    f"""
[vm.{name}]
vhost-user = "{name}"
chardev.data = {{ backend = "socket", path = "{name}.data", server = true, wait = false }}
port = [{{ chardev = "data", name = "org.example.data" }}]
"""
    for name in "ab"
)


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "two.toml").write_text(TWO)
    return str(tmp_path / "two.toml")


async def exchange(directory: Path, name: str) -> None:
    """Bytes both ways through a VM's port, which has the name that the other's has."""
    async with guest_of(directory / name) as guest:
        port = await guest.wait_port(name="org.example.data")
        from_guest, to_guest = await connect(directory / f"{name}.data")
        await port.wait_host()
        reader, writer = await port.open()
        writer.write(name.encode() * 3)
        assert await from_guest.readexactly(3) == name.encode() * 3
        to_guest.write(b"back")
        assert await reader.readexactly(4) == b"back"
        writer.close()
        await close(to_guest)


@pytest.mark.parametrize(
    ("how", "workers"),
    [((), 2), (("--workers", "shared"), 1), (("--no-keeper",), 0)],
    ids=["a worker for each", "one for all", "no keeper"],
)
async def test_two_machines_in_one_service(
    serve: Serve, tmp_path: Path, file: str, how: tuple[str, ...], workers: int
) -> None:
    options = ("--chardev", "null,id=n", "--port", "chardev=n,name=org.example.data")
    config = ("--config", file, *(("--vhost-user", "v", *options) if workers == 0 else ()))
    async with serve(*config, *how, ready="b: virtio-serial0: 1 of 31") as server:
        await server.logged("serving;", max(workers, 1))
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        assert len(children) == workers
        await asyncio.gather(exchange(tmp_path, "a"), exchange(tmp_path, "b"))
        for name in "ab":
            await server.logged(f" {name}: virtio-serial0: port 1 (org.example.data): opened by")
            await server.logged(f" {name}: chardev data: peer left")
        if workers == 0:
            await server.logged(" vring: virtio-serial0: 1 of 31 ports, on v")
        assert await server.stop() == 0
    assert os.listdir(tmp_path) == ["two.toml"]


async def test_json_says_which_machine(serve: Serve, tmp_path: Path, file: str) -> None:
    async with serve("--config", file, "--json-log", ready="serving;") as server:
        await server.logged("serving;", 2)
        assert await server.stop() == 0
    lines = [json.loads(line) for line in server.lines]
    ports = {(line["vm"], line["end"]) for line in lines if line["event"] == "port"}
    assert ports == {("a", "unix:a.data (server)"), ("b", "unix:b.data (server)")}


async def test_one_dies_and_the_other_does_not_notice(
    serve: Serve, tmp_path: Path, file: str
) -> None:
    async with serve("--config", file, "--pid-file", "pid") as server:
        await server.logged("serving;", 2)
        line = next(line for line in server.lines if " a: serving;" in line)
        assert "SIGINT" in line
        pids = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        os.kill(int(pids[0]), signal.SIGKILL)
        await server.logged("a: its worker ended by SIGKILL")
        await server.logged("serving;", 3)
        await asyncio.gather(exchange(tmp_path, "a"), exchange(tmp_path, "b"))
        now = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        assert pids[1] in now
        assert await server.stop() == 0
    assert sorted(os.listdir(tmp_path)) == ["two.toml"]


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(vring, list(arguments))
    assert "Traceback" not in result.output
    return result.exit_code, result.stdout, result.stderr


def test_a_file_is_checked(file: str) -> None:
    assert run("config", "check", file) == (
        0,
        "a: 1 ports, vhost-user a\nb: 1 ports, vhost-user b\n",
        "",
    )
    Path(file).write_text(TWO + 'user = "nobody at all"\n')
    status, _, error = run("config", "check", file)
    assert (status, error) == (
        2,
        f"vring: {file}:11: vm.b.user: there is no user nobody at all\n",
    )
    status, _, error = run("config", "check", "none.toml")
    assert (status, error) == (1, "vring: none.toml: No such file or directory\n")


def test_what_would_be_served_is_shown_and_can_be_served(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = ("--domain", str(EXAMPLES / "desktop.xml"), "--vfio-user", "v", "--packed")
    more = ("--config", file, "--name", "third", "--log-file", "l", "--workers", "shared")
    log = ("--chardev", "null,id=log,logfile=c,logsize=4K,nologappend", "--port", "chardev=log")
    more = (*more, *log)
    status, text, _ = run("config", "show", *domain, *more)
    assert status == 0
    service = toml_file.parse(text.encode())
    assert [vm.name for vm in service.vms] == ["a", "b", "third"]
    assert (service.vms[2].packed, service.log_file, service.workers) == (True, "l", "shared")
    logs = [port.chardev.log for port in service.vms[2].topology.controllers[0].ports]
    assert LogOptions(logfile="c", logsize=4096) in logs
    monkeypatch.chdir(tmp_path)
    Path("shown").write_text(text)
    assert run("config", "show", "--config", "shown") == (0, text, "")


def test_a_file_on_standard_input() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vring_serial", "config", "show", "--config", "-"],
        input="worker = 1",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("vring: standard input:1: worker: there is no such key; ")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--packed",), "--packed is of a VM of its own, which needs --vhost-user or"),
        (("--chardev", "null,id=n"), "--chardev is of a VM of its own"),
        (("--name", "x"), "--name is of a VM of its own"),
        (
            ("--vhost-user", "x", "--chardev", "null,id=n", "--port", "chardev=n", "--name", "a"),
            "--name: there is a VM a already (",
        ),
        (
            ("--vhost-user", "a", "--chardev", "null,id=n", "--port", "chardev=n"),
            "--vhost-user a: the path is in use already (",
        ),
        (
            (
                *("--vhost-user", "x", "--chardev", "null,id=n", "--port", "chardev=n"),
                *("--sandbox", "off", "--workers", "shared"),
            ),
            "--sandbox: differs from that of a, in one process",
        ),
    ],
)
def test_options_that_do_not_go_with_a_file(
    file: str, arguments: tuple[str, ...], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VRING_SANDBOX", raising=False)
    status, _, error = run("serve", "--config", file, *arguments)
    assert status == 2
    assert why in error
    assert error.count("\n") == 1


def test_a_file_without_machines(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    status, _, error = run("serve", "--config", str(tmp_path / "empty"))
    assert (status, "declares no VM" in error) == (2, True)
