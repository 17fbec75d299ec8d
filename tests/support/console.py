"""Ports of a console device whose host ends are Python code, and a guest on such a device."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.waiting import DEADLINE
from vring_serial import EmbeddedGuest
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.device.console import events as ev
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.transport.vhost_user.backend import VhostUserBackend


class Recorder(asyncio.Protocol):
    """Keeps everything, and answers if told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.data = bytearray()
        self.transport: asyncio.Transport | None = None
        self.error: BaseException | None = None
        self.fail = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.calls.append("made")

    def data_received(self, data: bytes) -> None:
        assert not self.paused
        if self.fail:
            raise RuntimeError("a handler's mistake")
        self.data += data

    @property
    def paused(self) -> bool:
        assert self.transport is not None
        return not self.transport.is_reading()

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")

    def eof_received(self) -> None:
        self.calls.append("eof")

    def connection_lost(self, error: BaseException | None) -> None:
        self.calls.append("lost")
        self.error = error


class Sink(asyncio.Protocol):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.data = b""
        self.lost = False
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, error: BaseException | None) -> None:
        self.lost = True


class SinkChardev(ProtocolChardev):
    """Connects sinks, and keeps them."""

    def __init__(self, id: str, *, connected: bool = True) -> None:
        super().__init__(id, self._make, connected=connected)
        self.sinks: list[Sink] = []

    def _make(self) -> Sink:
        self.sinks.append(Sink())
        return self.sinks[-1]


def python_port(nr: int, name: str = "", *, console: bool = False, connected: bool = True) -> Port:
    return Port(nr, name, SinkChardev(f"chr{nr}", connected=connected), console=console)


def sink_of(controller: Controller, nr: int) -> Sink | None:
    """The sink that is connected to a port now."""
    chardev = controller.ports[nr].chardev
    assert isinstance(chardev, SinkChardev)
    return chardev.sinks[-1] if chardev.sinks and not chardev.sinks[-1].lost else None


def events_of(controller: Controller) -> list[ev.DeviceEvent]:
    events: list[ev.DeviceEvent] = []
    controller.on_event = events.append
    return events


@asynccontextmanager
async def guest_on(controller: Controller, path: Path) -> AsyncIterator[EmbeddedGuest]:
    """Start a controller, serve it at ``path``, and have a guest on it, all for one block."""
    async with (
        asyncio.timeout(DEADLINE),
        controller,
        VhostUserBackend(controller, str(path)),
        EmbeddedGuest(str(path), memory=16 << 20) as guest,
    ):
        yield guest
