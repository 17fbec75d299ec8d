"""Whoever stops waiting leaves the channel usable, and whoever waits is told when it is closed."""

from __future__ import annotations

import asyncio
import contextlib
import inspect

import pytest

from tests.support import waiting
from tests.support.waiting import until
from vring_serial import (
    HOST_CAPABILITIES,
    AgentGone,
    AgentGoneError,
    AgentRefusedError,
    AgentRouter,
    AgentTimeoutError,
    ClipboardEmptyError,
    ClipboardReleased,
    HostAgent,
)
from vring_serial.agent.channel import replies as replies_module
from vring_serial.agent.guest import GUEST_CAPABILITIES, GuestAgent
from vring_serial.proto.agent import (
    AGENT_AWAY,
    FILES_FROM_GUEST,
    AnnounceCapabilities,
    Capabilities,
    Clipboard,
    ClipboardGrab,
    ClipboardRequest,
    ClipboardType,
    DisplayConfig,
    FileXferResult,
    FileXferStart,
    FileXferStatus,
    MessageType,
    Monitor,
    MonitorsConfig,
    Reply,
    ReplyError,
    UnknownMessage,
)

TEXT = ClipboardType.UTF8_TEXT
PNG = ClipboardType.IMAGE_PNG
LIST = ClipboardType.FILE_LIST
MONITORS = MessageType.MONITORS_CONFIG


@pytest.fixture
async def asked(raw_agent):
    """A host that an agent has greeted, which owns its clipboard and answers nothing by itself."""
    host = HostAgent(timeout=30, capabilities=HOST_CAPABILITIES.with_(FILES_FROM_GUEST))
    agent = await raw_agent(host)
    await agent.greet()
    agent.send(ClipboardGrab(0, (TEXT, PNG, LIST)))
    await host.wait_clipboard()
    return host, agent


async def let_wait(task):
    """The task runs until it waits for something that does not come."""
    await waiting.turns()
    assert not task.done()


async def cancel(task):
    await let_wait(task)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def forever(size):
    yield bytes(size)
    await asyncio.Event().wait()


async def next_event(host):
    with host.events() as events:
        async for _ in events:
            pass


async def all_pieces(host):
    async with contextlib.aclosing(host.stream_clipboard(PNG)) as pieces:
        async for _ in pieces:
            pass


#: What waits, of every public method of HostAgent that can.
WAITING = {
    "wait_ready": lambda host, path: HostAgent.wait_ready(host),
    "set_monitors": lambda host, path: host.set_monitors([Monitor(1, 1)]),
    "get_clipboard": lambda host, path: host.get_clipboard(),
    "get_clipboard_data": lambda host, path: host.get_clipboard_data(PNG),
    "stream_clipboard": lambda host, path: all_pieces(host),
    "wait_clipboard": lambda host, path: host.wait_clipboard(1),
    "send_file": lambda host, path: host.send_file(path),
    "get_files": lambda host, path: host.get_files(path.parent / "in"),
    "send": lambda host, path: host.send(UnknownMessage(99)),
    "send_body": lambda host, path: host.send_body(UnknownMessage(99), 9000, forever(5000)),
    "events": lambda host, path: next_event(host),
}
#: Those that never wait, or are the end themselves.
NOT_WAITING = {"set_clipboard", "clear_clipboard", "aclose"}


def awaitables(kind):
    """Names of the public methods that are awaited or iterated over."""
    return {
        name
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_")
        and (
            inspect.iscoroutinefunction(method)
            or inspect.isasyncgenfunction(method)
            or name in ("events", "stream_clipboard")
        )
    }


def test_all_of_them_are_tried():
    assert awaitables(HostAgent) == WAITING.keys() | NOT_WAITING
    assert awaitables(GuestAgent) == {"run", "aclose", "get_clipboard"}
    assert awaitables(AgentRouter) == {"connect", "send", "aclose", "to_agent"}


async def begin(name, host, agent, path):
    """Begin to wait in one of them."""
    path.write_bytes(bytes(1000))
    if name == "wait_ready":
        agent.send(AnnounceCapabilities(False, Capabilities.of(AGENT_AWAY)))
        await until(lambda: host.capabilities is None)
    if name == "send":
        host.link.pause_writing()
    return asyncio.ensure_future(WAITING[name](host, path))


