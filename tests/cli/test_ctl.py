"""`vring ctl` against a running service: what it shows, changes, and how it fails."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.commands import run_vring
from tests.support.keeper import kept, socket_ports
from vring_serial import EmbeddedGuest

QMP = ("--qmp", "unix:qmp,server=on,wait=off")


@pytest.fixture(autouse=True)
def short_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("VRING_QMP", raising=False)


async def start(*arguments, address="qmp", **options):
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vring_serial", "ctl", "--qmp", address, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


async def ctl(*arguments, address="qmp"):
    """Status, output and errors of one command."""
    return await run_vring("ctl", "--qmp", address, *arguments)


async def completed(before, word):
    """What the shell is told of a line that ends in ``word``."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vring_serial"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={
            **os.environ,
            "_VRING_COMPLETE": "bash_complete",
            "COMP_LINE": f"vring {before} {word}",
            "COMP_WORD": word,
        },
    )
    out, err = await process.communicate()
    assert err == b""
    return out.decode().split()


@asynccontextmanager
async def service(tmp_path, *arguments):
    async with kept(tmp_path, *socket_ports([1, 2]), *QMP, *arguments) as keeper:
        await keeper.logged("QMP at")
        yield keeper


@asynccontextmanager
async def traffic():
    """A guest that has sent 1000 bytes through port 1, with its client."""
    async with EmbeddedGuest("v", memory=32 << 20) as guest:
        port = await guest.wait_port(nr=1)
        reader, writer = await asyncio.open_unix_connection("c1")
        await port.wait_host()
        _, back = await port.open()
        back.write(b"x" * 1000)
        assert await reader.readexactly(1000) == b"x" * 1000
        yield reader, back
        back.close()
        writer.close()


async def test_tables_fit_80_columns_and_json_has_it_all(tmp_path):
    async with service(tmp_path), traffic():
        for command in ("status", "ports", "top"):
            arguments = (command, "-n", "1", "--interval", "0.1") if command == "top" else [command]
            status, out, err = await ctl(*arguments)
            assert (status, err) == (0, "")
            assert out.endswith("\n")
            assert max(map(len, out.splitlines())) <= 80
            assert "connected" in out or "org.example.data1" in out
        _, out, _ = await ctl("ports")
        row = next(line for line in out.splitlines() if "data1" in line)
        assert "open" in row
        assert "1.0K" in row or "1000" in row
        _, out, _ = await ctl("--json", "status")
        assert json.loads(out)[0]["controllers"][0]["frontend"] is True
        for verb in ("add", "change"):  # at the start alone, and not left out in silence
            status, _, err = await ctl("chardev", verb, "null,id=y,mux=on")
            assert status == 2
            assert "mux=on cannot be made while the service runs" in err
        _, out, _ = await ctl("--json", "ports")
        assert {p["nr"]: p["out"]["bytes"] for p in json.loads(out)} == {1: 1000, 2: 0}


async def test_top_shows_what_moves_now(tmp_path):
    async with service(tmp_path), traffic() as (reader, back):
        process = await start("--json", "top", "--interval", "0.2")
        assert process.stdout is not None
        await process.stdout.readline()  # it has looked once
        back.write(b"x" * 5000)
        await reader.readexactly(5000)
        moved = 0.0
        while not moved:
            line = json.loads(await process.stdout.readline())
            moved = line["out_bytes_per_s"] if line["nr"] == 1 else 0
        process.send_signal(signal.SIGINT)
        await process.communicate()
        assert process.returncode == 130


async def test_events_are_followed_until_the_service_stops(tmp_path):
    async with service(tmp_path) as keeper:
        process = await start("events", "--json")
        assert process.stdout is not None
        # It says nothing when it listens: guests come until one is noticed.
        line = asyncio.create_task(process.stdout.readline())
        while not line.done():
            async with traffic():
                pass
        assert json.loads(line.result())["event"] in ("VSERPORT_CHANGE", "X_VRING_FRONTEND")
        keeper.process.send_signal(signal.SIGTERM)
        rest = (await process.stdout.read()).decode().splitlines()
        assert json.loads(rest[-1])["event"] == "SHUTDOWN"
        assert await process.wait() == 0


