"""``vring serve`` as a process of its own, driven by a real Linux kernel."""

from __future__ import annotations

import asyncio
import os
import random
import select
import signal
import sys
import tty

import pytest

from tests.support.processes import end
from vring_serial.guest.uml import UmlGuest


async def read_until(stream, text):
    """Lines of a log up to the one that contains ``text``, which is returned."""
    while text not in (line := (await stream.readline()).decode()):
        assert line, f"the log ended without {text!r}"
    return line.rstrip()


async def test_options_as_in_the_readme(tmp_path):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vring_serial", "serve", "--vhost-user", "vring.sock"),
        *("--chardev", "socket,id=agent,path=agent.sock,server=on,wait=off"),
        *("--port", "chardev=agent,nr=1,name=com.redhat.spice.0"),
        *("--chardev", "pty,id=con", "--console", "chardev=con"),
        cwd=tmp_path,
        stderr=asyncio.subprocess.PIPE,
    )
    guest = UmlGuest([tmp_path / "vring.sock"])
    try:
        async with asyncio.timeout(60):
            console = await read_until(process.stderr, "console 0")
            await read_until(process.stderr, "serving;")
            terminal = os.open(console.rpartition("pty:")[2], os.O_RDWR | os.O_NOCTTY)
            await guest.start()
            await read_until(process.stderr, "port 0: opened by the guest")

            names = await guest.run("cat /sys/class/virtio-ports/vport0p1/name")
            assert names.output == "com.redhat.spice.0"

            reader, writer = await asyncio.open_unix_connection(tmp_path / "agent.sock")
            await guest.run("echo from the guest > /dev/vport0p1")
            assert await reader.readline() == b"from the guest\n"
            writer.write(b"from the host\n")
            assert (await guest.run("head -n 1 /dev/vport0p1")).output == "from the host"
            writer.close()
            await writer.wait_closed()

            await guest.run("echo login > /dev/hvc0")
            assert (await asyncio.to_thread(os.read, terminal, 100)).startswith(b"login")
            os.close(terminal)

            process.send_signal(signal.SIGTERM)  # while the guest runs
            assert await process.wait() == 0
        assert os.listdir(tmp_path) == []
    finally:
        await guest.aclose()
        await end(process)


@pytest.mark.parametrize("kind", ["pty", "stdio"])
async def test_all_of_a_long_console_output_reaches_a_terminal(tmp_path, kind):
    """Much more than a terminal takes at once, for a reader that is there all the time."""
    text = "".join(random.Random(3).choices("abcdefghijklmnop", k=100_000))
    master, slave = os.openpty()
    tty.setraw(slave)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vring_serial", "serve", "--vhost-user", "vring.sock"),
        *("--chardev", f"{kind},id=con", "--console", "chardev=con"),
        cwd=tmp_path,
        stdin=slave,
        stdout=slave,
        stderr=asyncio.subprocess.PIPE,
    )
    guest = UmlGuest([tmp_path / "vring.sock"])
    (guest.share / "text").write_text(text)

    def read_all():
        received = b""
        while len(received) < len(text):
            assert select.select([terminal], [], [], 20)[0], f"{len(received)} bytes, and no more"
            received += os.read(terminal, 65536)
        return received.decode()

    terminal = master
    try:
        async with asyncio.timeout(90):
            if kind == "pty":
                console = await read_until(process.stderr, "console 0")
                path = console.rpartition("pty:")[2]
                terminal = os.open(path, os.O_RDWR | os.O_NOCTTY)
            await read_until(process.stderr, "serving;")
            await guest.start()
            await read_until(process.stderr, "port 0: opened by the guest")
            reading = asyncio.create_task(asyncio.to_thread(read_all))
            await guest.run("cat /mnt/text > /dev/hvc0")
            assert await reading == text
            process.send_signal(signal.SIGTERM)
            log = await process.stderr.read()
            assert await process.wait() == 0
            assert b"dropped" not in log
    finally:
        await guest.aclose()
        await end(process)
        for fd in {master, slave, terminal}:
            os.close(fd)
