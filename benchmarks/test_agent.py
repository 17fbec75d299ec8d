"""Agent messages at 2 KiB chunks, and files to agents: payload a second.

A file goes to the embedded guest's agent within one process, from a process with the device to the
guest's over vhost-user, and with ``vring agent send`` through ``vring serve --agent-socket``, which
makes three; and to the real spice-vdagent over the socket that it has for a port.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import vdagent
from vring_serial import HostAgent
from vring_serial.agent.guest import AGENT_PORT, GuestAgent
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.proto.agent import AgentConnection, Clipboard, FileXferData, Side
from vring_serial.transport.vhost_user.backend import VhostUserBackend

FILE_DATA = FileXferData(1, bytes(64 << 10))
CLIPBOARD = Clipboard(0, 1, bytes(16 << 20))
READ = 64 << 10
FILE = 256 << 20
VRING = [sys.executable, "-m", "vring_serial"]


def note(benchmark, size):
    benchmark.extra_info["GB/s"] = round(size / benchmark.stats["min"] / 1e9, 2)


@pytest.mark.parametrize("message", [FILE_DATA, CLIPBOARD], ids=["file-data", "clipboard"])
def test_framing(benchmark, message):
    connection = AgentConnection(Side.HOST)
    benchmark(connection.send, message)
    note(benchmark, len(message.data))


@pytest.mark.parametrize("message", [FILE_DATA, CLIPBOARD], ids=["file-data", "clipboard"])
def test_parsing(benchmark, message):
    size = 16 << 20
    wire = AgentConnection(Side.HOST).send(message) * (size // len(message.data))
    reads = [wire[at : at + READ] for at in range(0, len(wire), READ)]
    connection = AgentConnection(Side.GUEST)

    def parse():
        for read in reads:
            connection.receive_data(read)
            while connection.next_event() is not None:
                pass

    benchmark(parse)
    note(benchmark, size)


def test_file_to_the_embedded_agent(benchmark, tmp_path):
    """Both ends in one process and one loop: half of what two of them reach."""
    size = 64 << 20
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    host = HostAgent()
    guest = GuestAgent(downloads=tmp_path / "in")

    with asyncio.Runner() as runner:

        async def connect():
            ours, theirs = socket.socketpair()
            loop = asyncio.get_running_loop()
            await loop.create_connection(guest.protocol_factory, sock=theirs)
            await loop.create_connection(host.protocol_factory, sock=ours)
            await host.wait_ready()

        async def close():
            await host.aclose()
            await guest.aclose()

        runner.run(connect())
        benchmark.pedantic(lambda: runner.run(host.send_file(path)), rounds=5)
        runner.run(close())
    note(benchmark, size)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory with a file to send and one for downloads."""
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    (directory / "in").mkdir()
    (directory / "file").write_bytes(bytes(FILE))
    yield directory
    shutil.rmtree(directory)


@contextlib.contextmanager
def process(*command: object) -> Iterator[None]:
    child = subprocess.Popen([*VRING, *map(str, command), "--log-level", "error"])
    try:
        yield
    finally:
        child.send_signal(signal.SIGINT)
        child.wait()


def guest(directory: Path) -> contextlib.AbstractContextManager[None]:
    return process(
        "guest", "--vhost-user", directory / "v", "--agent", "--downloads", directory / "in"
    )


def arrived(directory: Path) -> None:
    """Forget the file, so that each round is like the one before."""
    (file,) = (directory / "in").iterdir()
    assert file.stat().st_size == FILE
    file.unlink()


def test_file_over_vhost_user(benchmark, memory):
    host = HostAgent(timeout=30)
    controller = Controller(max_ports=4)
    controller.add_port(Port(1, AGENT_PORT, ProtocolChardev("agent", host.protocol_factory)))
    with asyncio.Runner() as runner:
        backend = VhostUserBackend(controller, str(memory / "v"))

        async def start():
            await controller.start()
            await backend.start()

        async def stop():
            await host.aclose()
            await backend.aclose()
            await controller.aclose()

        runner.run(start())
        with guest(memory):
            runner.run(host.wait_ready())
            benchmark.pedantic(
                lambda: runner.run(host.send_file(memory / "file")),
                teardown=lambda: arrived(memory),
                rounds=7,
            )
            runner.run(stop())
    note(benchmark, FILE)


def test_file_with_the_command(benchmark, memory):
    """Starting the command is counted."""
    socket_path = memory / "a"
    serve = ("serve", "--vhost-user", memory / "v", "--chardev", "spicevmc,id=a")
    send = [*VRING, "agent", "--socket", socket_path, "send", "--quiet", memory / "file"]
    with process(*serve, "--port", "chardev=a", "--agent-socket", socket_path):
        while not (memory / "v").exists():
            time.sleep(0.05)
        with guest(memory):
            benchmark.pedantic(
                lambda: subprocess.run(send, check=True),
                teardown=lambda: arrived(memory),
                rounds=7,
            )
    note(benchmark, FILE)


@pytest.mark.skipif(
    shutil.which("spice-vdagent") is None, reason="spice-vdagent not installed: `make peers`"
)
@pytest.mark.parametrize("version", ["installed", "newer"])
def test_file_to_the_real_agent(benchmark, memory, version):
    root = vdagent.NEWER_ROOT if version == "newer" else None
    if root is not None and not root.exists():
        pytest.skip("`make peers-vdagent` brings it")
    host = HostAgent(timeout=30)

    with asyncio.Runner() as runner:
        session = vdagent.VdAgentSession(memory, root)

        async def start():
            await session.__aenter__()
            loop = asyncio.get_running_loop()
            server = await loop.create_unix_server(host.protocol_factory, str(session.port))
            await session.start()
            await host.wait_ready()
            return server

        async def stop(server):
            await host.aclose()
            await session.__aexit__(None, None, None)
            server.close()
            await server.wait_closed()

        def received():
            (file,) = session.downloads.iterdir()
            assert file.stat().st_size == FILE
            file.unlink()

        server = runner.run(start())
        benchmark.pedantic(
            lambda: runner.run(host.send_file(memory / "file")), teardown=received, rounds=5
        )
        runner.run(stop(server))
    note(benchmark, FILE)