async def test_a_peer_is_sent_away(tmp_path):
    async with service(tmp_path):
        reader, writer = await asyncio.open_unix_connection("c1")
        while (await ctl("--json", "ports"))[1].count("disconnected:") == 2:
            pass
        assert await ctl("disconnect", "c1") == (0, "", "")
        assert await reader.read() == b""
        writer.close()


async def test_a_worker_is_replaced(tmp_path):
    async with service(tmp_path) as keeper, traffic():
        for number, arguments in enumerate(([], ["vring"]), 1):
            worker = keeper.worker
            assert await ctl("restart", *arguments) == (0, "", "")
            assert keeper.worker != worker
            (vm,) = json.loads((await ctl("--json", "status"))[1])
            assert vm["restarts"] == number
            assert vm["controllers"][0]["frontend"]
        assert await ctl("restart", "nobody") == (4, "", "vring: VM 'nobody' not found\n")
        process = await start("events")
        assert process.stdout is not None
        told = asyncio.create_task(process.stdout.readuntil(b" reason=replaced\n"))
        while not told.done():  # it says nothing when it listens
            await ctl("restart")
        assert b" X_VRING_WORKER vm=vring restarts=" in told.result()
        process.send_signal(signal.SIGINT)
        await process.communicate()


LATE = """
[vm.late]
vhost-user = "w"
[vm.late.chardev.c]
backend = "null"
[[vm.late.port]]
chardev = "c"
name = "org.example.late"
"""


async def test_vms_come_and_go(tmp_path):
    Path("late.toml").write_text(LATE)
    Path("two.toml").write_text(LATE + LATE.replace("late", "later").replace('"w"', '"w2"'))
    Path("bad.toml").write_text(LATE + "shoes = 1\n")
    async with service(tmp_path):
        assert await ctl("vm", "add", "late.toml") == (0, "", "")
        assert await ctl("vm", "add", "two.toml", "later") == (0, "", "")
        _, out, _ = await ctl("--json", "status")
        assert [vm["name"] for vm in json.loads(out)] == ["vring", "late", "later"]
        status, out, _ = await ctl("ports")
        assert (status, "org.example.later" in out) == (0, True)
        assert (await ctl("vm", "add", "late.toml"))[0] == 5
        assert (await ctl("vm", "add", "two.toml"))[2] == (
            "vring: two.toml: give the name of one: late, later\n"
        )
        status, _, err = await ctl("vm", "add", "two.toml", "latest")
        assert (status, "there is no VM latest" in err) == (2, True)
        status, _, err = await ctl("vm", "add", "bad.toml")
        assert (status, "bad.toml:9: vm.late.port[1].shoes" in err) == (2, True)
        for name in ("late", "later"):
            assert await ctl("vm", "remove", name) == (0, "", "")
        assert await ctl("vm", "remove", "late") == (4, "", "vring: VM 'late' not found\n")
        assert not {"w", "w2"} & set(os.listdir())


async def test_of_several_vms_the_name_says_whose_a_port_is(tmp_path):
    Path("late.toml").write_text(LATE)
    async with service(tmp_path):
        assert await ctl("vm", "add", "late.toml") == (0, "", "")
        assert await ctl("chardev", "add", "null,id=late/n") == (0, "", "")
        assert await ctl("chardev", "change", "ringbuf,id=late/n") == (0, "", "")
        assert await ctl("port", "add", "chardev=late/n,nr=5,name=org.example.n") == (0, "", "")
        _, out, _ = await ctl("--json", "ports")
        found = {(port["vm"], port["nr"]): port["filename"] for port in json.loads(out)}
        assert found["late", 5] == "ringbuf"
        assert ("vring", 5) not in found
        assert await ctl("port", "remove", "late/n") == (0, "", "")
        assert await ctl("chardev", "remove", "late/n") == (0, "", "")
        for id in ("late/", "late/n m", "late/n/"):
            status, _, err = await ctl("chardev", "add", f"null,id={id}")
            assert (status, "is no id" in err) == (2, True)


