"""Several HostAgents on one guest agent, through the router."""

from __future__ import annotations

import asyncio
import os
import tracemalloc

import pytest

from tests.support.waiting import turns, until
from vring_serial import (
    HOST_CAPABILITIES,
    AgentGone,
    AgentGoneError,
    AgentReady,
    AgentRefusedError,
    AgentTimeoutError,
    AgentTrouble,
    AgentUnsupportedError,
    ClipboardEmptyError,
    FileRefusedError,
    OtherMessage,
)
from vring_serial.agent.channel import replies as replies_module
from vring_serial.agent.channel.clipboard import pieces_of
from vring_serial.agent.guest import GUEST_CAPABILITIES, HostLeft
from vring_serial.agent.router import client as client_module
from vring_serial.agent.router import clipboards as clipboards_module
from vring_serial.agent.router import router as router_module
from vring_serial.agent.router.relay import Passing, Relay
from vring_serial.proto.agent import (
    AGENT_AWAY,
    AgentFilter,
    AnnounceCapabilities,
    Capability,
    ChunkPort,
    Clipboard,
    ClipboardGrab,
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
    ReplyError,
    Selection,
    UnknownMessage,
)

TEXT = ClipboardType.UTF8_TEXT


class Sink:
    """Takes a long message."""

    def __init__(self, head, size):
        self.head = head
        self.size = size
        self.data = bytearray()
        self.complete = None

    def feed(self, data):
        self.data += data

    def end(self, complete):
        self.complete = complete


async def zeros(size):
    piece = bytes(64 << 10)
    for _ in range(0, size, len(piece)):
        yield piece


async def endless(size):
    async for piece in zeros(size):
        yield piece
    await asyncio.Event().wait()


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
    await until(lambda: second.clipboard_types())
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
    await first.aclose()
    await until(lambda: not second.clipboard_types(Selection.PRIMARY))
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
    monkeypatch.setattr(clipboards_module, "ANSWER_TIMEOUT", 0.05)
    monkeypatch.setattr(replies_module, "REPLY_WAIT", 0.05)
    bench = await make_bench()
    first, second = await bench.raw_client(), await bench.client()
    await first.greet()
    first.send(ClipboardGrab(0, (TEXT,)))
    await second.wait_clipboard()
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
    await until(lambda: not (bench.downloads / "file0").exists())
    assert not bench.router.load.transfers


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
    first.link.fail(ConnectionResetError("killed"))
    with pytest.raises(AgentGoneError):
        await lost
    whole = make_file("whole", 1 << 20)
    await second.send_file(whole)
    assert (bench.downloads / "whole").read_bytes() == whole.read_bytes()
    await until(lambda: not (bench.downloads / "lost").exists())


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
    await until(lambda: bench.downloads.joinpath("z").exists())
    # The client itself knows nothing of the number that was used behind its back.
    await until(lambda: sum(isinstance(e, AgentTrouble) for e in first.seen) == 2)
    assert not [e for e in second.seen if isinstance(e, AgentTrouble)]


async def test_an_agent_that_goes_and_comes_back(make_bench):
    bench = await make_bench()
    first = await bench.client()
    await first.wait_ready()
    await first.set_clipboard("first's")
    await bench.stop_guest()
    await until(lambda: AgentGone("", closed=False) in first.seen)
    assert first.capabilities is None
    with pytest.raises(AgentGoneError):
        await first.set_monitors([Monitor(1, 1)])
    waiting = await bench.client()
    with pytest.raises(AgentTimeoutError, match="has none at the moment"):
        await waiting.wait_ready(0.1)
    await bench.start_guest()
    for client in (first, waiting):
        await client.wait_ready()
        await client.set_monitors([Monitor(800, 600)])
    # What was owned before is offered to the new agent.
    await until(lambda: bench.guest.clipboard_types())
    assert await bench.guest.get_clipboard() == b"first's"
    await waiting.set_clipboard("after")
    await first.wait_clipboard()
    assert await bench.guest.get_clipboard() == b"after"
    assert [type(e) for e in first.seen if isinstance(e, AgentGone | AgentReady)] == [
        AgentReady,
        AgentGone,
        AgentReady,
    ]


