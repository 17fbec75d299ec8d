"""``vring serve`` as users run it: real processes, sockets, terminals, and the embedded guest."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.examples import EXAMPLES
from tests.support.served import NULL_PORT, TIMEOUT, Serve, close, connect, guest_of, listening
from tests.support.waiting import DEADLINE
from vring_serial.cli import vring
from vring_serial.guest.guest import EmbeddedGuest
from vring_serial.proto import vfio_user
from vring_serial.proto.vfio_user_regions import RegionIndex, RegionRead
from vring_serial.proto.vfio_user_version import Version
from vring_serial.proto.vfio_user_wire import IrqIndex, IrqInfo

#: What spice-vdagentd sends first: ANNOUNCE_CAPABILITIES, request 1 (recorded).
AGENT_HELLO = bytes.fromhex(
    "010000001c000000 0100000006000000 0000000000000000 08000000 01000000 e78d0300"
)


# --- the main job


async def test_a_domain_with_the_agent_channel(serve: Serve, tmp_path: Path) -> None:
    async with serve("--domain", str(EXAMPLES / "spice-agent.xml")) as server:
        assert "0000:00:05.0" in await server.logged("on v")
        async with guest_of(tmp_path / "v") as guest, asyncio.timeout(TIMEOUT):
            port = await guest.wait_port(name="com.redhat.spice.0")
            assert port.nr == 1
            await port.wait_host()
            reader, writer = await port.open()
            hello = await reader.readexactly(28)
            assert hello[:4] == b"\x01\0\0\0"  # a chunk of the client's port
            assert hello[12:16] == b"\x06\0\0\0"  # ANNOUNCE_CAPABILITIES
            writer.write(AGENT_HELLO)
            ready = await server.logged("agent of port 1: ready, with ")
            assert "MONITORS_CONFIG" in ready
            assert "CLIPBOARD_BY_DEMAND" in ready
            writer.close()
        for what in ("frontend connected", "the driver accepted", "the driver is ready"):
            await server.logged(what)
        await server.logged("port 1 (com.redhat.spice.0): opened by the guest")
        await server.logged("port 1 (com.redhat.spice.0): closed by the guest")
        await server.logged("frontend gone")
        assert await server.stop() == 0
    assert os.listdir(tmp_path) == []


async def test_options_with_a_socket_and_a_console(serve: Serve, tmp_path: Path) -> None:
    arguments = (
        *("--chardev", "socket,id=agent,path=agent.sock,server=on,wait=off"),
        *("--port", "chardev=agent,nr=1,name=com.redhat.spice.0"),
        *("--chardev", "pty,id=con", "--console", "chardev=con"),
    )
    async with serve(*arguments) as server:
        terminal = (await server.logged("console 0")).rpartition("pty:")[2]
        async with guest_of(tmp_path / "v") as guest, asyncio.timeout(TIMEOUT):
            await both_ways(await connect(tmp_path / "agent.sock"), guest, 1)
            descriptor = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
            try:
                console = await guest.wait_port(nr=0)
                await server.logged("port 0: opened by the host")  # until then nobody reads it
                assert console.is_console
                _, to_host = await console.open()
                to_host.write(b"login: ")
                assert await asyncio.to_thread(os.read, descriptor, 100) == b"login: "
                to_host.close()
            finally:
                os.close(descriptor)
        assert await server.stop(signal.SIGINT) == 0
    assert os.listdir(tmp_path) == []


async def both_ways(
    host: tuple[asyncio.StreamReader, asyncio.StreamWriter], guest: EmbeddedGuest, nr: int
) -> None:
    """A few bytes from the guest to the host and back."""
    port = await guest.wait_port(nr=nr)
    await port.wait_host()
    reader, writer = await port.open()
    writer.write(b"from the guest")
    assert await host[0].readexactly(14) == b"from the guest"
    host[1].write(b"from the host")
    assert await reader.readexactly(13) == b"from the host"
    writer.close()
    await close(host[1])


async def test_one_frontend_after_another(serve: Serve, tmp_path: Path) -> None:
    async with serve("--chardev", "socket,id=a,path=a,server,nowait", "--port", "chardev=a") as s:
        for count in (1, 2):
            async with guest_of(tmp_path / "v") as guest, asyncio.timeout(TIMEOUT):
                await both_ways(await connect(tmp_path / "a"), guest, 1)
            await s.logged("frontend gone", count)
        assert await s.stop() == 0


async def test_garbage_does_not_keep_the_next_frontend_out(serve: Serve, tmp_path: Path) -> None:
    async with serve("--chardev", "socket,id=a,path=a,server,nowait", "--port", "chardev=a") as s:
        _, writer = await connect(tmp_path / "v")
        writer.write(b"GET / HTTP/1.1\r\n\r\n" * 100)
        await s.logged("connection closed")
        await s.logged("frontend gone")
        await close(writer)
        async with guest_of(tmp_path / "v") as guest, asyncio.timeout(TIMEOUT):
            await both_ways(await connect(tmp_path / "a"), guest, 1)
        assert await s.stop() == 0


async def test_an_agent_chunk_of_4_gib(serve: Serve, tmp_path: Path) -> None:
    """That agent's session ends with a reason; the other port and the next session go on."""
    other = ("--chardev", "socket,id=a,path=a,server,nowait", "--port", "chardev=a,nr=2")
    domain = str(EXAMPLES / "spice-agent.xml")
    async with (
        serve("--domain", domain, *other) as server,
        guest_of(tmp_path / "v") as guest,
        asyncio.timeout(TIMEOUT),
    ):
        port = await guest.wait_port(nr=1)
        await port.wait_host()
        reader, writer = await port.open()
        writer.write(bytes.fromhex("01000000 ffffffff"))
        assert "4294967295" in await server.logged("agent of port 1: gone")
        await both_ways(await connect(tmp_path / "a"), guest, 2)
        writer.close()
        await port.wait_host()
        reader, writer = await port.open()
        await reader.readexactly(28)
        writer.write(AGENT_HELLO)
        await server.logged("agent of port 1: ready, with ")
        writer.close()


