"""``vring agent monitor``: show the messages of a channel, decoded."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import enum
import os
import socket

import click

from vring_serial.accept import Acceptor
from vring_serial.cli import PATH, STATUS_NO_SERVER, StatusError
from vring_serial.cli.agent.channel import Channel, json_option, print_json
from vring_serial.cli.plain import escaped
from vring_serial.cli.signals import run_until_signal
from vring_serial.errors import ConfigError
from vring_serial.proto.agent import (
    AgentConnection,
    AgentProtocolError,
    AnnounceCapabilities,
    BodyEnded,
    BodyReceived,
    BodyStarted,
    Capabilities,
    ChunkError,
    Clipboard,
    ClipboardGrab,
    ClipboardRequest,
    Event,
    FileXferResult,
    FileXferStatus,
    MessageReceived,
    Reply,
    ReplyError,
    Side,
    clipboard_type_name,
    message_name,
)
from vring_serial.unix_socket import UnixListener

#: Bytes per read.
READ_SIZE = 64 << 10
#: Time for one side to take what the other sent before it closed, in seconds.
LAST_WORDS = 2.0
#: Maximum length of a shown message; an announcement of all known capabilities fits.
SHOWN = 800

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Decoder:
    """A decoder that prints the messages of one direction of a channel.

    For bytes that are not a valid chunk it prints one line, and then nothing more.

    Args:
        name: the sender's name, in front of each line.
        side: the receiving side.
        as_json: print JSON.
    """

    def __init__(self, name: str, side: Side, *, as_json: bool = False) -> None:
        self._name = name
        self._as_json = as_json
        self._connection = AgentConnection(side)
        self._broken = False
        # The capabilities that were last announced in this direction.
        self._announced: Capabilities | None = None

    def feed(self, data: bytes) -> None:
        """Print the messages whose last byte is in ``data``."""
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
                # Each end announces its capabilities, and again when asked.
                names = "as before"
                if capabilities != self._announced:
                    names = " ".join(capabilities.names()) or "none"
                self._announced = capabilities
                kind = "request" if request else "answer"
                self._show(f"port {port} AnnounceCapabilities ({kind}): {names}")
            case MessageReceived(port, message):
                self._show(f"port {port} {plain(message)}")
            case BodyStarted(port, head, size):
                self._show(f"port {port} {plain(head)} and {size} bytes")
            case BodyEnded(port, complete=False):
                self._show(f"port {port} (the message ended early)")
            case BodyReceived() | BodyEnded():
                pass

    def _show(self, text: str) -> None:
        time = datetime.datetime.now().isoformat(" ", "milliseconds")
        line = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
        if self._as_json:
            print_json({"time": time, "from": self._name, "message": line})
            return
        click.echo(escaped(f"{time} {self._name}: {line}"))


def plain(value: object) -> str:
    """Return a message, or the value of a field, as text, with names of fields and constants."""
    match value:
        case Capabilities():
            return f"[{', '.join(value.names())}]"
        case enum.Flag() | enum.Enum():
            return value.name or str(value.value)
        case tuple() | list():
            return f"[{', '.join(map(plain, value))}]"
        case bytes() | bytearray() | memoryview():
            return bytes(value).decode("utf-8", "backslashreplace")
        case _ if dataclasses.is_dataclass(value):
            fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
            shown = (f"{name}={_field(value, name, held)}" for name, held in fields if held != b"")
            return " ".join((type(value).__name__, *shown))
        case _:
            return str(value)


def _field(message: object, name: str, value: object) -> str:
    match message, name, value:
        case (Clipboard() | ClipboardRequest(), "type", int()):
            return clipboard_type_name(value)
        case (ClipboardGrab(), "types", tuple()):
            return plain([clipboard_type_name(kind) for kind in value])
        case (Reply(), "to", int()):
            return message_name(value)
        case (Reply(), "error", int()):
            return _constant(ReplyError, value)
        case (FileXferStatus(), "result", int()):
            return _constant(FileXferResult, value)
    return plain(value)


def _constant(kind: type[enum.IntEnum], value: int) -> str:
    return kind(value).name if value in kind._value2member_map_ else str(value)


@click.command("monitor")
@click.option(
    "--listen",
    type=PATH,
    metavar="PATH",
    help="Stand between the channel and a client that connects here, and show both directions.",
)
@json_option
@click.pass_obj
def monitor_command(channel: Channel, listen: str | None, as_json: bool) -> None:
    """Show the messages of the channel, decoded, until interrupted.

    Without --listen it connects as a client and shows what the agent sends. With --listen it
    relays all bytes between a client of that socket and the channel, unchanged.
    """
    channel.check()
    if listen is not None and os.path.abspath(listen) == os.path.abspath(channel.address):
        raise ConfigError("is the channel's own socket", f"--listen {listen}")
    channel = dataclasses.replace(channel, as_json=as_json or channel.as_json)
    run_until_signal(lambda: _watch(channel) if listen is None else _between(channel, listen))


async def _streams(channel: Channel) -> Streams:
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    transport = await channel.open(lambda: protocol)
    writer = asyncio.StreamWriter(transport, protocol, reader, asyncio.get_running_loop())
    return reader, writer


async def _watch(channel: Channel) -> None:
    """Show what the agent sends to a client that only asked for its capabilities."""
    reader, writer = await _streams(channel)
    decoder = Decoder("guest", Side.HOST, as_json=channel.as_json)
    announcement = AnnounceCapabilities(True, Capabilities.of())
    writer.write(AgentConnection(Side.HOST).send(announcement))
    try:
        while data := await reader.read(READ_SIZE):
            decoder.feed(data)
    finally:
        writer.close()
    raise StatusError("the channel was closed at its other end", STATUS_NO_SERVER)


async def _between(channel: Channel, path: str) -> None:
    """Serve one client at a time, each with a new connection to the channel."""
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
            await _relay(client, agent, as_json=channel.as_json)
            acceptor.resume()
    finally:
        acceptor.close()
        listener.close()


async def _relay(client: Streams, agent: Streams, *, as_json: bool) -> None:
    """Relay bytes in both directions until one side closes."""
    there = Decoder("client", Side.GUEST, as_json=as_json)
    back = Decoder("guest", Side.HOST, as_json=as_json)
    ways = (
        asyncio.ensure_future(_pass(client[0], agent[1], there)),
        asyncio.ensure_future(_pass(agent[0], client[1], back)),
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
