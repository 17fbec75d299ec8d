"""Bytes a second between the embedded guest and host ends of ``vring serve`` in another process.

A round moves TOTAL bytes through one port, in writes of 32 KiB (what Linux writes at once) or of
1 MiB. It ends when the last of them are in the ring, or the guest has read them.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from vring_serial import EmbeddedGuest

TOTAL = 256 << 20


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """The backend's socket. Port 1 discards, port 2 has /dev/zero, port 3 a process that reads."""
    directory = tmp_path_factory.mktemp("bench")
    sink = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
    sink += "while s.recv(1 << 18): pass"
    command = [sys.executable, "-m", "vring_serial", "serve", "--log-level", "error"]
    command += ["--vhost-user", f"{directory}/vu"]
    chardevs = {
        "discard": "null,id=discard",
        "zeros": "file,id=zeros,path=/dev/null,input-path=/dev/zero",
        "socket": f"socket,id=socket,path={directory}/socket,server=on,wait=off",
    }
    for nr, (name, chardev) in enumerate(chardevs.items(), 1):
        command += ["--chardev", chardev, "--port", f"chardev={name},nr={nr},name={name}"]
    with subprocess.Popen(command) as serve:
        while not (directory / "vu").exists():
            time.sleep(0.01)
        with subprocess.Popen([sys.executable, "-c", sink, f"{directory}/socket"]) as reader:
            yield str(directory / "vu")
            serve.terminate()
            serve.wait()
            reader.wait()


@pytest.fixture
def run(device):
    """Runs coroutine functions of a port's streams in one event loop, whose guest goes on."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def in_loop(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    guests = []
    kept = []

    def start(name, **options):
        async def begin():
            guest = EmbeddedGuest(device, **options)
            guests.append(guest)
            await guest.start()
            port = await guest.wait_port(name=name)
            await port.wait_host()
            return await port.open()

        streams = in_loop(begin())
        kept.append(streams)
        return lambda transfer, *arguments: in_loop(transfer(*streams, *arguments))

    yield start
    for guest in guests:
        in_loop(guest.aclose())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def note(benchmark):
    benchmark.extra_info["GB/s"] = round(TOTAL / benchmark.stats["min"] / 1e9, 2)


async def write(reader, writer, size):
    data = bytes(size)
    for _ in range(TOTAL // size):
        writer.write(data)
        await writer.drain()


async def read(reader, writer):
    left = TOTAL
    while left:
        left -= len(await reader.read(min(left, 1 << 18)))


@pytest.mark.parametrize("size", [32 << 10, 1 << 20], ids=["32K", "1M"])
@pytest.mark.parametrize("port", ["discard", "socket"])
def test_guest_to_host(benchmark, run, port, size):
    transfer = run(port)
    benchmark.pedantic(transfer, (write, size), rounds=5, warmup_rounds=1)
    note(benchmark)


@pytest.mark.parametrize("receive_size", [4 << 10, 64 << 10], ids=["4K", "64K"])
def test_host_to_guest(benchmark, run, receive_size):
    transfer = run("zeros", receive_size=receive_size)
    benchmark.pedantic(transfer, (read,), rounds=5, warmup_rounds=1)
    note(benchmark)
