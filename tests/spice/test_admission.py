"""Connections to the SPICE server that say nothing: few of them, and not for long."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess

import pytest

from tests.support.waiting import until
from vring_serial import SpiceOptions, accept
from vring_serial.spice import admission
from vring_serial.spice.server import SpiceServer

DEADLINE = 20.0


@pytest.fixture(params=["plain", "tls"])
async def server(request, tmp_path):
    """A server, and where its clients connect."""
    options = {"addr": "127.0.0.1", "disable_ticketing": True}
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    if request.param == "tls":
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
             "-subj", "/CN=localhost", "-keyout", "server-key.pem", "-out", "server-cert.pem"],
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip
        (tmp_path / "ca-cert.pem").write_bytes((tmp_path / "server-cert.pem").read_bytes())
        options |= {"tls_port": port, "x509_dir": str(tmp_path)}
    else:
        options |= {"port": port}
    server = SpiceServer(SpiceOptions(**options))
    await server.start()
    yield server, port
    await server.aclose()


async def ended(reader):
    async with asyncio.timeout(DEADLINE):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


async def known(server, count):
    """Wait until the server has accepted so many."""
    await until(lambda: server.unauthenticated >= count)


async def close(*writers):
    for writer in writers:
        writer.close()
    await asyncio.gather(*(w.wait_closed() for w in writers), return_exceptions=True)


async def test_one_more_than_the_most_ends_the_oldest(server, monkeypatch, caplog):
    monkeypatch.setattr(admission, "UNAUTHENTICATED_MAX", 3)
    caplog.set_level(logging.INFO, "vring_serial")
    server, port = server
    streams = []
    for count in range(1, 4):
        streams.append(await asyncio.open_connection("127.0.0.1", port))
        await known(server, count)
    streams.append(await asyncio.open_connection("127.0.0.1", port))
    await ended(streams[0][0])
    assert [reader.at_eof() for reader, _ in streams] == [True, False, False, False]
    assert "3 others wait" in caplog.text
    await close(*(writer for _, writer in streams))


async def test_who_says_nothing_is_cut_off_in_time(server, clock, caplog):
    caplog.set_level(logging.INFO, "vring_serial")
    server, port = server
    silent = await asyncio.open_connection("127.0.0.1", port)
    slow = await asyncio.open_connection("127.0.0.1", port)
    slow[1].write(b"RED")
    await known(server, 2)
    await clock.forward(admission.HANDSHAKE_SECONDS)
    await ended(silent[0])
    await ended(slow[0])
    assert (
        f"did not authenticate is cut off: {admission.HANDSHAKE_SECONDS:g} s are over"
        in caplog.text
    )
    assert server.unauthenticated == 0
    await close(silent[1], slow[1])


async def test_a_number_that_is_used_again_is_a_new_connection(server):
    """Connections come and go on the same descriptor; each has its time, and none is forgotten."""
    server, port = server
    for _ in range(5):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        await known(server, 1)
        writer.close()
        await until(lambda: not server.unauthenticated)
        await close(writer)


async def test_out_of_descriptors(server, out_of_descriptors, clock, caplog):
    """Also where the library accepts itself, and would do nothing else."""
    server, port = server
    with socket.socket() as client:
        with out_of_descriptors():
            client.connect(("127.0.0.1", port))
            await until(lambda: "cannot accept" in caplog.text)
        await clock.forward(accept.PAUSE)
        await known(server, 1)
    lines = [record.getMessage() for record in caplog.records]
    assert sum("cannot accept a client: Too many open files" in line for line in lines) == 1
    assert not [line for line in lines if "spice-server" in line]
