"""Several HostAgents on one guest agent, through the router."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

import pytest

from vring_serial.agent import (
    AgentGone,
    AgentGoneError,
    AgentRefusedError,
    AgentRouter,
    AgentTrouble,
    AgentUnsupportedError,
    ClipboardEmptyError,
    FileRefusedError,
    HostAgent,
    OtherMessage,
)
from vring_serial.agent import router as router_module
from vring_serial.guest.agent import GuestAgent
from vring_serial.proto.agent import (
    AgentFilter,
    Capability,
    ClipboardRequest,
    ClipboardType,
    FileXferResult,
    FileXferStart,
    FileXferStatus,
    MessageType,
    Monitor,
    MonitorsConfig,
    MouseButton,
    MouseState,
    Reply,
    Selection,
    UnknownMessage,
)

TEXT = ClipboardType.UTF8_TEXT


class Bench:
    """A router with a guest agent on one side; clients are added on the other."""

    def __init__(self, downloads, **options):
        self.downloads = downloads
        self.router_events = []
        self.router = AgentRouter(on_event=self.router_events.append, **options)
        self.guest = GuestAgent(downloads=downloads, timeout=5)
        self.clients = []
        self.running = None
        self.writer = None

    async def start_guest(self):
        ours, theirs = socket.socketpair()
        reader, self.writer = await asyncio.open_connection(sock=theirs)
        self.running = asyncio.ensure_future(self.guest.run(reader, self.writer))
        loop = asyncio.get_running_loop()
        await loop.create_connection(self.router.protocol_factory, sock=ours)
        await self.until(lambda: self.router.capabilities is not None)

    async def stop_guest(self):
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
        await self.until(lambda: self.router.capabilities is None)

    async def client(self, **options):
        host = HostAgent(timeout=5, **options)
        host.events = []
        host._on_event = host.events.append
        await self.router.connect(host.protocol_factory)
        self.clients.append(host)
        return host

    async def until(self, condition):
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.005)

    async def close(self):
        for client in self.clients:
            await client.close()
        await self.router.close()
        await self.stop_guest()
        await self.until(lambda: not self.router.clients)


@pytest.fixture
async def make_bench(tmp_path):
    benches = []

    async def make(**options):
        bench = Bench(tmp_path / "downloads", **options)
        benches.append(bench)
        await bench.start_guest()
        return bench

    yield make
    async with asyncio.timeout(10):
        for bench in benches:
            await bench.close()


@pytest.fixture
def make_file(tmp_path):
    def make(name, size):
        path = tmp_path / name
        path.write_bytes(os.urandom(size))
        return path

    return make


async def test_every_client_sees_capabilities_and_its_own_replies(make_bench):
    bench = await make_bench()
    clients = [await bench.client() for _ in range(3)]
    for client in clients:
        assert Capability.MONITORS_CONFIG in await client.wait_ready()
    good = [client.set_monitors([Monitor(800 + n, 600)]) for n, client in enumerate(clients)]
    bad = clients[1].set_monitors([Monitor(0, 0)])
    results = await asyncio.gather(*good, bad, return_exceptions=True)
    assert results[:3] == [None] * 3
    assert isinstance(results[3], AgentRefusedError)


async def test_the_clipboard_passes_by_grab(make_bench):
    bench = await make_bench()
    first, second = await bench.client(), await bench.client()
    await first.wait_ready()
    await second.wait_ready()
    await first.set_clipboard("first's")
    assert await second.wait_clipboard() == (TEXT,)
    assert await second.get_clipboard() == "first's"
    assert await bench.guest.get_clipboard() == b"first's"
    await second.set_clipboard("second's")
    assert await first.wait_clipboard() == (TEXT,)
    assert await first.get_clipboard() == "second's"
    assert await bench.guest.get_clipboard() == b"second's"
    bench.guest.set_clipboard("guest's")
    await bench.until(lambda: second.clipboard_types())
    assert await asyncio.gather(first.get_clipboard(), second.get_clipboard()) == ["guest's"] * 2
    assert first.clipboard_types(Selection.PRIMARY) == ()


async def test_a_newcomer_is_told_who_owns_what_and_a_leaver_takes_it_along(make_bench):
    bench = await make_bench()
    first = await bench.client()
    await first.wait_ready()
    await first.set_clipboard("mine", Selection.PRIMARY)
    bench.guest.set_clipboard("guest's")
    second = await bench.client()
    assert await second.wait_clipboard(Selection.PRIMARY) == (TEXT,)
    assert await second.wait_clipboard() == (TEXT,)
    await first.close()
    await bench.until(lambda: not second.clipboard_types(Selection.PRIMARY))
    assert await second.get_clipboard() == "guest's"
    with pytest.raises(ClipboardEmptyError):
        await bench.guest.get_clipboard(Selection.PRIMARY)


async def test_a_large_clipboard_between_clients(make_bench):
    bench = await make_bench()
    first, second = await bench.client(), await bench.client()
    await first.wait_ready()
    data = os.urandom(1 << 20) * 20
    await first.set_clipboard({ClipboardType.IMAGE_PNG: data})
    await second.wait_clipboard()
    assert await second.get_clipboard_data(ClipboardType.IMAGE_PNG) == data
    assert await bench.guest.get_clipboard(kind=ClipboardType.IMAGE_PNG) == data


async def test_an_owner_that_does_not_answer_costs_an_empty_answer(make_bench, monkeypatch):
    monkeypatch.setattr(router_module, "ANSWER_TIMEOUT", 0.05)
    bench = await make_bench()
    first, second = await bench.client(), await bench.client()
    await first.wait_ready()
    await first.set_clipboard("never told")
    await second.wait_clipboard()
    first._clipboard.took_request = lambda message: None
    with pytest.raises(ClipboardEmptyError):
        await second.get_clipboard()


async def test_transfers_with_the_same_number_do_not_meet(make_bench, make_file):
    bench = await make_bench()
    clients = [await bench.client() for _ in range(3)]
    for client in clients:
        await client.wait_ready()
    files = [make_file(f"file{n}", 2_000_000 + n) for n in range(3)]
    started = asyncio.Event()
    sending = [
        asyncio.ensure_future(
            client.send_file(path, on_progress=lambda sent, _: sent and started.set())
        )
        for client, path in zip(clients, files, strict=True)
    ]
    await started.wait()
    sending[0].cancel()
    results = await asyncio.gather(*sending, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [None, None]
    for path in files[1:]:
        assert (bench.downloads / path.name).read_bytes() == path.read_bytes()
    await bench.until(lambda: not (bench.downloads / "file0").exists())
    assert not bench.router._transfers


async def test_a_client_that_vanishes_in_the_middle_leaves_the_next_transfer_whole(
    make_bench, make_file
):
    bench = await make_bench()
    first, second = await bench.client(), await bench.client()
    await first.wait_ready()
    await second.wait_ready()
    started = asyncio.Event()
    lost = asyncio.ensure_future(
        first.send_file(
            make_file("lost", 64 << 20), on_progress=lambda sent, _: sent and started.set()
        )
    )
    await started.wait()
    first._link.fail(ConnectionResetError("killed"))
    with pytest.raises(AgentGoneError):
        await lost
    whole = make_file("whole", 1 << 20)
    await second.send_file(whole)
    assert (bench.downloads / "whole").read_bytes() == whole.read_bytes()
    await bench.until(lambda: not (bench.downloads / "lost").exists())


async def test_refusals_reach_who_asked(make_bench, make_file):
    bench = await make_bench()
    first, second = await bench.client(), await bench.client()
    await first.wait_ready()
    await second.wait_ready()
    with pytest.raises(FileRefusedError, match="not valid"):
        await first.send_file(make_file("x", 10), name="..")
    await first.send(FileXferStatus(77, FileXferResult.CANCELLED))
    await second.send_file(make_file("y", 10))
    for _ in range(2):
        await first.send(FileXferStart(5, b"[vdagent-file-xfer]\nname=z\nsize=9\n"))
    await bench.until(lambda: bench.downloads.joinpath("z").exists())
    # The client itself knows nothing of the number that was used behind its back.
    await bench.until(lambda: sum(isinstance(e, AgentTrouble) for e in first.events) == 2)
    assert not [e for e in second.events if isinstance(e, AgentTrouble)]


async def test_an_agent_that_goes_and_comes_back(make_bench):
    bench = await make_bench()
    first = await bench.client()
    await first.wait_ready()
    await bench.stop_guest()
    await bench.until(lambda: any(isinstance(e, AgentGone) for e in first.events))
    waiting = await bench.client()
    await bench.start_guest()
    await waiting.wait_ready()
    await waiting.set_clipboard("after")
    await bench.until(lambda: bench.guest._clipboard.remote_types)
    assert await bench.guest.get_clipboard() == b"after"


async def test_what_the_filter_forbids(make_bench, make_file):
    bench = await make_bench(filter=AgentFilter(copy_paste=False, file_xfer=False))
    client = await bench.client()
    capabilities = await client.wait_ready()
    assert Capability.CLIPBOARD_BY_DEMAND not in capabilities
    with pytest.raises(AgentUnsupportedError):
        await client.set_clipboard("x")
    with pytest.raises(AgentUnsupportedError):
        await client.send_file(make_file("x", 1))
    await client.send(FileXferStart(1, b"[vdagent-file-xfer]\nname=z\nsize=9\n"))
    await client.set_monitors([Monitor(5, 5)])
    assert not bench.downloads.exists()
    assert Capability.CLIPBOARD_BY_DEMAND not in bench.guest.host


async def test_unknown_messages_pass_both_ways(make_bench):
    bench = await make_bench()
    client = await bench.client()
    await client.wait_ready()
    kept = []
    bench.guest._keep = kept.append
    await client.send(UnknownMessage(99, b"to the guest"))
    await bench.until(lambda: kept)
    assert kept == [UnknownMessage(99, b"to the guest")]
    bench.guest._link.post(UnknownMessage(98, b"to all"))
    await bench.until(
        lambda: any(
            getattr(e, "message", None) == UnknownMessage(98, b"to all") for e in client.events
        )
    )


async def test_the_servers_own_messages_and_their_answers_do_not_reach_clients(make_bench):
    bench = await make_bench()
    client = await bench.client()
    await client.wait_ready()
    await bench.router.send(MouseState(7, 8, MouseButton.LEFT))
    await bench.router.send(MonitorsConfig((Monitor(640, 480),)))
    answer = OtherMessage(Reply(MessageType.MONITORS_CONFIG))
    await bench.until(lambda: answer in bench.router_events)
    assert bench.guest.mouse == MouseState(7, 8, MouseButton.LEFT)
    await client.set_monitors([Monitor(1, 1)])
    assert answer not in client.events


async def test_too_many_clients_are_turned_away(make_bench, monkeypatch):
    monkeypatch.setattr(router_module, "CLIENTS_MAX", 1)
    bench = await make_bench()
    first = await bench.client()
    await first.wait_ready()
    second = await bench.client()
    await bench.until(lambda: any(isinstance(e, AgentGone) for e in second.events))
    await first.set_monitors([Monitor(1, 1)])


async def test_a_client_that_does_not_read_is_given_up(make_bench, monkeypatch):
    monkeypatch.setattr(router_module, "CLIENT_STALL", 0.1)
    bench = await make_bench()
    slow = await bench.client()
    await slow.wait_ready()
    bench.guest.set_clipboard(os.urandom(1 << 20) * 8)
    await slow.wait_clipboard()
    asking = asyncio.ensure_future(slow.get_clipboard())
    await asyncio.sleep(0)
    slow._link.hold_reading()
    await bench.until(lambda: not bench.router.clients)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    other = await bench.client()
    assert await other.wait_clipboard() == (TEXT,)
    await other.set_monitors([Monitor(1, 1)])


async def test_a_message_is_forwarded_that_comes_when_the_queue_has_just_been_emptied(make_bench):
    """Between the last turn of the forwarding task and what the loop does after it."""
    bench = await make_bench()
    await bench.client()
    (client,) = bench.router.clients
    sent = []

    async def to_agent(_, message):
        sent.append(message)
        if len(sent) < 50:
            # Runs right behind this turn of the task, before any callback of its end.
            asyncio.get_running_loop().call_soon(client._forward, message)

    bench.router.to_agent = to_agent
    client._forward(UnknownMessage(99))
    async with asyncio.timeout(5):
        while len(sent) < 50:
            await asyncio.sleep(0.01)


async def test_clients_that_left_leave_nothing_running(make_bench):
    """An agent that reads nothing, for a guest may be paused, and clients that come and go."""
    bench = await make_bench()
    link = bench.router._link
    link.pause_writing()
    owner = await bench.client()
    await owner.wait_ready()
    await owner.set_clipboard("not fetched")
    before = len(asyncio.all_tasks())
    for _ in range(20):
        client = await bench.client()
        await client.wait_ready()
        bench.router.clients[-1]._forward(UnknownMessage(99))
        bench.router.clients[-1].clipboard.took_request(ClipboardRequest(0, TEXT))
        await asyncio.sleep(0)
        await client.close()
        await bench.until(lambda: len(bench.router.clients) == 1)
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == before
    link.resume_writing()