async def test_two_controllers(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "domain.xml"
    domain = (EXAMPLES / "two-controllers.xml").read_text()
    path.write_text(domain.replace("/run/two-controllers.bulk", "bulk"))
    async with serve("--vhost-user", "a", "--vhost-user", "b", "--domain", "domain.xml") as server:
        async with guest_of(tmp_path / "a") as one, guest_of(tmp_path / "b") as two:
            assert (await one.wait_port(nr=1)).name == "com.redhat.spice.0"
            async with asyncio.timeout(TIMEOUT):
                await both_ways(await connect(tmp_path / "bulk"), two, 1)
            assert (await two.wait_port(nr=2)).name == "org.example.telemetry"
        assert await server.stop() == 0
    assert os.listdir(tmp_path) == ["domain.xml"]


async def test_a_channel_without_path_is_beside_the_first_socket(
    serve: Serve, tmp_path: Path
) -> None:
    os.mkdir(tmp_path / "run")
    domain = str(EXAMPLES / "desktop.xml")
    async with serve("--vhost-user", "run/v", "--domain", domain) as server:
        await server.logged("left to the emulator: <serial> in line 20")
        await close((await connect(tmp_path / "run" / "desktop.org.qemu.guest_agent.0"))[1])
        assert await server.stop() == 0
    assert os.listdir(tmp_path / "run") == []


async def test_connecting_to_a_frontend_that_listens(serve: Serve, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "v"))
        listener.listen()
        listener.setblocking(False)
        async with serve("--connect", *NULL_PORT) as server, asyncio.timeout(TIMEOUT):
            frontend, _ = await asyncio.get_running_loop().sock_accept(listener)
            with frontend:
                await server.logged("frontend connected")
                assert await server.stop() == 0
                assert await asyncio.get_running_loop().sock_recv(frontend, 1) == b""
    assert (tmp_path / "v").exists()  # the frontend's own


# --- start, stop, log