@pytest.mark.parametrize("name", WAITING)
async def test_a_call_that_is_cancelled_leaves_the_channel_usable(asked, tmp_path, name):
    host, agent = asked
    await cancel(await begin(name, host, agent, tmp_path / "file"))
    if name == "wait_ready":
        agent.send(AnnounceCapabilities(True, GUEST_CAPABILITIES))
        assert (await agent.receive(AnnounceCapabilities)).request
        agent.send(AnnounceCapabilities(False, GUEST_CAPABILITIES))
        agent.send(ClipboardGrab(0, (TEXT, PNG, LIST)))
        await host.wait_clipboard()
    if name == "send":
        host.link.resume_writing()
    if name == "send_body":
        # The half message is dropped with the session, and the next one begins.
        assert (await agent.receive(AnnounceCapabilities)).request
        agent.send(AnnounceCapabilities(False, GUEST_CAPABILITIES))
        agent.send(ClipboardGrab(0, (TEXT, PNG, LIST)))
        await host.wait_clipboard()
    # Late answers to what was asked for, all of them other than the next call's.
    if name == "set_monitors":
        agent.send(Reply(MONITORS, ReplyError.ERROR))
    if "clipboard" in name:
        agent.send(Clipboard(0, TEXT if name == "get_clipboard" else PNG, b"late"))
    if name == "get_files":
        agent.send(Clipboard(0, LIST, b"copy\0/late"))
        agent.send(FileXferStart(1 << 31, b"[vdagent-file-xfer]\nname=late\nsize=9\n"))
        assert (await agent.receive(FileXferStatus)).result == FileXferResult.CANCELLED
    setting = asyncio.ensure_future(host.set_monitors([Monitor(8, 6)]))
    while (await agent.receive(MonitorsConfig)).monitors != (Monitor(8, 6),):
        pass
    agent.send(Reply(MONITORS))
    await setting
    asking = asyncio.ensure_future(host.get_clipboard())
    await agent.receive(ClipboardRequest)
    agent.send(Clipboard(0, TEXT, b"in time"))
    assert await asking == "in time"
    assert not (tmp_path / "in").exists() or not list((tmp_path / "in").iterdir())


@pytest.mark.parametrize("name", WAITING)
async def test_whoever_waits_is_told_that_the_agent_is_closed(asked, tmp_path, name):
    host, agent = asked
    task = await begin(name, host, agent, tmp_path / "file")
    await let_wait(task)
    await host.aclose()
    async with asyncio.timeout(30):
        if name == "events":
            await task
        else:
            with pytest.raises(AgentGoneError):
                await task
            with pytest.raises(AgentGoneError):  # and so is who comes later
                await WAITING[name](host, tmp_path / "file")


async def test_events_end_behind_what_is_left_of_them(asked):
    host, _ = asked
    with host.events() as events, host.events() as others:
        await host.aclose()
        await host.aclose()
        for stream in (events, others):
            last = [event async for event in stream][-2:]
            assert last == [ClipboardReleased(0), AgentGone()]
        with host.events() as late:
            assert not [event async for event in late]


async def test_a_closed_agent_takes_no_other_connection(asked, raw_agent):
    host, _ = asked
    await host.aclose()
    again = await raw_agent(host)
    await again.at_eof()
    assert host.capabilities is None


# --- late answers


async def test_a_late_reply_is_not_taken_for_the_next_one(asked):
    host, agent = asked
    with pytest.raises(AgentTimeoutError):
        await host.set_monitors([Monitor(1, 1)], timeout=0.05)
    await agent.receive(MonitorsConfig)
    setting = asyncio.ensure_future(host.set_monitors([Monitor(2, 2)]))
    await let_wait(setting)
    agent.send(Reply(MONITORS, ReplyError.ERROR))
    assert (await agent.receive(MonitorsConfig)).monitors == (Monitor(2, 2),)
    agent.send(Reply(MONITORS, ReplyError.SUCCESS))
    await setting
    refused = asyncio.ensure_future(host.set_monitors([Monitor(3, 3)]))
    await agent.receive(MonitorsConfig)
    agent.send(Reply(MONITORS, ReplyError.ERROR))
    with pytest.raises(AgentRefusedError):
        await refused


async def test_an_agent_that_never_answered_is_asked_again(asked, monkeypatch):
    monkeypatch.setattr(replies_module, "REPLY_WAIT", 0.1)
    host, agent = asked
    with pytest.raises(AgentTimeoutError):
        await host.set_monitors([Monitor(1, 1)], timeout=0.05)
    setting = asyncio.ensure_future(host.set_monitors([Monitor(2, 2)], timeout=30))
    for _ in range(2):
        await agent.receive(MonitorsConfig)
    agent.send(Reply(MONITORS, ReplyError.SUCCESS))
    await setting


async def test_replies_of_other_messages_do_not_matter(asked):
    host, agent = asked
    await host.send(DisplayConfig(0))
    setting = asyncio.ensure_future(host.set_monitors([Monitor(2, 2)]))
    await agent.receive(MonitorsConfig)
    agent.send(Reply(MessageType.DISPLAY_CONFIG, ReplyError.ERROR))
    await let_wait(setting)
    agent.send(Reply(MONITORS))
    await setting


@pytest.mark.parametrize("late", [TEXT, ClipboardType.NONE])
@pytest.mark.parametrize("size", [9, 3 << 20])
async def test_a_late_clipboard_is_not_taken_for_the_next_one(asked, late, size):
    host, agent = asked
    with pytest.raises(AgentTimeoutError):
        await host.get_clipboard_data(TEXT, timeout=0.05)
    assert (await agent.receive(ClipboardRequest)).type == TEXT
    asking = asyncio.ensure_future(host.get_clipboard_data(PNG))
    await let_wait(asking)
    agent.send(Clipboard(0, late, b"" if late == ClipboardType.NONE else bytes(size)))
    assert (await agent.receive(ClipboardRequest)).type == PNG
    agent.send(Clipboard(0, PNG, b"a picture"))
    assert await asking == b"a picture"


