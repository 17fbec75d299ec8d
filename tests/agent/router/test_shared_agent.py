"""One agent, many clients: what the worst of them does, and how little the others notice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tracemalloc

import pytest

from tests.support.waiting import turns, until
from vring_serial import (
    HOST_CAPABILITIES,
    AgentGone,
    AgentGoneError,
    AgentTrouble,
    ClipboardEmptyError,
    StreamSource,
)
from vring_serial.agent.channel import link as link_module
from vring_serial.agent.channel import spool as spool_module
from vring_serial.agent.channel.clipboard import pieces_of
from vring_serial.agent.guest import GUEST_CAPABILITIES
from vring_serial.agent.router import client as client_module
from vring_serial.agent.router import guest_files as guest_files_module
from vring_serial.agent.router import relay as relay_module
from vring_serial.agent.router import router as router_module
from vring_serial.proto.agent import (
    FILES_FROM_GUEST,
    AnnounceCapabilities,
    Capability,
    Clipboard,
    ClipboardGrab,
    ClipboardRequest,
    ClipboardType,
    FileInfo,
    FileXferResult,
    FileXferStart,
    FileXferStatus,
    Monitor,
    MonitorsConfig,
    Reply,
    Selection,
    UnknownMessage,
)

TEXT = ClipboardType.UTF8_TEXT
PNG = ClipboardType.IMAGE_PNG
MIB = 1 << 20


async def ready(bench, count, **options):
    clients = [await bench.client(**options) for _ in range(count)]
    for client in clients:
        await client.wait_ready()
    return clients


async def greeted(bench, **options):
    client = await bench.raw_client()
    await client.greet(**options)
    return client


def stop(client):
    """As Ctrl-Z does: it reads nothing from now on."""
    client.writer.transport.pause_reading()


def go_on(client):
    client.writer.transport.resume_reading()


def results(bench):
    """What the guest was told of its files."""
    return [status.result for status in bench.tap.of(FileXferStatus)]


def reasons(bench):
    return [str(e.error) for e in bench.router_events if isinstance(e, AgentTrouble)]


@contextlib.contextmanager
def no_more_than(size):
    """The block's greatest use of memory is bounded."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


# --- bursts


async def test_a_burst_of_grabs_ends_nobody(make_bench):
    bench = await make_bench()
    victims = await ready(bench, 3)
    source = await greeted(bench)
    serials = iter(range(6001))
    burst = [ClipboardGrab(0, (TEXT,), next(serials)) for _ in range(6000)]
    last = ClipboardGrab(0, (TEXT, PNG), next(serials))
    source.writer.write(b"".join(map(source.connection.send, [*burst, last])))
    for victim in victims:
        await until(lambda victim=victim: victim.clipboard_types() == (TEXT, PNG))
        await victim.set_monitors([Monitor(800, 600)])
    await until(lambda: bench.guest.clipboard_types() == (TEXT, PNG))
    asking = asyncio.ensure_future(victims[0].get_clipboard())
    assert await source.receive(ClipboardRequest) == ClipboardRequest(0, TEXT)
    source.send(Clipboard(0, TEXT, b"the last"))
    assert await asking == "the last"
    assert len(bench.router.clients) == 4
    assert not reasons(bench)


