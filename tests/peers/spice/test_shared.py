"""A stock SPICE client, `vring agent` and a HostAgent at the same time on one agent."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest
import pytest_asyncio

from tests.support.processes import running
from tests.support.spice import UmlSide
from tests.support.waiting import until
from vring_serial import AgentGone, HostAgent
from vring_serial.proto.agent import Capability, Monitor, Selection

pytestmark = pytest.mark.asyncio(loop_scope="module")

MEBIBYTE = 1 << 20


@pytest.fixture(scope="module", params=["shared", "shared-uml"])
def kind(request):
    return request.param


@pytest_asyncio.fixture(loop_scope="module")
async def host(bench):
    """A client over the socket."""
    host = HostAgent(timeout=20)
    loop = asyncio.get_running_loop()
    await loop.create_unix_connection(host.protocol_factory, str(bench.socket))
    await host.wait_ready()
    yield host
    await host.aclose()


async def vring_agent(bench, *arguments):
    """What the command writes; it must succeed."""
    command = (sys.executable, "-m", "vring_serial", "agent", "--socket", str(bench.socket))
    async with running(*command, *arguments, stdout=asyncio.subprocess.PIPE) as process:
        async with asyncio.timeout(40):
            output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def host_pastes(host, text):
    """Wait until the host gets this, for something else may have been there before."""

    async def is_there():
        return host.clipboard_types() and await host.get_clipboard() == text

    await until(is_there)


async def connected(bench):
    client = await bench.connect()
    await client.wait_negotiated()
    return client


async def test_all_of_them_see_the_agent(bench, host):
    client = await bench.connect()
    capabilities = await client.wait_agent()
    assert capabilities >> Capability.MONITORS_CONFIG & 1
    assert Capability.MONITORS_CONFIG in host.capabilities
    assert "MONITORS_CONFIG" in (await vring_agent(bench, "caps")).splitlines()


async def test_the_resolution_is_what_was_asked_for_last(bench, host):
    client = await connected(bench)
    client.do("resize", 1280, 720)
    await client.wait("resized", True)
    await bench.guest.resized(1280, 720)
    # An old daemon has left the client without an answer, which nobody else waits for.
    await host.set_monitors([Monitor(1024, 768)])
    assert await bench.guest.resized(1024, 768)
    assert "800x600" in await vring_agent(bench, "resize", "800x600")
    assert await bench.guest.resized(800, 600)


@pytest.mark.parametrize("size", [52, MEBIBYTE])
async def test_the_clipboard_passes_by_grab(bench, host, size):
    client = await connected(bench)
    texts = ["".join(chr(33 + (i + n) % 90) for i in range(size)) for n in range(3)]
    client.do("grab", 0, texts[0])
    await host_pastes(host, texts[0])
    await bench.guest.pasted(texts[0], "clipboard")
    await host.set_clipboard(texts[1])
    await client.wait("grabbed", 0)
    assert (await client.receive(0)).decode() == texts[1]
    await bench.guest.pasted(texts[1], "clipboard")
    await bench.guest.copy(texts[2], "clipboard")
    await client.wait("grabbed", 0)
    assert (await client.receive(0)).decode() == texts[2]
    await host_pastes(host, texts[2])
    assert await vring_agent(bench, "clipboard", "get") == texts[2]


async def test_selections_do_not_meet(bench, host):
    client = await connected(bench)
    client.do("grab", 0, "the client's")
    await host_pastes(host, "the client's")
    await host.set_clipboard("the host's", Selection.PRIMARY)
    await bench.guest.pasted("the client's", "clipboard")
    await bench.guest.pasted("the host's", "primary")
    client.do("release", 0)
    await bench.guest.pasted(None, "clipboard")
    await bench.guest.pasted("the host's", "primary")


async def test_transfers_at_once_and_one_is_cancelled(bench, host, sparse, tmp_path):
    client = await connected(bench)
    files = {}
    for name in ("client's", "host's", "command's"):
        files[name] = os.urandom(5 * MEBIBYTE)
        (tmp_path / name).write_bytes(files[name])
    client.do("send", "long", str(sparse(256 * MEBIBYTE)))
    await client.wait("progress", "sparse")
    client.do("send", "client's", str(tmp_path / "client's"))
    sending = asyncio.gather(
        host.send_file(tmp_path / "host's"),
        vring_agent(bench, "send", "--quiet", str(tmp_path / "command's")),
    )
    client.do("cancel", "long")
    await client.wait("not-sent", "long")
    await sending
    await client.wait("sent", "client's")
    for name, data in files.items():
        assert await bench.guest.file(name.replace("'", "\\'") if is_uml(bench) else name) == data
    assert await bench.guest.file("sparse") is None


def is_uml(bench):
    return isinstance(bench.guest, UmlSide)


async def test_a_client_that_is_killed_leaves_the_others_whole(bench, host, sparse, tmp_path):
    client = await connected(bench)
    client.do("grab", 0, "the client's")
    await host_pastes(host, "the client's")
    await host.set_clipboard("the host's", Selection.PRIMARY)
    client.do("send", "long", str(sparse(256 * MEBIBYTE)))
    for _ in range(5):
        await client.wait("progress", "sparse")
    (tmp_path / "whole").write_bytes(os.urandom(20 * MEBIBYTE))
    started = asyncio.Event()
    sending = asyncio.ensure_future(
        host.send_file(tmp_path / "whole", on_progress=lambda sent, _: sent and started.set())
    )
    await started.wait()
    await client.kill()
    await sending
    assert await bench.guest.file("whole") == (tmp_path / "whole").read_bytes()
    await bench.guest.pasted("the host's", "primary")
    await bench.guest.pasted(None, "clipboard")

    async def is_gone():
        return await bench.guest.file("sparse") is None

    await until(is_gone)
    # The next client begins anew, and is told what the others own.
    following = await bench.connect()
    await following.wait("grabbed", 1)
    assert await following.receive(1) == b"the host's"


async def test_the_agent_stops_and_starts_under_all_of_them(bench, host):
    client = await connected(bench)
    await host.set_clipboard("survives")
    await bench.guest.pasted("survives", "clipboard")
    client.events.clear()
    with host.events() as events:
        await bench.guest.stop_agent()
        await client.wait("agent", False)
        async with asyncio.timeout(30):
            while await anext(events) != AgentGone("", closed=False):
                pass
    await bench.guest.start_agent()
    await host.wait_ready()
    await bench.guest.pasted("survives", "clipboard")
    await client.wait_negotiated()
    client.do("grab", 0, "again")
    await bench.guest.pasted("again", "clipboard")
