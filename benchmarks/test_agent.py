"""Agent messages at 2 KiB chunks, and files to the embedded guest's agent: payload a second."""

from __future__ import annotations

import asyncio
import socket

import pytest

from vring_serial.agent import HostAgent
from vring_serial.guest.agent import GuestAgent
from vring_serial.proto.agent import NEED_DATA, AgentConnection, Clipboard, FileXferData, Side

FILE_DATA = FileXferData(1, bytes(64 << 10))
CLIPBOARD = Clipboard(0, 1, bytes(16 << 20))
READ = 64 << 10


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
            while connection.next_event() is not NEED_DATA:
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
            await host.close()
            await guest.close()

        runner.run(connect())
        benchmark.pedantic(lambda: runner.run(host.send_file(path)), rounds=5)
        runner.run(close())
    note(benchmark, size)