async def test_exit_statuses_tell_failures_apart(tmp_path):
    async with service(tmp_path) as keeper:
        status, _, err = await ctl("disconnect", "c3")
        assert status == 4
        assert "there is no chardev or controller 'c3'; known: c1, c2, virtio-serial0" in err
        status, _, err = await ctl("disconnect", "c2")
        assert (status, err) == (5, "vring: 'c2' has nobody connected\n")
        status, _, err = await ctl("status", address="nowhere")
        assert (status, err) == (3, "vring: no server at nowhere: No such file or directory\n")
        status, _, err = await ctl("log-level", "loud")
        assert status == 2
        monitor = keeper.monitor
        os.kill(monitor, signal.SIGSTOP)
        try:
            status, _, err = await ctl("--timeout", "0.3", "status")
            assert (status, "did not answer in 0.3 s" in err) == (6, True)
        finally:
            os.kill(monitor, signal.SIGCONT)
    process = await start("status", address="qmp")
    _, err = await process.communicate()
    assert process.returncode == 3
    status, _, err = await ctl("--timeout", "1", "status", address="")
    assert status == 2


async def test_names_of_files_cannot_forge_output(tmp_path):
    arguments = ["--chardev", "file,id=f,path=a\x1b[2Jb", "--port", "chardev=f,nr=5"]
    async with service(tmp_path, *arguments):
        _, out, _ = await ctl("ports")
        assert "\x1b" not in out
        assert "a\\x1b[2Jb" in out


async def test_names_are_completed(tmp_path):
    async with service(tmp_path):
        assert await completed("ctl --qmp qmp disconnect", "c") == ["c1", "c2"]
        assert await completed("ctl --qmp qmp port remove", "") == ["c1", "c2"]
        assert await completed("ctl --qmp qmp port add", "chardev=") == ["chardev=c1", "chardev=c2"]
        assert await completed("ctl --qmp qmp chardev change", "null,id=") == [
            "null,id=c1",
            "null,id=c2",
        ]
        assert await completed("ctl --qmp qmp restart", "") == ["vring"]
        # One without a port, which alone can be removed.
        assert await ctl("chardev", "add", "null,id=c3") == (0, "", "")
        assert await completed("ctl --qmp qmp chardev remove", "") == ["c1", "c2", "c3"]
    # Nobody is there any more, and nobody wants to know.
    assert await completed("ctl --qmp qmp chardev remove", "") == []


async def test_ports_and_host_ends_come_and_go(tmp_path):
    async with service(tmp_path, "--reach", str(tmp_path)):
        assert await ctl("chardev", "add", "socket,id=n,path=n,server=on") == (0, "", "")
        assert await ctl("port", "add", "chardev=n,nr=5,name=org.example.new") == (0, "", "")
        async with EmbeddedGuest("v", memory=32 << 20) as guest:
            port = await guest.wait_port(name="org.example.new")
            reader, writer = await asyncio.open_unix_connection("n")
            await port.wait_host()
            _, back = await port.open()
            back.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            assert await ctl("chardev", "change", "ringbuf,id=n") == (0, "", "")
            assert await reader.read() == b""
            assert await ctl("port", "remove", "n") == (0, "", "")
            writer.close()
        assert await ctl("chardev", "remove", "n") == (0, "", "")
        status, out, _ = await ctl("chardev", "add", "pty,id=t")
        assert status == 0
        assert out.startswith("/dev/pts/")
        status, _, err = await ctl("port", "remove", "n")
        assert (status, err) == (4, "vring: Device 'n' not found\n")
        status, _, err = await ctl("chardev", "remove", "c1")
        assert (status, err) == (5, "vring: Chardev 'c1' is busy\n")
        for words in (["port", "add", "nr=5"], ["port", "add", "x=1"], ["chardev", "add", "foo"]):
            assert (await ctl(*words))[0] == 2