async def test_an_agent_that_goes_ends_what_was_under_way(make_bench, make_file):
    bench = await make_bench()
    first, second = await bench.client(), await bench.client()
    await first.wait_ready()
    bench.guest.set_clipboard("guest's")
    await second.wait_clipboard()
    started = asyncio.Event()
    sending = asyncio.ensure_future(
        first.send_file(
            make_file("long", 64 << 20), on_progress=lambda sent, _: sent and started.set()
        )
    )
    await started.wait()
    await bench.stop_guest()
    with pytest.raises(AgentGoneError):
        await sending
    await until(lambda: not second.clipboard_types())
    assert not bench.router.load.transfers
    # One that has heard of no agent is answered all the same.
    raw = await bench.raw_client()
    raw.send(AnnounceCapabilities(True, HOST_CAPABILITIES))
    assert list((await raw.receive(AnnounceCapabilities)).capabilities)[-1] == AGENT_AWAY
    raw.send(FileXferStart(7, b"[vdagent-file-xfer]\nname=z\nsize=9\n"))
    assert await raw.receive(FileXferStatus) == FileXferStatus(
        7, FileXferResult.VDAGENT_NOT_CONNECTED
    )
    raw.send(MonitorsConfig((Monitor(1, 1),)))
    assert (await raw.receive(Reply)).error == ReplyError.ERROR


async def test_an_agent_that_goes_leaves_the_layout_of_messages_as_it_was(make_bench):
    bench = await make_bench()
    owner, other = await bench.raw_client(), await bench.raw_client()
    for client in (owner, other):
        await client.greet()
    await bench.stop_guest()
    for client in (owner, other):
        away = await client.receive(AnnounceCapabilities)
        assert set(away.capabilities) == {
            AGENT_AWAY,
            Capability.CLIPBOARD_SELECTION,
            Capability.CLIPBOARD_GRAB_SERIAL,
        }
    owner.send(ClipboardGrab(Selection.PRIMARY, (TEXT,), 0))
    assert await other.receive(ClipboardGrab) == ClipboardGrab(Selection.PRIMARY, (TEXT,), 0)
    # It is that of the agent which left, not of any agent.
    await bench.start_guest_with(GUEST_CAPABILITIES.without(Capability.CLIPBOARD_GRAB_SERIAL))
    await bench.stop_guest()
    late = await bench.raw_client()
    assert set((await late.receive(AnnounceCapabilities)).capabilities) == {
        AGENT_AWAY,
        Capability.CLIPBOARD_SELECTION,
    }


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
    await client.send(UnknownMessage(99, b"to the guest"))
    await until(lambda: bench.tap.of(UnknownMessage))
    assert bench.tap.of(UnknownMessage) == [UnknownMessage(99, b"to the guest")]
    bench.guest.link.post(UnknownMessage(98, b"to all"))
    await until(
        lambda: any(
            getattr(e, "message", None) == UnknownMessage(98, b"to all") for e in client.seen
        )
    )


async def test_long_unknown_messages_pass_both_ways(make_bench):
    """Longer than anything is kept: a piece at a time."""
    bench = await make_bench()
    data = os.urandom(1 << 20) * 5
    sinks = []

    def take(head, size):
        sinks.append(Sink(head, size))
        return sinks[-1]

    sender = await bench.client()
    takers = [await bench.client(on_body=take) for _ in range(2)]
    for client in (sender, *takers):
        await client.wait_ready()
    bench.tap.take_body = take
    await sender.send_body(UnknownMessage(77, opaque=5), len(data), pieces_of(data))
    await until(lambda: sinks and sinks[0].complete)
    (sink,) = sinks
    assert (sink.head, sink.size) == (UnknownMessage(77, opaque=5), len(data))
    assert sink.data == data
    sinks.clear()
    await bench.guest.link.send_body(UnknownMessage(78), len(data), pieces_of(data))
    await until(lambda: len(sinks) == 2 and all(sink.complete for sink in sinks))
    assert all(sink.data == data and sink.head == UnknownMessage(78) for sink in sinks)
    await sender.set_monitors([Monitor(1, 1)])
    assert not [e for e in bench.router_events if isinstance(e, AgentTrouble)]