async def test_a_clipboard_later_than_anybody_waits_is_dropped(asked, monkeypatch):
    monkeypatch.setattr(replies_module, "REPLY_WAIT", 0.1)
    host, agent = asked
    with pytest.raises(AgentTimeoutError):
        await host.get_clipboard_data(TEXT, timeout=0.05)
    asking = asyncio.ensure_future(host.get_clipboard_data(PNG))
    while (await agent.receive(ClipboardRequest)).type != PNG:
        pass
    agent.send(Clipboard(0, TEXT, b"much too late"))
    agent.send(Clipboard(0, PNG, b"a picture"))
    assert await asking == b"a picture"


async def test_a_stream_that_is_left_in_its_middle_costs_the_rest_of_it_only(asked):
    host, agent = asked
    stream = host.stream_clipboard(PNG)
    first = asyncio.ensure_future(anext(stream))
    await agent.receive(ClipboardRequest)
    agent.writer.write(agent.connection.start_body(Clipboard(0, PNG), 8 << 20))
    agent.writer.write(agent.connection.send_body(bytes(1 << 20)))
    assert len(await first)
    await stream.aclose()
    asking = asyncio.ensure_future(host.get_clipboard())
    agent.writer.write(agent.connection.send_body(bytes(7 << 20)))
    await agent.receive(ClipboardRequest)
    agent.send(Clipboard(0, TEXT, b"text"))
    assert await asking == "text"


async def test_who_takes_the_clipboard_does_not_wait_for_the_owner_before(asked):
    host, agent = asked
    asking = asyncio.ensure_future(host.get_clipboard())
    await agent.receive(ClipboardRequest)
    await host.set_clipboard("mine")
    with pytest.raises(ClipboardEmptyError):
        await asking
    await agent.receive(ClipboardGrab)
    agent.send(Clipboard(0, TEXT, b"late"))
    agent.send(ClipboardGrab(0, (TEXT,), 2))
    await host.wait_clipboard()
    asking = asyncio.ensure_future(host.get_clipboard())
    await agent.receive(ClipboardRequest)
    agent.send(Clipboard(0, TEXT, b"in time"))
    assert await asking == "in time"


# --- the guest's side, and the router


@pytest.fixture
async def asking_guest(raw_guest_host):
    """A guest's agent, and a host that owns its clipboard and answers nothing by itself."""
    guest = GuestAgent(timeout=30)
    host = await raw_guest_host(guest)
    await host.greet()
    host.send(ClipboardGrab(0, (TEXT,)))
    await until(guest.clipboard_types)
    return guest, host


async def test_the_guests_paste_is_cancelled(asking_guest):
    guest, host = asking_guest
    await cancel(asyncio.ensure_future(guest.get_clipboard()))
    await host.receive(ClipboardRequest)
    host.send(Clipboard(0, ClipboardType.NONE))
    asking = asyncio.ensure_future(guest.get_clipboard())
    await host.receive(ClipboardRequest)
    host.send(Clipboard(0, TEXT, b"here"))
    assert await asking == b"here"


async def test_the_guests_agent_is_cancelled_and_runs_again(pair):
    await pair.connect()
    await pair.disconnect()
    await pair.connect()
    await pair.host.set_monitors([Monitor(1, 1)])


async def test_whoever_waits_in_the_guest_is_told_that_it_is_closed(asking_guest):
    guest, host = asking_guest
    asking = asyncio.ensure_future(guest.get_clipboard())
    await host.receive(ClipboardRequest)
    await guest.aclose()
    with pytest.raises(AgentGoneError):
        await asking


async def test_a_message_of_the_routers_own_is_cancelled(make_bench):
    bench = await make_bench()
    client = await bench.client()
    await client.wait_ready()
    bench.router.agent_link.pause_writing()
    for message in (UnknownMessage(99), MonitorsConfig((Monitor(0, 0),))):
        await cancel(asyncio.ensure_future(bench.router.send(message)))
    sending = asyncio.ensure_future(bench.router.send(UnknownMessage(99)))
    await let_wait(sending)
    bench.router.agent_link.resume_writing()
    await sending
    await client.set_monitors([Monitor(8, 6)])


@pytest.mark.parametrize("turns", range(6))
async def test_connecting_a_client_is_cancelled(make_bench, turns):
    bench = await make_bench()
    connecting = asyncio.ensure_future(bench.router.connect(HostAgent().protocol_factory))
    await waiting.turns(turns)
    connecting.cancel()
    await asyncio.gather(connecting, return_exceptions=True)
    client = await bench.client()
    await client.wait_ready()
    await until(lambda: len(bench.router.clients) <= 2)


@pytest.mark.parametrize("turns", range(4))
async def test_closing_is_cancelled(make_bench, turns):
    bench = await make_bench()
    client = await bench.client()
    await client.wait_ready()
    closing = asyncio.ensure_future(bench.router.aclose())
    await waiting.turns(turns)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    await bench.router.aclose()
    await until(lambda: not bench.router.clients and client.capabilities is None)
