"""``vring agent monitor``: the messages of a channel, decoded, as they pass."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import socket

import click

from vring_serial.accept import Acceptor
from vring_serial.cli import PATH
from vring_serial.cli.agent.channel import Channel
from vring_serial.cli.plain import escaped
from vring_serial.cli.signals import run_until_signal
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.proto.agent import (
    AgentConnection,
    AgentProtocolError,
    AnnounceCapabilities,
    BodyEnded,
    BodyReceived,
    BodyStarted,
    Capabilities,
    ChunkError,
    Event,
    MessageReceived,
    Side,
)
from vring_serial.unix_socket import UnixListener

#: Bytes read from a side at once.
READ_SIZE = 64 << 10
#: Seconds for one side to take what the other left for it when it closed.
LAST_WORDS = 2.0
#: Characters of a message that are shown.
SHOWN = 300

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Decoder:
    """Shows one direction of a channel; what cannot be decoded is said once and then passed over.

    Args:
        name: the sender.
        side: which side reads this direction.
    """

    def __init__(self, name: str, side: Side) -> None:
        self._name = name
        self._connection = AgentConnection(side)
        self._broken = False

    def feed(self, data: bytes) -> None:
        """Show the messages that end in ``data``."""
        if self._broken:
            return
        self._connection.receive_data(data)
        while True:
            try:
                event = self._connection.next_event()
            except ChunkError as error:
                self._show(f"not an agent channel any more: {error}")
                self._broken = True
                return
            except AgentProtocolError as error:
                self._show(f"malformed: {error}")
                continue
            if event is None:
                return
            self._show_event(event)

    def _show_event(self, event: Event) -> None:
        match event:
            case MessageReceived(port, AnnounceCapabilities(request, capabilities)):
                names = " ".join(capabilities.names()) or "none"
                asks = ", asks for ours" if request else ""
                self._show(f"port {port} AnnounceCapabilities: {names}{asks}")
            case MessageReceived(port, message):
                self._show(f"port {port} {message}")
            case BodyStarted(port, head, size):
                self._show(f"port {port} {head} and {size} bytes")
            case BodyEnded(port, complete=False):
                self._show(f"port {port} (the message ended early)")
            case BodyReceived() | BodyEnded():
                pass

    def _show(self, text: str) -> None:
        time = datetime.datetime.now().isoformat(" ", "milliseconds")
        line = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
        click.echo(escaped(f"{time} {self._name}: {line}"))


@click.command("monitor")
@click.option(
    "--listen",
    type=PATH,
    metavar="PATH",
    help="Stand between the channel and a client that connects here, and show both directions.",
)
@click.pass_obj
def monitor_command(channel: Channel, listen: str | None) -> None:
    """Show the messages of the channel, decoded, until interrupted.

    Alone it announces itself as a client and shows what the agent sends. With --listen it passes
    everything on between a client of that socket and the channel, unchanged.
    """
    channel.check()
    if listen is not None and os.path.abspath(listen) == os.path.abspath(channel.address):
        raise ConfigError("is the channel's own socket", f"--listen {listen}")
    run_until_signal(lambda: _watch(channel) if listen is None else _between(channel, listen))


async def _streams(channel: Channel) -> Streams:
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await channel.open(lambda: protocol)
    transport = reader._transport  # type: ignore[attr-defined]
    writer = asyncio.StreamWriter(transport, protocol, reader, asyncio.get_running_loop())
    return reader, writer


async def _watch(channel: Channel) -> None:
    """Show what the agent sends to a client that only asked for its capabilities."""
    reader, writer = await _streams(channel)
    decoder = Decoder("guest", Side.HOST)
    announcement = AnnounceCapabilities(True, Capabilities.of())
    writer.write(AgentConnection(Side.HOST).send(announcement))
    try:
        while data := await reader.read(READ_SIZE):
            decoder.feed(data)
    finally:
        writer.close()
    raise ResourceError("the channel was closed at its other end")


async def _between(channel: Channel, path: str) -> None:
    """Serve one client after another, each with a connection of its own to the channel."""
    clients: asyncio.Queue[socket.socket] = asyncio.Queue()
    name = f"--listen {path}"
    acceptor = Acceptor(clients.put_nowait, name=name, peer="client", one_at_a_time=True)
    listener = UnixListener(path)
    try:
        acceptor.open([listener.socket])
        while True:
            client = await asyncio.open_unix_connection(sock=await clients.get())
            try:
                agent = await _streams(channel)
            except BaseException:
                client[1].close()
                raise
            await _relay(client, agent)
            acceptor.resume()
    finally:
        acceptor.close()
        listener.close()


async def _relay(client: Streams, agent: Streams) -> None:
    """Pass bytes on in both directions until one side closes."""
    ways = (
        asyncio.ensure_future(_pass(client[0], agent[1], Decoder("client", Side.GUEST))),
        asyncio.ensure_future(_pass(agent[0], client[1], Decoder("guest", Side.HOST))),
    )
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        try:
            async with asyncio.timeout(LAST_WORDS):
                for _, writer in (client, agent):
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
        except TimeoutError:
            pass
        finally:  # who does not read what was left for him is waited for no longer
            for _, writer in (client, agent):
                writer.transport.abort()


async def _pass(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decoder: Decoder
) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(READ_SIZE):
            decoder.feed(data)
            writer.write(data)
            await writer.drain()
