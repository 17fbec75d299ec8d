"""A client of a ``console`` host end that does what a test says."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.support.waiting import DEADLINE
from vring_serial.proto.attach import (
    INPUT_MAX,
    Frame,
    FrameParser,
    Hello,
    Kind,
    Lost,
    Welcome,
    pack_frame,
)


class Client:
    """One connection; :meth:`come` begins it.

    Attributes:
        welcome: the server's.
        shown: what came after it, without what was lost.
        position: in the stream.
        lost: how much was left out, each time.
        bye: what the server said at the end.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.welcome = Welcome(0, 0, 0)
        self.shown = bytearray()
        self.position = 0
        self.lost: list[int] = []
        self.bye = ""
        self._reader = reader
        self._writer = writer
        self._parser = FrameParser(from_server=True)

    @classmethod
    async def connect(cls, path: str | Path) -> Self:
        """Connect, and say nothing."""
        return cls(*await asyncio.open_unix_connection(path))

    @classmethod
    async def come(cls, path: str | Path, hello: Hello | None = None) -> Self:
        """Connect and wait for WELCOME. Raises ConnectionResetError: the server was gone before."""
        client = await cls.connect(path)
        client.send(Kind.HELLO, (hello or Hello()).pack())
        frame = await client.next()
        if frame is None:
            client.close()
            raise ConnectionResetError("no WELCOME")
        assert frame.kind is Kind.WELCOME, frame
        client.welcome = Welcome.unpack(frame.payload)
        client.position = client.welcome.position
        return client

    def send(self, kind: Kind, payload: bytes) -> None:
        """Send a frame."""
        self._writer.write(pack_frame(kind, payload))

    def send_raw(self, data: bytes) -> None:
        """Send bytes."""
        self._writer.write(data)

    @property
    def sock(self) -> socket.socket:
        """Its end of the connection once more, the caller's to close."""
        found = self._writer.get_extra_info("socket")
        return socket.socket(fileno=os.dup(found.fileno()))

    def type(self, data: bytes) -> None:
        """Send INPUT."""
        for at in range(0, len(data), INPUT_MAX):
            self.send(Kind.INPUT, data[at : at + INPUT_MAX])

    async def next(self) -> Frame | None:
        """Return the next frame; None at the end of the connection."""
        async with asyncio.timeout(DEADLINE):
            while (frame := self._parser.next_message()) is None:
                try:
                    data = await self._reader.read(1 << 16)
                except ConnectionError:
                    return None
                if not data:
                    return None
                self._parser.receive_data(data)
        return frame

    async def take(self) -> bool:
        """Take one frame into account; return whether there was one."""
        frame = await self.next()
        if frame is None:
            return False
        if frame.kind is Kind.DATA:
            self.shown += frame.payload
            self.position += len(frame.payload)
        elif frame.kind is Kind.LOST:
            self.lost.append(Lost.unpack(frame.payload).count)
            self.position += self.lost[-1]
        else:
            self.bye = frame.payload.decode()
        return True

    async def reach(self, position: int) -> None:
        """Take frames up to this position in the stream."""
        while self.position < position:
            assert await self.take(), (self.position, position, self.bye)

    async def end(self) -> None:
        """Take frames until the server closes."""
        while await self.take():
            pass

    def close(self) -> None:
        """Leave."""
        with suppress(OSError):
            self._writer.transport.abort()
