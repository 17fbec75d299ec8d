"""A SPICE server as a client of the router: it speaks for its own client, and as the server."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.agents import RawClient
from tests.support.waiting import turns, until
from vring_serial import OtherMessage, StreamSource
from vring_serial.agent.router import servers as servers_module
from vring_serial.proto.agent import (
    AnnounceCapabilities,
    Capability,
    ChunkPort,
    ClientDisconnected,
    Clipboard,
    ClipboardGrab,
    ClipboardRequest,
    ClipboardType,
    DisplayInfo,
    FileXferData,
    FileXferResult,
    FileXferStart,
    FileXferStatus,
    GraphicsDeviceInfo,
    MessageType,
    Monitor,
    MonitorsConfig,
    MouseButton,
    MouseState,
    Reply,
    UnknownMessage,
)

TEXT = ClipboardType.UTF8_TEXT
SERVER = ChunkPort.SERVER


class Device(asyncio.Protocol):
    """The server's side of its connections, each of which becomes the test's streams."""

    def __init__(self):
        self.closed = asyncio.Event()
        self.connections = []
        self.live = 0
        self._inner = None

    def connection_made(self, transport):
        self.live += 1
        reader = asyncio.StreamReader()
        self._inner = asyncio.StreamReaderProtocol(reader)
        self._inner.connection_made(transport)
        loop = asyncio.get_running_loop()
        self.connections.append(
            (reader, asyncio.StreamWriter(transport, self._inner, reader, loop))
        )

    def data_received(self, data):
        self._inner.data_received(data)

    def eof_received(self):
        self._inner.eof_received()  # which would keep the connection open the other way

    def pause_writing(self):
        self._inner.pause_writing()

    def resume_writing(self):
        self._inner.resume_writing()

    def connection_lost(self, exc):
        self.live -= 1
        self._inner.connection_lost(exc)
        self.closed.set()


@pytest.fixture
async def served(make_bench):
    """A router with a server as its client, and a function that gives the server's connection."""
    bench = await make_bench()
    device = Device()
    bench.router.connect_server(device, device.closed)

    async def server(number=0):
        await until(lambda: len(device.connections) > number)
        client = RawClient(*device.connections[number])
        bench.clients.append(client)
        return client

    return bench, device, server


async def test_messages_on_the_servers_port_stay_there(served):
    bench, _, server = served
    spice = await server()
    other = await bench.client()
    await other.wait_ready()
    bench.tap.seen.clear()
    mouse = MouseState(5, 6, MouseButton.LEFT)
    graphics = GraphicsDeviceInfo((DisplayInfo(0, 1, 2, b"pci/0000/02"),))
    for message in (mouse, graphics, UnknownMessage(99, b"?"), MonitorsConfig((Monitor(9, 9),))):
        spice.send(message, SERVER)
    spice.send(UnknownMessage(99, b"!"))
    assert (await spice.receive(Reply, SERVER)).to == MessageType.MONITORS_CONFIG
    await until(lambda: len(bench.tap.seen) == 5)
    assert [port for port, _ in bench.tap.seen] == [2, 2, 2, 2, 1]
    assert bench.guest.mouse == mouse
    assert bench.guest.graphics == graphics
    bench.guest.link.post(UnknownMessage(98, b"for the server"), SERVER)
    assert await spice.receive(UnknownMessage, SERVER) == UnknownMessage(98, b"for the server")
    await other.set_monitors([Monitor(1, 1)])
    assert not [e for e in other.seen if isinstance(e, OtherMessage)]


