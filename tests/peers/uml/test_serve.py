"""``vring serve`` as a process of its own, driven by a real Linux kernel."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

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
        await guest.stop()
        if process.returncode is None:
            process.kill()
        await process.wait()