async def test_a_long_message_waits_whole_and_not_in_memory_for_who_does_not_read(make_bench):
    bench = await make_bench()
    sinks = []
    slow = await bench.client(on_body=lambda head, size: sinks.append(Sink(head, size)) or sinks[0])
    other = await bench.client()
    await slow.wait_ready()
    await other.wait_ready()
    slow.link.hold_reading()
    size = 64 << 20
    tracemalloc.start()
    await bench.guest.link.send_body(UnknownMessage(78), size, zeros(size))
    await other.set_monitors([Monitor(800, 600)])
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert not sinks
    slow.link.release_reading()
    await until(lambda: sinks and sinks[0].complete)
    assert len(sinks[0].data) == size
    await until(lambda: bench.router.load.spooled == 0)


async def test_a_message_that_breaks_off_is_not_passed_on(make_bench):
    """Nor does it take the agent's session along."""
    bench = await make_bench()
    first, second = await bench.client(), await bench.client()
    await second.wait_ready()
    sinks = []
    bench.tap.take_body = lambda head, size: sinks.append(Sink(head, size))
    sending = asyncio.ensure_future(first.send_body(UnknownMessage(77), 4 << 20, endless(3 << 20)))
    await until(lambda: bench.router.load.spooled >= 2 << 20)
    first.link.fail(ConnectionResetError("killed"))
    await until(lambda: bench.router.load.spooled == 0)
    await second.set_monitors([Monitor(1, 1)])
    assert not sinks
    assert HostLeft() not in bench.guest_events
    assert any("left in the middle" in str(e.error) for e in troubles(bench))
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)


def troubles(bench):
    return [event for event in bench.router_events if isinstance(event, AgentTrouble)]


async def test_an_answer_to_one_is_not_taken_by_another(make_bench, monkeypatch):
    """spice-vdagentd 0.22.1 says nothing to the monitors that a SPICE client sends."""
    monkeypatch.setattr(replies_module, "REPLY_WAIT", 0.3)
    bench = await make_bench()
    silent, other = await bench.raw_client(), await bench.client()
    await silent.greet()
    await other.wait_ready()
    unanswered = MonitorsConfig((Monitor(13, 13),))
    bench.tap.withholds = lambda message: message == unanswered
    silent.send(unanswered)
    await until(lambda: unanswered in bench.tap.of(MonitorsConfig))
    await other.set_monitors([Monitor(800, 600)])
    with pytest.raises(AgentRefusedError):
        await other.set_monitors([Monitor(0, 0)])
    silent.send(MonitorsConfig((Monitor(640, 480),)))
    assert (await silent.receive(Reply)).error == ReplyError.SUCCESS


async def test_an_older_client_gets_older_statuses(make_bench, make_file):
    bench = await make_bench(downloads=None)  # it refuses with DISABLED
    old, new = await bench.raw_client(), await bench.raw_client()
    await old.greet(HOST_CAPABILITIES.without(Capability.FILE_XFER_DETAILED_ERRORS))
    await new.greet()
    for client, result in ((old, FileXferResult.ERROR), (new, FileXferResult.DISABLED)):
        client.send(FileXferStart(1, b"[vdagent-file-xfer]\nname=z\nsize=9\n"))
        assert (await client.receive(FileXferStatus)).result == result


async def test_the_servers_own_messages_and_their_answers_do_not_reach_clients(make_bench):
    bench = await make_bench()
    client = await bench.client()
    await client.wait_ready()
    await bench.router.send(MouseState(7, 8, MouseButton.LEFT))
    await bench.router.send(MonitorsConfig((Monitor(640, 480),)))
    answer = OtherMessage(Reply(MessageType.MONITORS_CONFIG))
    await until(lambda: answer in bench.router_events)
    assert bench.guest.mouse == MouseState(7, 8, MouseButton.LEFT)
    await client.set_monitors([Monitor(1, 1)])
    assert answer not in client.seen


async def test_too_many_clients_are_turned_away(make_bench, monkeypatch):
    monkeypatch.setattr(router_module, "CLIENTS_MAX", 1)
    bench = await make_bench()
    first = await bench.client()
    await first.wait_ready()
    second = await bench.client()
    await until(lambda: any(isinstance(e, AgentGone) for e in second.seen))
    await first.set_monitors([Monitor(1, 1)])