async def test_the_pointer_passes_between_the_pieces_of_a_long_message(served):
    bench, _, server = served
    spice = await server()
    other = await bench.client()
    await other.wait_ready()
    halfway, go_on = asyncio.Event(), asyncio.Event()
    size = 8 << 20

    async def slowly():
        yield bytes(size // 2)
        halfway.set()
        await go_on.wait()
        yield bytes(size // 2)

    await other.set_clipboard({TEXT: StreamSource(size, slowly)})
    await until(lambda: bench.guest.clipboard_types())
    pasting = asyncio.ensure_future(bench.guest.get_clipboard())
    await halfway.wait()
    spice.send(MouseState(5, 6, MouseButton.LEFT), SERVER)
    await until(lambda: bench.guest.mouse is not None)
    assert not pasting.done()
    go_on.set()
    assert await pasting == bytes(size)


async def test_a_client_of_the_server_that_leaves_takes_its_own_along_only(served, make_file):
    bench, _, server = served
    spice = await server()
    other = await bench.client()
    await other.wait_ready()
    await spice.greet()
    await other.set_clipboard("other's", 1)
    spice.send(ClipboardGrab(0, (TEXT,)))
    assert await other.wait_clipboard() == (TEXT,)
    spice.send(FileXferStart(1, b"[vdagent-file-xfer]\nname=left\nsize=99999\n"))
    assert (await spice.receive(FileXferStatus)).result == FileXferResult.CAN_SEND_DATA
    started = asyncio.Event()
    sending = asyncio.ensure_future(
        other.send_file(
            make_file("whole", 8 << 20), on_progress=lambda sent, _: sent and started.set()
        )
    )
    await started.wait()
    # In the middle of a message, as when its connection breaks.
    spice.writer.write(spice.connection.start_body(FileXferData(1), 90_000))
    spice.writer.write(spice.connection.send_body(bytes(5000)))
    spice.send(ClientDisconnected(), SERVER)
    await until(lambda: not other.clipboard_types())
    await sending
    assert (bench.downloads / "whole").stat().st_size == 8 << 20
    assert not (bench.downloads / "left").exists()
    assert bench.guest.host is not None  # nobody told the agent that its client left
    assert await bench.guest.get_clipboard(1) == b"other's"
    # The next client begins anew on the same connection.
    capabilities = await spice.greet()
    assert Capability.MONITORS_CONFIG in capabilities
    assert (await spice.receive(ClipboardGrab)).selection == 1
    spice.send(ClipboardGrab(0, (TEXT,)))
    await other.wait_clipboard()
    asking = asyncio.ensure_future(other.get_clipboard())
    assert await spice.receive(ClipboardRequest) == ClipboardRequest(0, TEXT)
    spice.send(Clipboard(0, TEXT, b"next"))
    assert await asking == "next"


async def test_what_still_waits_for_the_agent_goes_with_the_client_that_sent_it(served):
    bench, _, server = served
    spice = await server()
    await spice.greet()
    bench.writer.transport.pause_reading()
    # More than socket and transport take, less than keeps the router from reading what follows.
    for _ in range(6):
        spice.send(UnknownMessage(99, bytes(75_000)))
    spice.send(UnknownMessage(99, b"the first client's"))
    spice.send(ClientDisconnected(), SERVER)
    await spice.greet()
    spice.send(UnknownMessage(99, b"the next client's"))
    bench.writer.transport.resume_reading()
    await until(lambda: UnknownMessage(99, b"the next client's") in bench.tap.of(UnknownMessage))
    assert UnknownMessage(99, b"the first client's") not in bench.tap.of(UnknownMessage)


async def test_it_is_connected_while_the_agent_is_there(served):
    bench, device, server = served
    spice = await server()
    await bench.stop_guest()
    await spice.at_eof()
    await until(lambda: not device.live)
    await turns()
    assert len(device.connections) == 1
    await bench.start_guest()
    again = await server(1)
    assert Capability.MONITORS_CONFIG in await again.greet()
    assert device.live == 1


async def test_an_agent_that_comes_back_at_once(served):
    """A new connection to it takes over before the old one has ended."""
    bench, device, server = served
    await server()
    old, bench.running, bench.writer = (bench.running, bench.writer), None, None
    await bench.start_guest()
    again = await server(1)
    await again.greet()
    assert device.live == 1
    old[0].cancel()
    await asyncio.gather(old[0], return_exceptions=True)
    old[1].close()


async def test_a_server_that_drops_the_agent_gets_it_again(served, clock):
    bench, _, server = served
    spice = await server()
    await spice.aclose()
    await until(lambda: not bench.router.clients)
    await clock.forward(servers_module.SERVER_RETRY)
    again = await server(1)
    assert (await again.receive(AnnounceCapabilities)).request
    assert len(bench.router.clients) == 1


async def test_a_server_that_no_descriptor_is_left_for_comes_later(
    make_bench, out_of_descriptors, clock, caplog
):
    bench = await make_bench()
    device = Device()
    with out_of_descriptors():
        bench.router.connect_server(device, device.closed)
        await until(lambda: "cannot be connected to the agent" in caplog.text)
        for _ in range(3):  # attempts more, of which nothing is said
            await clock.forward(servers_module.SERVER_RETRY)
    await clock.forward(servers_module.SERVER_RETRY)
    await until(lambda: device.live == 1)
    assert caplog.text.count("cannot be connected to the agent: Too many open files") == 1


async def test_a_callback_that_raises_costs_nobody_the_agent(make_bench, caplog):
    bench = await make_bench()
    told = []

    def on_event(event):
        told.append(event)
        raise ValueError("oops")

    bench.router.on_event = None
    bench.router.on_event = on_event
    bench.router.emit(OtherMessage(MouseState(0, 0, MouseButton(0), 0)))
    client = await bench.client()
    await client.wait_ready()
    assert told
    assert "on_event failed" in caplog.text
