"""``vring serve`` where descriptors run out."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
from pathlib import Path

import pytest

from tests.support.served import TIMEOUT, Serve, close, connect, guest_of
from vring_serial.spice import admission

SOCKET_PORT = ("--chardev", "socket,id=a,path=a,server=on,wait=off", "--port", "chardev=a,nr=2")


@pytest.mark.peer("libspice-server.so.1")
async def test_idle_clients_of_the_spice_server_keep_no_frontend_out(
    serve: Serve, tmp_path: Path
) -> None:
    spice = ("--spice", "port=5930,autoport=on,addr=127.0.0.1,disable-ticketing=on")
    agent = ("--chardev", "spicevmc,id=c", "--port", "chardev=c,nr=1,name=com.redhat.spice.0")
    idle = [socket.socket() for _ in range(300)]
    try:
        async with serve(*spice, *agent, *SOCKET_PORT) as server:
            address = (await server.logged("clients connect to")).rpartition(" ")[2]
            host, _, port = address.rpartition(":")
            # Fewer than there are idle clients, and enough for a guest's 64 queues.
            resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (256, 256))
            for sock in idle:
                sock.setblocking(False)
                sock.connect_ex((host, int(port)))
            await server.logged("did not authenticate")
            async with guest_of(tmp_path / "v") as guest, asyncio.timeout(TIMEOUT):
                _, writer = await connect(tmp_path / "a")
                opened = await guest.wait_port(nr=2)
                await opened.wait_host()
                reader, _ = await opened.open()
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
                await close(writer)
            held = len(os.listdir(f"/proc/{server.pid}/fd"))
            assert held < 30 + 2 * admission.UNAUTHENTICATED_MAX
            assert await server.stop(signal.SIGTERM) == 0
    finally:
        for sock in idle:
            sock.close()
