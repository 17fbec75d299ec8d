"""README's Python runs as it stands, with a guest."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

from tests.support.processes import running
from tests.support.waiting import until
from vring_serial import BackendClosedError, EmbeddedGuest, GuestAgent, Monitor

README = Path(__file__).parents[1] / "README.md"
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def listens(path: Path) -> bool:
    """Return whether somebody accepts at a unix socket's path, without connecting to it."""
    for line in Path("/proc/net/unix").read_text().splitlines():
        fields = line.split()
        if fields[-1] == str(path) and int(fields[3], 16) & 0x10000:  # __SO_ACCEPTCON
            return True
    return False


async def test_the_example_with_a_guest(tmp_path: Path) -> None:
    path = tmp_path / "vring.sock"
    example = EXAMPLE.replace("/tmp/vring.sock", str(path))
    command = (sys.executable, "-W", "error", "-c", example)
    async with running(*command, stderr=asyncio.subprocess.PIPE) as process:
        await until(lambda: listens(path), "the example does not listen")
        agent = GuestAgent()
        async with EmbeddedGuest(str(path), memory=32 << 20) as guest:
            port = await guest.wait_port(name="com.redhat.spice.0")
            with pytest.raises(BackendClosedError):  # the example ends, and its device with it
                await agent.run(*await port.open())
        _, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")
    assert agent.monitors == (Monitor(1920, 1080),)