async def test_what_a_death_of_a_worker_does_to_host_ends_is_said_at_the_start(
    serve: Serve,
) -> None:
    arguments = ["--chardev", "console,id=con,path=con", "--console", "chardev=con"]
    arguments += ["--chardev", "ringbuf,id=ring", "--port", "chardev=ring"]
    arguments += ["--chardev", "socket,id=sock,path=s,server=on,wait=off", "--port", "chardev=sock"]
    async with serve(*arguments) as server:
        said = [line for line in server.lines if "when a worker dies" in line]
        assert await server.stop() == 0
    assert len(said) == 2
    assert "bytes on their way may be lost: ring (ringbuf)" in said[0]
    assert "whoever watches is cut off, and connects again: con (console)" in said[1]


async def test_json_log(serve: Serve, tmp_path: Path) -> None:
    arguments = ("--json-log", "--domain", str(EXAMPLES / "spice-agent.xml"))
    async with serve(*arguments, ready='"event": "serving"') as server:
        async with guest_of(tmp_path / "v") as guest:
            await guest.wait_port(nr=1)
        await server.logged('"state": "gone"')
        assert await server.stop() == 0
        records = [json.loads(line) for line in server.lines]
    assert all(
        {"time", "level", "logger", "event", "message"} <= record.keys() for record in records
    )
    events = [record["event"] for record in records if record["event"] != "log"]
    assert events[:5] == ["port_added", "port_opened", "sandbox", "port", "controller"]
    assert events[5:7] == ["restart_noticed", "serving"]
    assert [e for e in events if e in ("frontend", "features_negotiated", "driver_ready")] == [
        "frontend",
        "features_negotiated",
        "driver_ready",
        "frontend",
    ]
    assert events[-3:] == ["stopping", "port_closed", "stopped"]
    (controller,) = (record for record in records if record["event"] == "controller")
    assert (controller["address"], controller["socket"]) == ("0000:00:05.0", "v")


async def test_log_level(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "v"
    arguments = ("--vhost-user", str(path), "--log-level", "warning", *NULL_PORT)
    async with serve(*arguments, ready="") as server:
        await listening(path)
        async with guest_of(path) as guest:
            await guest.wait_port(nr=1)
        assert await server.stop() == 0
        assert server.lines == []


async def test_pid_file(serve: Serve, tmp_path: Path) -> None:
    async with serve("--pid-file", "pid", *NULL_PORT) as server:
        assert (tmp_path / "pid").read_text() == f"{server.pid}\n"
        assert await server.stop() == 0
    assert os.listdir(tmp_path) == []


async def test_what_a_killed_process_left_is_replaced(serve: Serve, tmp_path: Path) -> None:
    async with serve("--pid-file", "pid", *NULL_PORT) as server:
        await server.kill()
    assert sorted(os.listdir(tmp_path)) == ["pid", "v"]
    async with serve("--pid-file", "pid", *NULL_PORT) as server:
        async with serve("--pid-file", "pid", *NULL_PORT, ready="") as other:
            assert await other.exit_status() == 1
            assert other.lines == [
                f"vring: --pid-file pid: exists, process {server.pid} is running"
            ]
        async with serve(*NULL_PORT, ready="") as other:
            assert await other.exit_status() == 1
            assert other.lines[-1] == "vring: v: exists, another process listens on it"
        assert await server.stop() == 0
    assert os.listdir(tmp_path) == []


async def test_waiting_for_a_client(serve: Serve, tmp_path: Path) -> None:
    """wait=on, QEMU's default: no frontend is served before the first client is there."""
    arguments = ("--chardev", "socket,id=a,path=a,server=on", "--port", "chardev=a")
    async with serve(*arguments, ready="waiting for a client") as server:
        assert not (tmp_path / "v").exists()
        _, writer = await connect(tmp_path / "a")
        await server.logged("serving;")
        await close(writer)
        assert await server.stop() == 0
    async with serve(*arguments, ready="waiting for a client") as server:
        assert await server.stop() == 0  # also while it waits
    assert os.listdir(tmp_path) == []


async def test_a_pci_function_over_vfio_user(serve: Serve, tmp_path: Path) -> None:
    async with serve("--vfio-user", "v", "--transitional", *NULL_PORT) as server:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "v")
        identifiers = RegionRead(0, RegionIndex.CONFIG, 4)
        writer.write(vfio_user.request(vfio_user.Command.VERSION, 1, Version()))
        writer.write(vfio_user.request(vfio_user.Command.REGION_READ, 2, identifiers))
        async with asyncio.timeout(DEADLINE):
            answers = await reader.readexactly(16 + 4 + 16 + 16 + 4)
        assert answers[-4:] == bytes.fromhex("f41a0310")
        assert await server.stop() == 0
        assert not (tmp_path / "v").exists()
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(("option", "vectors"), [((), 65), (("--vectors", "3"), 3)])
async def test_the_size_of_the_msix_table(
    serve: Serve, tmp_path: Path, option: tuple[str, ...], vectors: int
) -> None:
    async with serve("--vfio-user", "v", *option, *NULL_PORT) as server:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "v")
        writer.write(vfio_user.request(vfio_user.Command.VERSION, 1, Version()))
        asked = vfio_user.request(vfio_user.Command.DEVICE_GET_IRQ_INFO, 2, IrqInfo(IrqIndex.MSIX))
        writer.write(asked)
        async with asyncio.timeout(DEADLINE):
            answers = await reader.readexactly(16 + 4 + 16 + 16)
        assert int.from_bytes(answers[-4:], "little") == vectors
        assert await server.stop() == 0
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("way", ["--vhost-user", "--vfio-user"])
async def test_an_address_is_said_to_be_asked_for(serve: Serve, way: str) -> None:
    """Where the guest sees the controller is the emulator's to decide."""
    async with serve(way, "v", "--domain", str(EXAMPLES / "spice-agent.xml")) as server:
        line = await server.logged("on v")
        assert re.search(r": 1 of \d+ ports, 0000:00:05\.0 asked for, on v$", line), line
        assert await server.stop() == 0