async def test_a_client_that_is_stopped_is_told_the_last_of_a_burst_only(make_bench):
    bench = await make_bench()
    stopped, source = await greeted(bench), await greeted(bench)
    stop(stopped)
    (other,) = await ready(bench, 1)
    for number in range(20_000):
        kinds = (TEXT, PNG) if number == 19_999 else (TEXT,) * (1 + number % 50)
        source.send(ClipboardGrab(number % 3, kinds, number // 3))
        if number % 1000 == 0:
            await source.writer.drain()
    await until(lambda: other.clipboard_types(19_999 % 3) == (TEXT, PNG))
    assert len(bench.router.clients) == 3
    go_on(stopped)
    seen = 0
    while (await stopped.receive(ClipboardGrab)).types != (TEXT, PNG):
        seen += 1
    assert seen < 10_000
    assert not reasons(bench)


async def test_an_agent_that_announces_in_a_loop_ends_no_stopped_client(make_bench):
    bench = await make_bench()
    stopped = await greeted(bench)
    stop(stopped)
    (other,) = await ready(bench, 1)
    other_kinds = GUEST_CAPABILITIES.without(Capability.MOUSE_STATE)
    link = bench.guest.link
    for number in range(20_000):
        kinds = GUEST_CAPABILITIES if number % 2 else other_kinds
        await link.send(AnnounceCapabilities(False, kinds))
    await link.send(AnnounceCapabilities(False, GUEST_CAPABILITIES.with_(40)))
    await until(lambda: other.capabilities is not None and 40 in other.capabilities)
    go_on(stopped)
    while 40 not in (await stopped.receive(AnnounceCapabilities)).capabilities:
        pass
    assert not reasons(bench)


async def left_behind(bench, count):
    """Clients that leave with all of their transfers open, while the agent is paused."""
    bench.tap.withholds = lambda message: isinstance(message, FileXferStart)
    clients = []
    for _ in range(count):
        client = await greeted(bench)
        for number in range(128):
            client.send(FileXferStart(number, FileInfo("x", 1).pack()))
        clients.append(client)
    await until(lambda: len(bench.tap.of(FileXferStart)) == count * 128)
    assert bench.router.load.transfers == count * 128
    bench.router.agent_link.pause_writing()
    for client in clients:
        await client.aclose()
    await until(lambda: not bench.router.clients)


async def test_clients_that_leave_with_all_their_transfers_do_not_end_a_paused_agent(
    make_bench, monkeypatch
):
    monkeypatch.setattr(link_module, "CROWDED_TIMEOUT", 0.01)
    bench = await make_bench()
    await left_behind(bench, 12)
    link = bench.router.agent_link
    assert link.waiting == 12 * 128
    # Who sends something now is not read before the agent has read.
    late = await greeted(bench)
    late.send(MonitorsConfig((Monitor(1, 1),)))
    await until(lambda: bench.router.clients[0].link.is_held)
    assert link.is_open
    link.resume_writing()
    await late.receive(Reply)


async def test_clients_that_come_and_go_with_files_are_not_heard_of_by_a_paused_agent(make_bench):
    bench = await make_bench()
    await left_behind(bench, 1)
    for _ in range(20):
        client = await greeted(bench)
        client.send(FileXferStart(1, FileInfo("x", 1).pack()))
        await until(lambda: bench.router.load.transfers)
        await client.aclose()
        await until(lambda: not bench.router.clients)
    assert bench.router.agent_link.waiting == 128
    bench.router.agent_link.resume_writing()
    (other,) = await ready(bench, 1)
    await other.set_monitors([Monitor(1, 1)])


async def test_clients_that_hung_up_while_they_were_held_keep_nobody_out(make_bench, monkeypatch):
    monkeypatch.setattr(router_module, "CLIENTS_MAX", 4)
    bench = await make_bench()
    bench.router.agent_link.pause_writing()
    for _ in range(4):
        client = await greeted(bench)
        for _ in range(10):
            client.send(UnknownMessage(99, bytes(100_000)))
        await until(lambda: bench.router.clients[-1].link.is_held)
        client.writer.transport.abort()
    assert len(bench.router.clients) == 4
    await ready(bench, 3)
    bench.router.agent_link.resume_writing()


async def test_who_asks_and_does_not_read_is_not_read_either(make_bench):
    bench = await make_bench()
    asking, (other,) = await greeted(bench), await ready(bench, 1)
    stop(asking)
    start = asking.connection.send(FileXferStatus(5, FileXferResult.CAN_SEND_DATA))
    offer = asking.connection.send(FileXferStart(1, b"no name"))  # answered with ERROR, at once
    with no_more_than(16 * MIB):
        for _ in range(200):
            asking.writer.write((offer + start) * 500)
            await turns(1)
        await other.set_monitors([Monitor(2, 2)])
    assert len(bench.router.clients) == 2
    asking.writer.transport.abort()


# --- who reads slowly, or not at all


async def test_a_client_that_does_not_read_its_clipboard_delays_nobody(make_bench):
    bench = await make_bench()
    data = os.urandom(MIB) * 32
    bench.guest.set_clipboard({PNG: data})
    slow = await greeted(bench)
    others = await ready(bench, 2)
    await slow.receive(ClipboardGrab)
    stop(slow)
    slow.send(ClipboardRequest(0, PNG))
    await until(lambda: bench.router.load.spooled)
    for other in others:
        await other.set_monitors([Monitor(800, 600)])
        assert await other.get_clipboard_data(PNG) == data
    go_on(slow)
    slow.connection.stream_above = 64 * MIB
    assert bytes((await slow.receive(Clipboard)).data) == data
    await until(lambda: bench.router.load.spooled == 0)


async def test_a_client_that_does_not_read_its_files_is_given_up_for_the_others(
    make_bench, make_file, clock
):
    bench = await make_bench()
    bench.guest.copy_files([make_file("long", 16 * MIB)])
    slow = await greeted(bench, capabilities=HOST_CAPABILITIES.with_(FILES_FROM_GUEST))
    (other,) = await ready(bench, 1)
    slow.send(ClipboardRequest(0, ClipboardType.FILE_LIST))
    start = await slow.receive(FileXferStart)
    stop(slow)
    slow.send(FileXferStatus(start.id, FileXferResult.CAN_SEND_DATA))
    await until(lambda: bench.router.agent_link.is_held)
    setting = asyncio.ensure_future(other.set_monitors([Monitor(800, 600)]))
    await clock.forward(relay_module.HOLD_SECONDS)
    await setting
    await until(lambda: len(bench.router.clients) == 1)
    assert any("while others waited for it" in reason for reason in reasons(bench))


async def test_a_client_that_is_alone_may_read_as_slowly_as_it_likes(
    make_bench, make_file, tmp_path, clock
):
    bench = await make_bench()
    path = make_file("long", 16 * MIB)
    bench.guest.copy_files([path])
    (client,) = await ready(bench, 1, capabilities=HOST_CAPABILITIES.with_(FILES_FROM_GUEST))
    await client.wait_clipboard()
    getting = asyncio.ensure_future(client.get_files(tmp_path / "in"))
    await until(lambda: (tmp_path / "in" / path.name).exists())
    client.link.hold_reading()
    await until(lambda: bench.router.agent_link.is_held)
    for _ in range(4):
        await clock.forward(relay_module.HOLD_SECONDS)
    client.link.release_reading()
    assert (await getting)[0].read_bytes() == path.read_bytes()


async def test_a_client_that_takes_enough_is_not_given_up(make_bench, make_file, clock):
    """What others wait for is behind a long message here, of which it takes its share in time."""
    bench = await make_bench()
    bench.guest.copy_files([make_file("long", 16 * MIB)])
    bench.guest.set_clipboard({PNG: bytes(16 * MIB)}, Selection.PRIMARY)
    slow = await greeted(bench, capabilities=HOST_CAPABILITIES.with_(FILES_FROM_GUEST))
    await ready(bench, 1)
    slow.send(ClipboardRequest(0, ClipboardType.FILE_LIST))
    start = await slow.receive(FileXferStart)
    slow.send(ClipboardRequest(Selection.PRIMARY, PNG))
    await until(lambda: bench.router.load.spooled)
    slow.send(FileXferStatus(start.id, FileXferResult.CAN_SEND_DATA))
    await until(lambda: bench.router.agent_link.is_held)
    for _ in range(5):
        # The half of it may have been in buffers on the way.
        await slow.reader.readexactly(2 * relay_module.HOLD_BYTES)
        await clock.forward(relay_module.HOLD_SECONDS)
        assert bench.router.agent_link.is_held
        assert not reasons(bench)
    await clock.forward(relay_module.HOLD_SECONDS)
    assert any("while others waited for it" in reason for reason in reasons(bench))


# --- who stops, or leaves, in the middle of what it sends


async def offered(bench, size=16 * MIB, sent=9 * MIB):
    """A client whose clipboard the guest has begun to paste; some of it is sent."""
    owner = await greeted(bench)
    owner.send(ClipboardGrab(0, (PNG,)))
    await until(lambda: bench.guest.clipboard_types())
    pasting = asyncio.ensure_future(bench.guest.get_clipboard(kind=PNG))
    await owner.receive(ClipboardRequest)
    owner.writer.write(owner.connection.start_body(Clipboard(0, PNG), size))
    owner.writer.write(owner.connection.send_body(bytes(sent)))
    await owner.writer.drain()
    return owner, pasting


async def test_an_owner_that_dies_in_the_middle_fails_nobodys_file(make_bench, make_file):
    bench = await make_bench()
    (other,) = await ready(bench, 1)
    started = asyncio.Event()
    path = make_file("whole", 96 * MIB)
    sending = asyncio.ensure_future(
        other.send_file(path, on_progress=lambda sent, _: sent and started.set())
    )
    await started.wait()
    owner, pasting = await offered(bench)
    await owner.aclose()
    with pytest.raises(ClipboardEmptyError):
        await pasting
    assert not sending.done()
    await sending
    assert (bench.downloads / "whole").stat().st_size == 96 * MIB
    assert any("could not be pasted" in reason for reason in reasons(bench))


async def test_an_owner_that_dies_in_the_middle_does_not_end_the_client_that_pastes(make_bench):
    bench = await make_bench()
    (other,) = await ready(bench, 1)
    owner = await greeted(bench)
    owner.send(ClipboardGrab(0, (PNG,)))
    await other.wait_clipboard()
    asking = asyncio.ensure_future(other.get_clipboard_data(PNG))
    await owner.receive(ClipboardRequest)
    owner.writer.write(owner.connection.start_body(Clipboard(0, PNG), 16 * MIB))
    owner.writer.write(owner.connection.send_body(bytes(9 * MIB)))
    await owner.writer.drain()
    await owner.aclose()
    with pytest.raises(ClipboardEmptyError):
        await asking
    await other.set_monitors([Monitor(800, 600)])
    assert not [event for event in other.seen if isinstance(event, AgentGone)]


async def test_an_agent_that_dies_in_the_middle_does_not_end_the_client_that_pastes(make_bench):
    bench = await make_bench()
    halfway = asyncio.Event()

    async def produce():
        yield bytes(9 * MIB)
        halfway.set()
        await asyncio.Event().wait()

    bench.guest.set_clipboard({PNG: StreamSource(16 * MIB, produce)})
    (client,) = await ready(bench, 1)
    await client.wait_clipboard()
    asking = asyncio.ensure_future(client.get_clipboard_data(PNG))
    await halfway.wait()
    await bench.stop_guest()
    with pytest.raises((AgentGoneError, ClipboardEmptyError)):
        await asking
    assert [e for e in client.seen if isinstance(e, AgentGone)] == [AgentGone("", closed=False)]
    await bench.start_guest()
    await client.wait_ready()
    await client.set_monitors([Monitor(800, 600)])


async def test_an_owner_that_stops_in_the_middle_delays_nobody(make_bench, make_file):
    bench = await make_bench()
    (other,) = await ready(bench, 1)
    owner, pasting = await offered(bench)
    await other.set_monitors([Monitor(800, 600)])
    await other.send_file(make_file("whole", MIB))
    # Other clipboards go on, and this one as soon as somebody else owns it.
    await other.set_clipboard("selected", 1)
    await until(lambda: bench.guest.clipboard_types(1))
    assert await bench.guest.get_clipboard(1) == b"selected"
    owner.writer.write(owner.connection.send_body(bytes(7 * MIB)))
    assert await pasting == bytes(16 * MIB)


async def test_an_owner_that_says_nothing_is_not_waited_for_when_there_is_another(make_bench):
    bench = await make_bench()
    (other,) = await ready(bench, 1)
    owner = await greeted(bench)
    owner.send(ClipboardGrab(0, (TEXT,)))
    await until(lambda: bench.guest.clipboard_types())
    pasting = asyncio.ensure_future(bench.guest.get_clipboard())
    await owner.receive(ClipboardRequest)
    await other.set_clipboard("another's")
    with pytest.raises(ClipboardEmptyError):
        await pasting
    await until(lambda: bench.guest.clipboard_types())
    assert await bench.guest.get_clipboard() == b"another's"


async def test_what_is_too_long_or_cannot_be_kept_is_said(make_bench, monkeypatch):
    monkeypatch.setattr(spool_module, "MESSAGE_MAX", 2 * MIB)
    monkeypatch.setattr(spool_module, "ROOM", 3 * MIB)
    bench = await make_bench()
    client, other = await ready(bench, 2)
    bench.guest.set_clipboard({PNG: bytes(2 * MIB + 1), TEXT: bytes(2 * MIB)})
    await client.wait_clipboard()
    with pytest.raises(ClipboardEmptyError):
        await client.get_clipboard_data(PNG)
    assert any("at most 2097152" in reason for reason in reasons(bench))
    await client.send_body(UnknownMessage(99), 3 * MIB, pieces_of(bytes(3 * MIB)))
    # Who reads nothing has a message waiting that leaves too little room for another.
    stopped = await greeted(bench)
    stop(stopped)
    await bench.guest.link.send_body(UnknownMessage(98), 2 * MIB, pieces_of(bytes(2 * MIB)))
    await until(lambda: bench.router.load.spooled == 2 * MIB)
    with pytest.raises(ClipboardEmptyError):
        await client.get_clipboard_data(TEXT)
    assert any("long messages wait already" in reason for reason in reasons(bench))
    await stopped.aclose()
    await until(lambda: bench.router.load.spooled == 0)
    assert await other.get_clipboard_data(TEXT) == bytes(2 * MIB)
    await until(lambda: bench.router.load.spooled == 0)


async def test_a_long_message_that_does_not_go_on_is_given_up(make_bench, clock):
    bench = await make_bench()
    client = await greeted(bench)
    client.writer.write(client.connection.start_body(UnknownMessage(99), MIB))
    client.writer.write(client.connection.send_body(bytes(MIB // 2)))
    await until(lambda: bench.router.load.spooled == MIB // 2)
    await clock.forward(client_module.ANSWER_TIMEOUT)
    await until(lambda: any("no more of a message of type 99" in r for r in reasons(bench)))
    assert bench.router.load.spooled == 0
    client.writer.write(client.connection.send_body(bytes(MIB // 2)))
    client.send(MonitorsConfig((Monitor(1, 1),)))
    await client.receive(Reply)


# --- who says nothing


async def test_clients_that_say_nothing_keep_nobody_out(make_bench):
    bench = await make_bench()
    silent = [await bench.raw_client() for _ in range(router_module.CLIENTS_MAX)]
    await until(lambda: len(bench.router.clients) == router_module.CLIENTS_MAX)
    honest = await ready(bench, 3)
    for client in honest:
        await client.set_monitors([Monitor(800, 600)])
    for client in silent[:3]:
        await client.at_eof()
    assert len(bench.router.clients) == router_module.CLIENTS_MAX
    assert "a client was lost: it said nothing, and others came" in reasons(bench)


async def test_who_finds_no_room_is_told_so(make_bench, monkeypatch):
    monkeypatch.setattr(router_module, "CLIENTS_MAX", 2)
    bench = await make_bench()
    await ready(bench, 2)
    late = await bench.client()
    with pytest.raises(AgentGoneError, match="takes no more clients"):
        await late.wait_ready()


# --- what is kept in memory


async def filled(link, count):
    """Messages of one byte, each with as much after it as is read at once."""
    filler = bytes(250_000)
    for _ in range(count):
        link.post(UnknownMessage(98, b"x"))
        await link.send_body(Clipboard(2, 9), len(filler), pieces_of(filler))


async def test_short_messages_for_a_stopped_client_keep_no_more_than_themselves(make_bench):
    bench = await make_bench()
    stopped = await greeted(bench)
    (other,) = await ready(bench, 1)
    stop(stopped)
    bench.router.clients[0].link.pause_writing()
    with no_more_than(16 * MIB):
        await filled(bench.guest.link, 400)
        await other.set_monitors([Monitor(1, 1)])
    assert bench.router.clients[0].relay.waiting > 300
    bench.router.clients[0].link.resume_writing()
    go_on(stopped)


async def test_short_messages_for_a_paused_agent_keep_no_more_than_themselves(make_bench):
    bench = await make_bench()
    (client,) = await ready(bench, 1)
    bench.router.agent_link.pause_writing()
    with no_more_than(16 * MIB):
        await filled(client.link, 400)
        await until(lambda: bench.router.clients[0].forwarding.waiting > 300)
    bench.router.agent_link.resume_writing()


async def test_events_that_nobody_takes_keep_no_more_than_themselves(make_bench):
    bench = await make_bench()
    (client,) = await ready(bench, 1)
    client.on_event = None
    with client.events() as events:
        with no_more_than(24 * MIB):
            await filled(bench.guest.link, 400)
            for _ in range(400):
                await bench.guest.link.send(UnknownMessage(98, bytes(100_000)))
            await client.set_monitors([Monitor(1, 1)])
        await client.aclose()
        assert 30 < len([event async for event in events]) < 50


# --- turns for the guest's files


async def test_a_turn_is_not_held_by_admitting_a_file_again_and_again(
    make_bench, make_file, tmp_path, clock
):
    bench = await make_bench()
    path = make_file("file", 1000)
    bench.guest.copy_files([path])
    taking = HOST_CAPABILITIES.with_(FILES_FROM_GUEST)
    holder = await greeted(bench, capabilities=taking)
    (other,) = await ready(bench, 1, capabilities=taking)
    await other.wait_clipboard()
    # A guest that never sends.
    bench.tap.withholds = lambda message: isinstance(message, FileXferStatus)
    holder.send(ClipboardRequest(0, ClipboardType.FILE_LIST))
    start = await holder.receive(FileXferStart)
    for _ in range(2):
        holder.send(FileXferStatus(start.id, FileXferResult.CAN_SEND_DATA))
        holder.send(MonitorsConfig((Monitor(1, 1),)))
        await holder.receive(Reply)
        assert FileXferResult.CANCELLED not in results(bench)
        await clock.forward(guest_files_module.IDLE / 2)
    await until(lambda: FileXferResult.CANCELLED in results(bench))
    bench.tap.withholds = lambda message: False
    admitted = results(bench).count(FileXferResult.CAN_SEND_DATA)
    assert [p.read_bytes() for p in await other.get_files(tmp_path / "in")] == [path.read_bytes()]
    assert admitted == 1


async def test_a_guest_may_begin_as_many_files_as_it_has_listed(make_bench, make_file):
    bench = await make_bench()
    bench.guest.copy_files([make_file("file", 10)])
    client = await greeted(bench, capabilities=HOST_CAPABILITIES.with_(FILES_FROM_GUEST))
    await client.receive(ClipboardGrab)
    client.send(ClipboardRequest(0, ClipboardType.FILE_LIST))
    await client.receive(FileXferStart)
    link = bench.guest.link
    for number in range(5000):
        link.post(FileXferStart((1 << 31) + 100 + number, FileInfo("x", 1).pack()))
    await until(lambda: len(results(bench)) >= 5000)
    assert set(results(bench)) == {FileXferResult.CANCELLED}
