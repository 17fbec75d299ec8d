"""Every bound on what one end may make the other keep, at its edge."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.waiting import turns, until
from vring_serial import HOST_CAPABILITIES, AgentTrouble, ClipboardEmptyError, HostAgent
from vring_serial.agent import events as events_module
from vring_serial.agent.channel import link as link_module
from vring_serial.agent.channel.body import BodyReader
from vring_serial.agent.channel.link import (
    CROWDED,
    CROWDED_BYTES,
    QUEUE_BYTES,
    QUEUE_MAX,
    AgentLink,
)
from vring_serial.agent.channel.receiver import SAME_NAME_MAX, FileReceiver
from vring_serial.agent.host import EMPTY_ANSWERS_TRIED
from vring_serial.agent.router import client as client_module
from vring_serial.agent.router import guest_files as guest_files_module
from vring_serial.agent.router import relay as relay_module
from vring_serial.agent.router import router as router_module
from vring_serial.agent.router import transfers as transfers_module
from vring_serial.proto.agent import (
    FILES_FROM_GUEST,
    AgentConnection,
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
    ReplyError,
    Side,
    UnknownMessage,
)

TEXT = ClipboardType.UTF8_TEXT


class Owner:
    """Keeps what a link tells."""

    def __init__(self):
        self.messages = []
        self.reason = None

    def link_up(self, link):
        pass

    def link_down(self, link, reason):
        self.reason = reason

    def link_message(self, link, port, message):
        self.messages.append(message)

    def link_body(self, link, port, head, size):
        return None

    def link_trouble(self, link, error):
        raise error


class Transport(asyncio.Transport):
    """A peer that reads nothing."""

    def __init__(self, link):
        super().__init__()
        self.link = link
        self.reading = True
        self.open = True

    def write(self, data):
        pass

    def get_write_buffer_size(self):
        return 0

    def is_closing(self):
        return not self.open

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True

    def abort(self):
        self.open = False
        self.link.connection_lost(None)


@pytest.fixture
async def link():
    """A link whose transport asks to pause."""
    owner = Owner()
    link = AgentLink(Side.GUEST, owner, is_patient=True)
    link.owner = owner
    link.transport = Transport(link)
    link.connection_made(link.transport)
    link.pause_writing()
    return link


@pytest.mark.parametrize(
    ("size", "most"),
    [(0, QUEUE_MAX), (100_000, QUEUE_BYTES // (100_000 + 256))],
)
async def test_a_link_is_given_up_with_so_many_messages_or_bytes_waiting(link, size, most):
    for _ in range(most):
        link.post(UnknownMessage(99, bytes(size)))
    assert link.is_open
    link.post(UnknownMessage(99, bytes(size)))
    assert not link.is_open
    assert str(link.owner.reason) == f"the other end left {most + 1} messages unread"


@pytest.mark.parametrize(
    ("size", "most"),
    [(0, CROWDED - 1), (100_000, CROWDED_BYTES // (100_000 + 256))],
)
async def test_a_peer_is_not_read_with_so_many_messages_or_bytes_waiting(link, size, most):
    for _ in range(most):
        link.post(UnknownMessage(99, bytes(size)))
    assert link.transport.reading
    link.post(UnknownMessage(99, bytes(size)))
    assert not link.transport.reading
    link.resume_writing()
    await turns(1)
    assert link.transport.reading


async def test_one_peer_has_one_turn_of_the_loop(link, monkeypatch):
    monkeypatch.setattr(link_module, "TURN_SECONDS", -1)  # over with the first message
    peer = AgentConnection(Side.HOST)
    messages = [UnknownMessage(99, b"%d" % number) for number in range(3)]
    link.data_received(b"".join(map(peer.send, messages)))
    for count in range(1, 4):
        assert len(link.owner.messages) == count
        assert not link.transport.reading
        await turns(2)
    await turns(1)
    assert link.transport.reading


async def test_a_link_is_not_read_while_its_consumer_lags_behind(link):
    reader = BodyReader(link, "data")
    reader.feed(bytes(BodyReader.HOLD_AT))
    assert link.transport.reading
    reader.feed(b"1")
    assert not link.transport.reading
    reader.end(complete=True)
    assert [len(piece) async for piece in reader.pieces(1)] == [BodyReader.HOLD_AT + 1]
    await turns(1)
    assert link.transport.reading


def test_files_of_one_name(tmp_path):
    said = []
    receiver = FileReceiver(tmp_path, said.append)
    for number in range(SAME_NAME_MAX):
        receiver.start(FileXferStart(number, FileInfo("x", 0).pack()))
        receiver.data(number, b"")
        assert said.pop().result == FileXferResult.SUCCESS
    receiver.start(FileXferStart(SAME_NAME_MAX, FileInfo("x", 0).pack()))
    assert said.pop().result == FileXferResult.ERROR
    assert len(list(tmp_path.iterdir())) == SAME_NAME_MAX


async def test_empty_answers(raw_agent):
    host = HostAgent(timeout=30)
    agent = await raw_agent(host)
    await agent.greet()
    agent.send(ClipboardGrab(0, (TEXT,)))
    await host.wait_clipboard()
    asking = asyncio.ensure_future(host.get_clipboard())
    for _ in range(EMPTY_ANSWERS_TRIED):
        assert not asking.done()
        await agent.receive(ClipboardRequest)
        agent.send(Clipboard(0, ClipboardType.NONE))
    with pytest.raises(ClipboardEmptyError):
        await asking
    await host.send(UnknownMessage(99))
    assert await agent.receive((ClipboardRequest, UnknownMessage)) == UnknownMessage(99)


async def test_events_that_an_iterator_does_not_take(raw_agent, monkeypatch):
    monkeypatch.setattr(events_module, "EVENTS_MAX", 3)
    host = HostAgent(timeout=30)
    agent = await raw_agent(host)
    await agent.greet()
    await host.wait_ready()
    with host.events() as events:
        for number in range(10):
            agent.send(ClipboardGrab(0, (number,), number))
        await until(lambda: host.clipboard_types() == (9,))
        await host.aclose()
        assert len([event async for event in events]) == 3


async def test_transfers_of_one_client(make_bench, monkeypatch):
    monkeypatch.setattr(transfers_module, "CLIENT_TRANSFERS_MAX", 2)
    bench = await make_bench()
    client = await bench.raw_client()
    await client.greet()
    for number in range(3):
        client.send(FileXferStart(number, FileInfo(f"{number}", 1).pack()))
    results = {}
    for _ in range(3):
        status = await client.receive(FileXferStatus)
        results[status.id] = status.result
    admitted = FileXferResult.CAN_SEND_DATA
    assert results == {0: admitted, 1: admitted, 2: FileXferResult.ERROR}


async def test_replies_that_are_outstanding(make_bench, monkeypatch):
    monkeypatch.setattr(router_module, "REPLIES_MAX", 2)
    bench = await make_bench()
    bench.tap.withholds = lambda message: isinstance(message, MonitorsConfig)  # nor answers it
    client = await bench.raw_client()
    await client.greet()
    for _ in range(3):
        client.send(MonitorsConfig((Monitor(1, 1),)))
    assert (await client.receive(Reply)).error == ReplyError.ERROR


async def test_clients_that_are_being_turned_away(make_bench, monkeypatch):
    monkeypatch.setattr(router_module, "CLIENTS_MAX", 1)
    monkeypatch.setattr(client_module, "TURNED_AWAY_WAIT", 60)
    bench = await make_bench()
    await (await bench.client()).wait_ready()
    lingering, late = await bench.raw_client(), await bench.raw_client()
    await late.at_eof()
    assert len(bench.router.turned_away) == 1
    await lingering.aclose()
    await until(lambda: not bench.router.turned_away)


async def test_long_messages_for_one_client(make_bench, monkeypatch):
    monkeypatch.setattr(relay_module, "SPOOLED_MAX", 2 << 20)
    monkeypatch.setattr(relay_module, "HOLD_SECONDS", 60)
    bench = await make_bench()
    client = await bench.raw_client()
    await client.greet()
    client.writer.transport.pause_reading()
    other = await bench.client()
    await other.wait_ready()

    async def zeros(size):
        yield bytes(size)

    for _ in range(8):
        await bench.guest.link.send_body(UnknownMessage(78), 1 << 20, zeros(1 << 20))
    await until(lambda: len(bench.router.clients) == 1)
    (trouble,) = (e for e in bench.router_events if isinstance(e, AgentTrouble))
    assert "bytes of long messages unread" in str(trouble.error)


async def test_a_list_of_files_that_is_too_long(make_bench, make_file, monkeypatch):
    monkeypatch.setattr(guest_files_module, "LIST_BYTES_MAX", 10)
    bench = await make_bench()
    bench.guest.copy_files([make_file("x", 1)])
    client = await bench.client(capabilities=HOST_CAPABILITIES.with_(FILES_FROM_GUEST))
    await client.wait_clipboard()
    with pytest.raises(ClipboardEmptyError):
        await client.get_clipboard_data(ClipboardType.FILE_LIST)
    assert any(
        "a list of files of" in str(e.error)
        for e in bench.router_events
        if isinstance(e, AgentTrouble)
    )
