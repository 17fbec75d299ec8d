"""Host's end and guest's agent with the whole device between them, in one process."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.support.waiting import until
from vring_serial import AgentGone, AgentTrouble, EmbeddedGuest, HostAgent
from vring_serial.agent.guest import AGENT_PORT, GuestAgent, serve_agent
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.guest.services import keep_serving
from vring_serial.proto.agent import ClipboardType, Monitor, Selection
from vring_serial.transport.vhost_user.backend import VhostUserBackend


@pytest.fixture
async def guest_and_host(tmp_path):
    events = []
    host = HostAgent(on_event=events.append)
    controller = Controller(max_ports=4)
    controller.add_port(Port(1, AGENT_PORT, ProtocolChardev("agent", host.protocol_factory)))
    backend = VhostUserBackend(controller, str(tmp_path / "vhost.sock"))
    await controller.start()
    await backend.start()
    async with asyncio.timeout(60), EmbeddedGuest(str(tmp_path / "vhost.sock")) as guest:
        yield guest, host, events
    await host.aclose()
    await backend.aclose()
    await controller.aclose()
    assert not [e for e in events if isinstance(e, AgentTrouble)]


async def test_everything_over_the_rings(guest_and_host, tmp_path):
    guest, host, _ = guest_and_host
    port = await guest.wait_port(name=AGENT_PORT)
    agent = GuestAgent(downloads=tmp_path / "in")
    serving = asyncio.ensure_future(keep_serving(port, agent.run))
    await host.wait_ready()
    await host.set_monitors([Monitor(1920, 1080)])
    assert agent.monitors == (Monitor(1920, 1080),)
    data = os.urandom(1 << 20) * 5
    await host.set_clipboard({ClipboardType.IMAGE_PNG: data})
    await until(lambda: agent.clipboard_types())
    assert await agent.get_clipboard(kind=ClipboardType.IMAGE_PNG) == data
    agent.set_clipboard({ClipboardType.IMAGE_PNG: data[::-1]})
    await host.wait_clipboard()
    assert await host.get_clipboard_data(ClipboardType.IMAGE_PNG) == data[::-1]
    for name, size in [("empty", 0), ("whole", 9_000_000)]:
        (tmp_path / name).write_bytes(data[:size])
        await host.send_file(tmp_path / name)
        assert (tmp_path / "in" / name).stat().st_size == min(size, len(data))
    assert (tmp_path / "in" / "whole").read_bytes() == (tmp_path / "whole").read_bytes()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


async def test_the_agent_stops_in_the_middle_of_a_transfer_and_starts_again(
    guest_and_host, tmp_path
):
    guest, host, events = guest_and_host
    port = await guest.wait_port(name=AGENT_PORT)
    (tmp_path / "long").write_bytes(bytes(256 << 20))
    for turn in range(3):
        agent = GuestAgent(downloads=tmp_path / "in")
        reader, writer = await port.open()
        serving = asyncio.ensure_future(agent.run(reader, writer))
        await host.wait_ready()
        sent = []
        sending = asyncio.ensure_future(
            host.send_file(tmp_path / "long", on_progress=lambda *at, sent=sent: sent.append(at))
        )
        await until(lambda sent=sent: len(sent) > 5)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        writer.close()
        await writer.wait_closed()
        await until(lambda: host.capabilities is None)
        (result,) = await asyncio.gather(sending, return_exceptions=True)
        assert "during the file transfer" in str(result) or "channel closed" in str(result)
        assert list((tmp_path / "in").iterdir()) == []
        assert sum(isinstance(e, AgentGone) for e in events) == turn + 1


async def test_what_the_guest_command_runs(guest_and_host):
    guest, host, _ = guest_and_host
    port = await guest.wait_port(name=AGENT_PORT)
    serving = asyncio.ensure_future(keep_serving(port, serve_agent))
    await host.wait_ready()
    await host.set_clipboard("pasted, then selected")
    await host.wait_clipboard(Selection.PRIMARY)
    assert await host.get_clipboard(Selection.PRIMARY) == "pasted, then selected"
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
