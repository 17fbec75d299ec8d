"""HostAgent: against the embedded guest's agent, and against agents that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

import pytest

from tests.support.agents import RawClient
from tests.support.waiting import turns, until
from vring_serial import (
    AgentGone,
    AgentGoneError,
    AgentReady,
    AgentRefusedError,
    AgentTimeoutError,
    AgentTrouble,
    AgentUnsupportedError,
    ClipboardEmptyError,
    ClipboardGrabbed,
    ClipboardReleased,
    ClipboardTooLargeError,
    HostAgent,
    OtherMessage,
    StreamSource,
)
from vring_serial.agent import host as host_module
from vring_serial.agent.channel import link as link_module
from vring_serial.agent.channel.clipboard import REQUESTS_MAX
from vring_serial.agent.guest import GUEST_CAPABILITIES, GuestAgent, HostLeft
from vring_serial.proto.agent import (
    AnnounceCapabilities,
    Capabilities,
    Capability,
    ChunkError,
    Clipboard,
    ClipboardGrab,
    ClipboardRequest,
    ClipboardType,
    MaxClipboard,
    MessageError,
    MessageType,
    Monitor,
    MonitorsConfig,
    MonitorsFlag,
    Reply,
    Selection,
    UnknownMessage,
)

TEXT = ClipboardType.UTF8_TEXT


async def test_ready_and_capabilities(pair):
    await pair.connect()
    assert Capability.CLIPBOARD_GRAB_SERIAL in pair.host.capabilities
    assert Capability.FILE_XFER_DISABLED in pair.host.capabilities
    assert AgentReady(pair.host.capabilities) in pair.host_events
    assert Capability.FILE_XFER_DETAILED_ERRORS in pair.guest.host


async def test_monitors(pair):
    await pair.connect()
    wide = [Monitor(1920, 1080), Monitor(1280, 1024, x=1920)]
    await pair.host.set_monitors(wide)
    assert pair.guest.monitors == tuple(wide)
    with pytest.raises(AgentRefusedError, match="MONITORS_CONFIG"):
        await pair.host.set_monitors([Monitor(0, 0)])
    assert pair.guest.monitors == tuple(wide)
    sized = [Monitor(800, 600, width_mm=10, height_mm=10)]
    await asyncio.gather(*(pair.host.set_monitors(sized) for _ in range(3)))
    assert pair.guest.monitors == tuple(sized)


@pytest.mark.parametrize("selection", list(Selection))
async def test_clipboard_both_ways(pair, selection):
    await pair.connect()
    await pair.host.set_clipboard("from the host", selection)
    await until(lambda: ClipboardGrabbed(selection, (TEXT,)) in pair.guest_events)
    assert await pair.guest.get_clipboard(selection) == b"from the host"
    pair.guest.set_clipboard("from the guest", selection)
    assert await pair.host.wait_clipboard(selection) == (TEXT,)
    assert await pair.host.get_clipboard(selection) == "from the guest"
    pair.guest.clear_clipboard(selection)
    await until(lambda: ClipboardReleased(selection) in pair.host_events)
    with pytest.raises(ClipboardEmptyError):
        await pair.host.get_clipboard(selection)


async def test_the_host_wins_when_grabs_cross(pair):
    await pair.connect()
    for round_number in range(5):
        pair.guest.set_clipboard("guest")
        await pair.host.set_clipboard("host")
        await until(lambda: pair.guest_events[-1:] == [ClipboardGrabbed(0, (TEXT,))])
        assert pair.host.clipboard_types() == ()
        assert await pair.guest.get_clipboard() == b"host"
        pair.guest_events.clear()
        pair.guest.set_clipboard(f"later {round_number}")
        await pair.host.wait_clipboard()
        assert await pair.host.get_clipboard() == f"later {round_number}"


@pytest.mark.parametrize("size", [0, 1, 2048, 100_000, 3 << 20])
async def test_clipboard_sizes(pair, size):
    await pair.connect()
    data = bytes(i * 7 % 256 for i in range(1000)) * (size // 1000 + 1)
    data = data[:size]
    pair.guest.set_clipboard({ClipboardType.IMAGE_PNG: data})
    await pair.host.wait_clipboard()
    assert await pair.host.get_clipboard_data(ClipboardType.IMAGE_PNG) == data
    await pair.host.set_clipboard({ClipboardType.IMAGE_PNG: data})
    await until(lambda: isinstance(pair.guest_events[-1], ClipboardGrabbed))
    assert await pair.guest.get_clipboard(kind=ClipboardType.IMAGE_PNG) == data


async def test_a_streamed_clipboard_stays_in_bounded_memory(pair):
    await pair.connect()
    piece = bytes(1 << 20)
    produced = consumed = most_ahead = 0

    async def produce():
        nonlocal produced
        for _ in range(40):
            produced += len(piece)
            yield piece

    pair.guest.set_clipboard({9: StreamSource(40 << 20, produce)})
    await pair.host.wait_clipboard()
    async for got in pair.host.stream_clipboard(9):
        consumed += len(got)
        most_ahead = max(most_ahead, produced - consumed)
        await turns(1)
    assert consumed == 40 << 20
    assert most_ahead < 8 << 20


async def test_a_source_that_fails_restarts_the_session_and_the_next_works(pair):
    await pair.connect()

    async def produce():
        yield b"x" * 300_000
        raise OSError("the disk is gone")

    await pair.host.set_clipboard({9: StreamSource(400_000, produce), TEXT: b"text"})
    await until(lambda: isinstance(pair.guest_events[-1], ClipboardGrabbed))
    with pytest.raises(AgentGoneError):
        await pair.guest.get_clipboard(kind=9)
    await until(lambda: any(isinstance(e, AgentTrouble) for e in pair.host_events))
    await until(lambda: isinstance(pair.guest_events[-1], ClipboardGrabbed))
    assert await pair.guest.get_clipboard() == b"text"
    assert HostLeft() in pair.guest_events


async def test_max_clipboard_is_respected_on_both_sides(pair):
    await pair.connect()
    await pair.host.send(MaxClipboard(10))
    pair.guest.set_clipboard({TEXT: b"x" * 11, 9: b"x" * 10})
    await pair.host.wait_clipboard()
    assert await pair.host.get_clipboard_data(9) == b"x" * 10
    with pytest.raises(ClipboardEmptyError):
        await pair.host.get_clipboard()
    await pair.host.send(MaxClipboard(-1))
    assert await pair.host.get_clipboard() == "x" * 11


async def test_too_large_a_clipboard_is_refused_and_the_channel_goes_on(raw_agent):
    host = HostAgent(max_clipboard=1000, timeout=30)
    agent = await raw_agent(host)
    await agent.greet()
    agent.send(ClipboardGrab(0, (TEXT,)))
    await host.wait_clipboard()
    for size in (1001, 5 << 20):
        asking = asyncio.ensure_future(host.get_clipboard())
        await agent.receive(ClipboardRequest)
        agent.send(Clipboard(0, TEXT, bytes(size)))
        with pytest.raises(ClipboardTooLargeError, match=str(size)):
            await asking


async def test_requests_that_wait_are_bounded(raw_agent):
    events = []
    host = HostAgent(timeout=30, on_event=events.append)
    agent = await raw_agent(host)
    await agent.greet()
    await host.wait_ready()
    opened, go_on = asyncio.Event(), asyncio.Event()

    async def pieces():
        opened.set()
        await go_on.wait()
        yield b"x"

    await host.set_clipboard({TEXT: StreamSource(1, pieces)})
    agent.send(ClipboardRequest(0, TEXT))
    await opened.wait()
    for _ in range(3 * REQUESTS_MAX):
        agent.send(ClipboardRequest(0, TEXT))
    agent.send(ClipboardGrab(Selection.PRIMARY, (TEXT,)))
    await host.wait_clipboard(Selection.PRIMARY)  # so it has all requests
    go_on.set()
    for _ in range(1 + REQUESTS_MAX):
        assert (await agent.receive(Clipboard)).data == b"x"
    # Now that those are answered the next one is kept again, and no other is left.
    agent.send(ClipboardRequest(0, ClipboardType.IMAGE_PNG))
    assert (await agent.receive(Clipboard)).type == ClipboardType.NONE
    assert not [event for event in events if isinstance(event, AgentTrouble)]


async def test_an_agent_that_comes_back_is_asked_and_offered_again(pair):
    await pair.connect()
    await pair.host.set_clipboard("kept")
    await pair.disconnect()
    assert AgentGone() in pair.host_events
    assert HostLeft() in pair.guest_events
    with pytest.raises(AgentGoneError):
        await pair.host.set_monitors([Monitor(1, 1)])
    with pytest.raises(AgentGoneError):
        await pair.host.get_clipboard()
    pair.guest_events.clear()
    await pair.connect()
    await until(lambda: ClipboardGrabbed(0, (TEXT,)) in pair.guest_events)
    assert await pair.guest.get_clipboard() == b"kept"


async def test_an_agent_that_restarts_on_the_same_channel(raw_agent):
    host = HostAgent(timeout=30)
    agent = await raw_agent(host)
    await agent.greet()
    await host.wait_ready()
    for _ in range(2):
        await host.set_clipboard("kept")
        last = await agent.receive(ClipboardGrab)
    assert last.serial == 1
    agent.connection.local = None  # a new agent, on a channel that was never seen to close
    agent.send(AnnounceCapabilities(True, GUEST_CAPABILITIES))
    assert (await agent.receive(AnnounceCapabilities)).request
    agent.send(AnnounceCapabilities(False, GUEST_CAPABILITIES))
    assert await agent.receive(ClipboardGrab) == ClipboardGrab(0, (TEXT,), serial=0)


async def test_a_client_that_comes_anew_on_the_same_channel():
    ours, theirs = socket.socketpair()
    guest = GuestAgent()
    await asyncio.get_running_loop().create_connection(guest.protocol_factory, sock=ours)
    client = RawClient(*await asyncio.open_connection(sock=theirs))
    for _ in range(2):  # serials begin anew with each
        await client.greet()
        guest.set_clipboard("text")
        assert (await client.receive(ClipboardGrab)).serial == 0
    await client.aclose()
    await guest.aclose()


async def test_waiting_for_an_agent_says_how_far_it_got(raw_agent):
    host = HostAgent()
    with pytest.raises(AgentTimeoutError, match="nobody opened the channel"):
        await host.wait_ready(0.01)
    await raw_agent(host)
    with pytest.raises(AgentTimeoutError, match="open but silent"):
        await host.wait_ready(0.01)


async def test_an_agent_that_never_answers(raw_agent):
    host = HostAgent(timeout=0.05)
    agent = await raw_agent(host)
    await agent.greet()
    agent.send(ClipboardGrab(0, (TEXT,)))
    await host.wait_clipboard(timeout=30)
    with pytest.raises(AgentTimeoutError, match="MONITORS_CONFIG within"):
        await host.set_monitors([Monitor(1, 1)])
    with pytest.raises(AgentTimeoutError, match="no clipboard data"):
        await host.get_clipboard()
    with pytest.raises(AgentTimeoutError, match="took the clipboard"):
        await host.wait_clipboard(Selection.PRIMARY)


async def test_what_the_agent_has_not_announced(raw_agent):
    host = HostAgent(timeout=30)
    agent = await raw_agent(host)
    await agent.greet(
        GUEST_CAPABILITIES.without(Capability.MONITORS_CONFIG, Capability.CLIPBOARD_SELECTION)
    )
    await host.wait_ready()
    with pytest.raises(AgentUnsupportedError, match="MONITORS_CONFIG"):
        await host.set_monitors([Monitor(1, 1)])
    with pytest.raises(AgentUnsupportedError, match="CLIPBOARD_SELECTION"):
        await host.set_clipboard("x", Selection.PRIMARY)
    await host.set_clipboard("x")
    assert await agent.receive(ClipboardGrab) == ClipboardGrab(0, (TEXT,))


async def test_an_agent_without_a_clipboard(raw_agent):
    host = HostAgent(timeout=30)
    await (await raw_agent(host)).greet(Capabilities.of(Capability.REPLY))
    await host.wait_ready()
    with pytest.raises(AgentUnsupportedError, match="CLIPBOARD_BY_DEMAND"):
        await host.get_clipboard()


async def test_an_agent_without_reply_is_not_waited_for(raw_agent):
    host = HostAgent(timeout=30)
    await (await raw_agent(host)).greet(GUEST_CAPABILITIES.without(Capability.REPLY))
    await host.wait_ready()
    async with asyncio.timeout(2):
        await host.set_monitors([Monitor(1, 1)])


async def test_physical_sizes_are_left_out_for_an_agent_that_does_not_answer(raw_agent):
    host = HostAgent(timeout=0.1)
    agent = await raw_agent(host)
    await agent.greet()
    await host.wait_ready()
    setting = asyncio.ensure_future(host.set_monitors([Monitor(8, 6, width_mm=2, height_mm=1)]))
    sized = await agent.receive(MonitorsConfig)
    assert sized.flags == MonitorsFlag.USE_POS | MonitorsFlag.PHYSICAL_SIZE
    plain = await agent.receive(MonitorsConfig)
    assert plain == MonitorsConfig((Monitor(8, 6),))
    agent.send(Reply(MessageType.MONITORS_CONFIG))
    await setting


async def test_a_guest_whose_lines_end_in_crlf(raw_agent):
    host = HostAgent(timeout=30)
    agent = await raw_agent(host)
    await agent.greet(
        Capabilities.of(Capability.CLIPBOARD_BY_DEMAND, Capability.GUEST_LINEEND_CRLF)
    )
    agent.send(ClipboardGrab(0, (TEXT,)))
    await host.wait_clipboard()
    asking = asyncio.ensure_future(host.get_clipboard())
    await agent.receive(ClipboardRequest)
    agent.send(Clipboard(0, TEXT, b"one\r\ntwo\r\n\0"))
    assert await asking == "one\ntwo\n"
    await host.set_clipboard("a\nb\r\nc")
    agent.send(ClipboardRequest(0, TEXT))
    assert bytes((await agent.receive(Clipboard)).data) == b"a\r\nb\r\nc"


async def test_an_empty_answer_is_asked_for_again(raw_agent):
    host = HostAgent(timeout=30)
    agent = await raw_agent(host)
    await agent.greet()
    agent.send(ClipboardGrab(0, (TEXT,)))
    await host.wait_clipboard()
    asking = asyncio.ensure_future(host.get_clipboard())
    await agent.receive(ClipboardRequest)
    agent.send(Clipboard(0, ClipboardType.NONE))
    await agent.receive(ClipboardRequest)
    agent.send(Clipboard(0, TEXT, b"here"))
    assert await asking == "here"


async def test_an_owner_that_is_silent_after_an_empty_answer(raw_agent, clock):
    """As 0.23 is when it has lost a clipboard: empty is what is known of it."""
    host = HostAgent(timeout=30)
    agent = await raw_agent(host)
    await agent.greet()
    agent.send(ClipboardGrab(0, (TEXT,)))
    await host.wait_clipboard()
    asking = asyncio.ensure_future(host.get_clipboard())
    await agent.receive(ClipboardRequest)
    agent.send(Clipboard(0, ClipboardType.NONE))
    await agent.receive(ClipboardRequest)
    await clock.forward(host_module.ASK_AGAIN_WAIT)
    with pytest.raises(ClipboardEmptyError):
        await asking


async def test_requests_for_what_we_do_not_have_are_answered_with_nothing(raw_agent):
    host = HostAgent(timeout=30)
    agent = await raw_agent(host)
    await agent.greet()
    agent.send(ClipboardRequest(1, TEXT))
    answer = await agent.receive(Clipboard)
    assert (answer.selection, answer.type, len(answer.data)) == (1, ClipboardType.NONE, 0)


async def test_a_wrong_message_is_reported_and_the_channel_goes_on(raw_agent):
    events = []
    host = HostAgent(timeout=30, on_event=events.append)
    agent = await raw_agent(host)
    agent.writer.write(struct.pack("<II", 1, 21) + struct.pack("<IIQI", 1, 3, 0, 1) + b"x")
    await agent.greet()
    assert isinstance(events[0], AgentTrouble)
    assert isinstance(events[0].error, MessageError)


@pytest.mark.parametrize("garbage", [bytes(100), struct.pack("<II", 1, 0xFFFFFFFF)])
async def test_lost_framing_resets_the_channel(raw_agent, garbage):
    events = []
    host = HostAgent(timeout=30, on_event=events.append)
    agent = await raw_agent(host)
    await agent.greet()
    waiting = asyncio.ensure_future(host.set_monitors([Monitor(1, 1)]))
    await agent.receive(MonitorsConfig)
    agent.writer.write(garbage)
    with pytest.raises(AgentGoneError):
        await waiting
    assert isinstance(events[-2].error, ChunkError)
    assert "VDIChunkHeader" in events[-1].reason
    await (await raw_agent(host)).greet()
    await host.wait_ready()


async def test_an_agent_that_asks_and_never_reads_is_given_up(raw_agent, monkeypatch):
    monkeypatch.setattr(link_module, "CROWDED_TIMEOUT", 0.2)
    events = []
    host = HostAgent(on_event=events.append)
    agent = await raw_agent(host)
    agent.writer.transport.pause_reading()
    ask = agent.connection.send(AnnounceCapabilities(True, GUEST_CAPABILITIES))
    async with asyncio.timeout(20):
        with contextlib.suppress(ConnectionError):
            while True:
                agent.writer.write(ask * 1000)
                await agent.writer.drain()
    assert any(isinstance(e, AgentGone) and "unread" in e.reason for e in events)


async def test_a_second_connection_takes_over(raw_agent):
    events = []
    host = HostAgent(timeout=30, on_event=events.append)
    first = await raw_agent(host)
    await first.greet()
    await host.wait_ready()
    second = await raw_agent(host)
    await second.greet()
    await asyncio.wait_for(first.reader.read(), 5)
    await host.wait_ready()
    assert not any(isinstance(e, AgentGone) for e in events)


async def test_what_needs_no_action_is_an_event(pair):
    await pair.connect()
    pair.guest.link.post(Reply(77, 1))
    pair.guest.link.post(UnknownMessage(78, b"new"))
    expected = [OtherMessage(Reply(77, 1)), OtherMessage(UnknownMessage(78, b"new"))]
    await until(lambda: pair.host_events[-2:] == expected)


async def test_events_can_be_iterated(pair):
    await pair.connect()
    with pair.host.events() as events, pair.host.events() as others:
        pair.guest.set_clipboard("one")
        pair.guest.clear_clipboard()
        async with asyncio.timeout(30):
            assert await anext(events) == ClipboardGrabbed(0, (TEXT,))
            async for event in events:
                assert event == ClipboardReleased(0)
                break
            assert await anext(others) == ClipboardGrabbed(0, (TEXT,))
    pair.guest.set_clipboard("nobody listens")
    await pair.host.wait_clipboard()
    async with asyncio.timeout(30):
        # What they had not taken is left, and no more has come.
        assert await anext(others) == ClipboardReleased(0)
    for stream in (events, others):
        stream.end()
        assert not [event async for event in stream]


async def test_an_end_in_the_middle_of_a_message_is_told(raw_agent):
    events = []
    host = HostAgent(timeout=30, on_event=events.append)
    agent = await raw_agent(host)
    await agent.greet()
    agent.writer.write(struct.pack("<II", 1, 100) + b"\x01\0")
    await agent.aclose()
    await until(lambda: isinstance(events[-1], AgentGone))
    assert "in the middle of a message" in events[-1].reason
