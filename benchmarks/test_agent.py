"""Framing and parsing of agent messages at 2 KiB chunks, in bytes of payload a second."""

from __future__ import annotations

import pytest

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