@pytest.mark.parametrize(
    ("domain", "said"),
    [
        ("<domain", "vring: standard input:1: not XML: "),
        ("<domain><devices><channel type='none'/></devices></domain>", "vring: standard input:1: "),
    ],
)
def test_a_domain_on_standard_input_is_called_so(domain: str, said: str) -> None:
    done = subprocess.run(
        (sys.executable, "-m", "vring_serial", "serve", "--vhost-user", "v", "--domain", "-"),
        input=domain,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(said)


@pytest.mark.parametrize("sockets", [("none/v", "w"), ("v", "none/w"), ("v", "domain.xml")])
async def test_no_port_is_reported_before_all_sockets_are_there(
    serve: Serve, tmp_path: Path, sockets: tuple[str, str]
) -> None:
    path = tmp_path / "domain.xml"
    domain = (EXAMPLES / "two-controllers.xml").read_text()
    path.write_text(domain.replace("/run/two-controllers.bulk", "bulk"))
    arguments = (*("--vhost-user", sockets[0]), *("--vhost-user", sockets[1]))
    async with serve(*arguments, "--domain", str(path), ready="") as server:
        assert await server.exit_status() == 1
        assert not [line for line in server.lines if ": port " in line or " asked for" in line]
        (line,) = server.lines
        assert line.startswith(f"vring: {sockets[0] if 'none' in sockets[0] else sockets[1]}: ")


# --- what cannot be served


MISSING_SOCKET = (
    "vring serve: Missing option '--vhost-user' or '--vfio-user'. (see vring serve --help)"
)


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (NULL_PORT, 2, MISSING_SOCKET),
        (
            ("--vhost-user", "v", "--vfio-user", "w", *NULL_PORT),
            2,
            "vring serve: Give either --vhost-user or --vfio-user, and not both. "
            "(see vring serve --help)",
        ),
        (
            ("--vhost-user", "v", "--transitional", *NULL_PORT),
            2,
            "vring serve: --transitional is for --vfio-user. (see vring serve --help)",
        ),
        (
            ("--vhost-user", "v", "--vectors", "0", *NULL_PORT),
            2,
            "vring serve: --vectors is for --vfio-user. (see vring serve --help)",
        ),
        (
            ("--vfio-user", "v", "--vectors", "2049", *NULL_PORT),
            2,
            "vring: --vfio-user v: 2049 MSI-X vectors, at most 2048 are possible",
        ),
        (
            ("--vfio-user", "v", "--connect", *NULL_PORT),
            2,
            "vring serve: --connect is for --vhost-user. (see vring serve --help)",
        ),
        (
            ("--vfio-user", "v", "--vfio-user", "w", *NULL_PORT),
            2,
            "vring: --vfio-user: 2 given, 1 needed: one for each of virtio-serial0 "
            "(1 of 31 ports), in this order",
        ),
        (
            ("--vhost-user", "v"),
            2,
            "vring serve: Nothing to serve: give --domain, or --chardev and --port. "
            "(see vring serve --help)",
        ),
        (
            ("--vhost-user", "v", *NULL_PORT, "--log-level", "loud"),
            2,
            "vring serve: Invalid value for '--log-level': 'loud' is not one of 'debug', 'info', "
            "'warning', 'error'. (see vring serve --help)",
        ),
        (
            ("--vhost-user", "v", "--port", "chardev=n"),
            2,
            "vring: --port chardev=n: no --chardev has id=n",
        ),
        (
            ("--vhost-user", "v", "--vhost-user", "w", *NULL_PORT),
            2,
            "vring: --vhost-user: 2 given, 1 needed: one for each of virtio-serial0 "
            "(1 of 31 ports), in this order",
        ),
        (
            ("--vhost-user", "v", "--domain", str(EXAMPLES / "two-controllers.xml")),
            2,
            "vring: --vhost-user: 1 given, 2 needed: one for each of virtio-serial0 "
            "(1 of 4 ports, 0000:00:05.0 asked for), virtio-serial1 "
            "(2 of 32 ports, 0000:00:06.0 asked for), "
            "in this order",
        ),
        (
            (
                "--vhost-user",
                "x",
                "--chardev",
                "socket,id=n,path=./x,server",
                "--port",
                "chardev=n",
            ),
            2,
            "vring: --vhost-user x: the path is in use already "
            "(--chardev socket,id=n,path=./x,server)",
        ),
        (
            ("--vhost-user", "v" * 108, *NULL_PORT),
            2,
            f"vring: --vhost-user {'v' * 108}: socket path {'v' * 108} has 108 bytes; "
            "a unix socket's has 1 to 107",
        ),
        (
            ("--vhost-user", "v", *NULL_PORT, "--max-ports", "128"),
            2,
            "vring: --vhost-user v: the device has 258 queues, vhost-user allows 256",
        ),
    ],
)
def test_what_cannot_be_asked_for(arguments: tuple[str, ...], status: int, line: str) -> None:
    result = CliRunner().invoke(vring, ["serve", "--no-keeper", *arguments])
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (status, line)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (NULL_PORT, "vring: v: "),
        (("--vhost-user", "none/v", *NULL_PORT), "vring: none/v: "),
        (("--vhost-user", "w", "--domain", "none.xml"), "vring: none.xml: No such file"),
        (
            (
                *("--vhost-user", "w", "--chardev", "socket,id=a,path=v,server,nowait"),
                *("--port", "chardev=a"),
            ),
            "vring: chardev a: ",
        ),
        (
            ("--vhost-user", "w", "--chardev", "pipe,id=a,path=none", "--port", "chardev=a"),
            "vring: chardev a: ",
        ),
        (
            ("--vhost-user", "w", "--pid-file", "v", *NULL_PORT),
            "vring: --pid-file v: exists and holds no process id",
        ),
        (
            ("--vhost-user", "w", "--pid-file", "none/pid", *NULL_PORT),
            "vring: --pid-file none/pid: No such file or directory",
        ),
    ],
)
async def test_what_the_system_refuses(
    serve: Serve, tmp_path: Path, arguments: tuple[str, ...], line: str
) -> None:
    """Status 1, one line that names it, and nothing of ours stays behind."""
    (tmp_path / "v").write_text("somebody's")
    made_first = ("--chardev", "socket,id=first,path=first,server,nowait")
    async with serve(*arguments, *made_first, "--port", "chardev=first", ready="") as server:
        assert await server.exit_status() == 1
        assert server.lines[-1].startswith(line)
        assert not any("Traceback" in line for line in server.lines)
    assert os.listdir(tmp_path) == ["v"]
    assert (tmp_path / "v").read_text() == "somebody's"
