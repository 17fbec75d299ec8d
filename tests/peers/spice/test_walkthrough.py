"""The walk-through in docs/spice.md, to the letter, and ``vring serve`` with a stock client."""

from __future__ import annotations

import asyncio
import re
import sys
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.processes import running

ROOT = Path(__file__).parents[3]
VRING = (sys.executable, "-m", "vring_serial")

DOMAIN = """<domain><name>guest</name><devices>
<graphics type='spice' port='{port}' autoport='no' passwd='hush'>
  <listen type='address' address='127.0.0.1'/><filetransfer enable='no'/>
</graphics>
<channel type='spicevmc'><target type='virtio'/></channel>
</devices></domain>"""


@asynccontextmanager
async def serving(directory, *options):
    """A ``vring serve`` on the socket ``v``, killed unless the test has ended it."""
    command = (*VRING, "serve", "--vhost-user", "v", *options)
    async with running(*command, cwd=directory, stderr=asyncio.subprocess.PIPE) as server:
        yield server


def agent_in_guest(directory):
    """An embedded guest with an agent, on that socket."""
    command = (*VRING, "guest", "--vhost-user", "v", "--agent", "--log-level", "error")
    return running(*command, cwd=directory)


def commands():
    """The walk-through's commands, one a line."""
    text = (ROOT / "docs" / "spice.md").read_text()
    found = re.search(r"<!-- walk-through -->(.*)<!-- end -->", text, re.DOTALL)
    assert found is not None
    return [line.strip() for line in found[1].splitlines() if line.strip()]


async def test_the_walkthrough(tmp_path):
    lines = commands()
    assert len(lines) < 10
    assert lines[0].startswith("sudo apt-get install")
    assert lines[1] == "make build"
    # Both are done already where a test runs; the checkout is made up of what the others use.
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name in ("README.md", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = "\n".join(["set -em", *lines[2:], "wait"])
    async with running(
        *("bash", "-c", script),
        cwd=tmp_path,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        async with asyncio.timeout(50):
            output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert b"sent: README.md" in output
    assert (tmp_path / "downloads" / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()


async def test_a_domain_brings_its_server(tmp_path, client_process, unused_port):
    (tmp_path / "domain.xml").write_text(DOMAIN.format(port=unused_port))
    log = []

    async def logged(text):
        async with asyncio.timeout(20):
            while not log or text not in log[-1]:
                line = (await server.stderr.readline()).decode()
                assert line, "".join(log)
                log.append(line)

    async with serving(tmp_path, "--domain", "domain.xml") as server:
        await logged(f"SPICE: clients connect to 127.0.0.1:{unused_port}")
        await logged("serving")
        async with agent_in_guest(tmp_path) as guest:
            client_process.do(
                "connect", {"host": "127.0.0.1", "port": str(unused_port), "password": "hush"}
            )
            await logged("connected")
            capabilities = await client_process.wait_agent()
            assert capabilities >> 13 & 1  # files are disabled
            client_process.do("grab", 0, "through all of it")
            # The embedded guest's desk selects what it pastes.
            assert await client_process.wait("grabbed", 1) == [[1]]
            assert await client_process.receive(1) == b"through all of it"
            server.terminate()
            await client_process.wait("channel-event", "MainChannel")
            await logged("stopped")
            await guest.wait()
        assert await server.wait() == 0
    assert not [line for line in log if "Traceback" in line or "warning" in line]


async def test_a_client_and_the_command_share_the_agent(tmp_path, client_process, unused_port):
    options = (
        *("--chardev", "spicevmc,id=agent", "--port", "chardev=agent", "--agent-socket", "a"),
        *("--spice", f"port={unused_port},addr=127.0.0.1,disable-ticketing=on"),
    )
    agent = (*VRING, "agent", "--socket", "a", "clipboard")
    pipe = {"stdout": asyncio.subprocess.PIPE}
    async with asyncio.timeout(50), serving(tmp_path, *options) as server:
        while "serving" not in (line := (await server.stderr.readline()).decode()):
            assert line
        async with agent_in_guest(tmp_path) as guest:
            client_process.do("connect", {"host": "127.0.0.1", "port": str(unused_port)})
            await client_process.wait_negotiated()
            client_process.do("grab", 0, "the client's")
            assert await client_process.wait("grabbed", 1) == [[1]]
            async with running(*agent, "get", cwd=tmp_path, **pipe) as command:
                assert await command.communicate() == (b"the client's", None)
            text = "the command's"
            async with running(*agent, "set", text, "--paste-once", cwd=tmp_path) as command:
                await client_process.wait("grabbed", 0)
                assert await client_process.receive(0) == text.encode()
                assert await command.wait() == 0
            server.terminate()
            rest = (await server.stderr.read()).decode()
            await guest.wait()
        assert await server.wait() == 0
    assert "Traceback" not in rest
    assert "warning" not in rest
