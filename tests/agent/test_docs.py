"""The examples of docs/agent.md, as they stand there."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

from tests.support.processes import running
from tests.support.waiting import DEADLINE, turns, until
from vring_serial import AgentGone, AgentReady, HostAgent
from vring_serial.agent.guest import GuestAgent
from vring_serial.proto.agent import Capability, Monitor

DOCUMENT = Path(__file__).parents[2] / "docs" / "agent.md"
SCRIPT, WATCH, PORT, SHARE = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.fixture
async def served(tmp_path):
    """A guest's agent behind a unix socket."""
    guest = GuestAgent(downloads=tmp_path / "downloads")
    path = str(tmp_path / "agent.sock")
    server = await asyncio.get_running_loop().create_unix_server(guest.protocol_factory, path)
    yield guest, path
    await guest.aclose()
    server.close()
    await server.wait_closed()


async def test_script(served, tmp_path):
    guest, path = served
    guest.set_clipboard("some words", 1)
    (tmp_path / "report.txt").write_text("all is well")
    async with running(
        *(sys.executable, "-c", SCRIPT.replace("/run/agent.sock", path)),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    ) as process:
        async with asyncio.timeout(DEADLINE):
            output, _ = await process.communicate()
    lines = output.decode().splitlines()
    assert process.returncode == 0, output
    assert "MONITORS_CONFIG" in lines[0]
    assert lines[-1] == "11 of 11 bytes sent"
    assert guest.monitors[1] == Monitor(1280, 1024, x=1920)
    assert (tmp_path / "downloads" / "report.txt").read_text() == "all is well"


async def test_watch(served, capsys):
    _, path = served
    names = {}
    exec(WATCH, names)
    agent = HostAgent()
    watching = asyncio.ensure_future(names["watch"](agent))
    await turns()
    loop = asyncio.get_running_loop()
    await loop.create_unix_connection(agent.protocol_factory, path)
    await agent.wait_ready()
    await agent.aclose()
    async with asyncio.timeout(30):
        await watching
    assert capsys.readouterr().out.splitlines()[-1] == "gone: in good order"


async def test_port():
    names = {}
    exec(PORT, names)
    port = names["agent_port"](HostAgent())
    assert (port.nr, port.name) == (1, b"com.redhat.spice.0")


async def test_share(served, tmp_path):
    _, path = served
    names = {}
    exec(SHARE, names)
    events = []
    agent = HostAgent(on_event=events.append)
    loop = asyncio.get_running_loop()
    async with names["shared"](path, str(tmp_path / "clients.sock")) as router:
        await loop.create_unix_connection(agent.protocol_factory, str(tmp_path / "clients.sock"))
        assert Capability.FILE_XFER_DISABLED in await agent.wait_ready()
        assert len(router.clients) == 1
    await until(lambda: isinstance(events[-1], AgentGone))
    assert isinstance(events[0], AgentReady)