async def test_a_client_that_does_not_read_is_given_up(make_bench, monkeypatch):
    monkeypatch.setattr(client_module, "CLIENT_STALL", 0.1)
    bench = await make_bench()
    slow = await bench.client()
    await slow.wait_ready()
    bench.guest.set_clipboard(os.urandom(1 << 20) * 8)
    await slow.wait_clipboard()
    asking = asyncio.ensure_future(slow.get_clipboard())
    await turns()
    slow.link.hold_reading()
    await until(lambda: not bench.router.clients)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    other = await bench.client()
    assert await other.wait_clipboard() == (TEXT,)
    await other.set_monitors([Monitor(1, 1)])


async def test_a_message_is_forwarded_that_comes_when_the_queue_has_just_been_emptied(make_bench):
    """Between the last turn of the forwarding task and what the loop does after it."""
    bench = await make_bench()
    source = bench.router.agent_link
    sent = []

    async def deliver(passing):
        sent.append(passing)
        if len(sent) < 50:
            # Runs right behind this turn of the task, before any callback of its end.
            asyncio.get_running_loop().call_soon(relay.put, source, passing)

    relay = Relay(deliver, lambda error: None)
    relay.put(source, Passing(UnknownMessage(99)))
    await until(lambda: len(sent) >= 50)
    await relay.aclose()


async def test_clients_that_left_leave_nothing_running(make_bench):
    """An agent that reads nothing, for a guest may be paused, and clients that come and go."""
    bench = await make_bench()
    link = bench.router.agent_link
    link.pause_writing()
    owner = await bench.client()
    await owner.wait_ready()
    await owner.set_clipboard("not fetched")
    before = len(asyncio.all_tasks())
    for _ in range(20):
        client = await bench.client()
        await client.wait_ready()
        far = bench.router.clients[-1]
        for message in (UnknownMessage(99), ClipboardRequest(0, TEXT)):
            far.link_message(far.link, ChunkPort.CLIENT, message)
        await turns(1)
        await client.aclose()
        await until(lambda: len(bench.router.clients) == 1)
    await turns()
    assert len(asyncio.all_tasks()) == before
    link.resume_writing()


async def test_an_owner_that_leaves_in_the_middle_of_its_clipboard(make_bench, make_file):
    """Nothing of it is on its way to the agent yet, whose other clients notice nothing."""
    bench = await make_bench()
    owner, other = await bench.raw_client(), await bench.client()
    await other.wait_ready()
    await owner.greet()
    owner.send(ClipboardGrab(0, (TEXT,)))
    await until(lambda: bench.guest.clipboard_types())
    pasting = asyncio.ensure_future(bench.guest.get_clipboard())
    await owner.receive(ClipboardRequest)
    owner.writer.write(owner.connection.start_body(Clipboard(0, TEXT), 1 << 20))
    owner.writer.write(owner.connection.send_body(bytes(1 << 19)))
    progress = []
    sending = asyncio.ensure_future(
        other.send_file(
            make_file("whole", 16 << 20), on_progress=lambda sent, _: progress.append(sent)
        )
    )
    await until(lambda: bench.router.load.spooled == 1 << 19 and progress)
    await owner.aclose()
    with pytest.raises(ClipboardEmptyError):
        await pasting
    await sending
    assert (bench.downloads / "whole").stat().st_size == 16 << 20
    assert HostLeft() not in bench.guest_events


@pytest.mark.parametrize("where", ["on_body", "feed", "end", "on_event"])
async def test_what_a_users_code_raises_costs_the_channel_nothing(make_bench, caplog, where):
    bench = await make_bench()
    called = []

    class Raising:
        def feed(self, data):
            called.append("feed")
            if where == "feed":
                raise ValueError("oops")

        def end(self, complete):
            called.append("end")
            if where == "end":
                raise ValueError("oops")

    def take(head, size):
        called.append("on_body")
        if where == "on_body":
            raise ValueError("oops")
        return Raising()

    def on_event(event):
        called.append("on_event")
        raise ValueError("oops")

    client = await bench.client(on_body=take)
    if where == "on_event":
        client.on_event = None  # the bench's
        client.on_event = on_event
    await client.wait_ready()
    data = os.urandom(1 << 20)
    await bench.guest.link.send_body(UnknownMessage(78), len(data), pieces_of(data))
    await until(lambda: where in called)
    await client.set_monitors([Monitor(1, 1)])
    await until(lambda: "failed" in caplog.text)
    assert called.count(where) == 1 or where == "on_event"
