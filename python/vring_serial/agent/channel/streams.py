"""An agent link on a pair of asyncio streams, such as those of a port in the embedded guest."""

from __future__ import annotations

import asyncio

from vring_serial.agent.channel.link import AgentLink

READ_SIZE = 256 << 10
"""Most bytes per read."""
WRITE_HIGH = 64 << 10
"""Bytes in the writer's buffer above which the link is asked to pause."""


class StreamTransport(asyncio.Transport):
    """The transport of a link whose bytes go through streams; made by :func:`run_on_streams`."""

    def __init__(self, link: AgentLink, writer: asyncio.StreamWriter) -> None:
        super().__init__()
        self._link = link
        self._writer = writer
        self._reading = asyncio.Event()
        self._reading.set()
        self._draining: asyncio.Task[None] | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._writer.write(data)
        full = self._writer.transport.get_write_buffer_size() > WRITE_HIGH
        if full and self._draining is None:
            self._link.pause_writing()
            self._draining = asyncio.ensure_future(self._drain())

    def get_write_buffer_size(self) -> int:
        return self._writer.transport.get_write_buffer_size()

    async def _drain(self) -> None:
        try:
            await self._writer.drain()
        except ConnectionError:
            self.close()
        finally:
            self._draining = None
        self._link.resume_writing()

    def pause_reading(self) -> None:
        self._reading.clear()

    def resume_reading(self) -> None:
        self._reading.set()

    def is_closing(self) -> bool:
        return self.closed.done()

    def close(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def abort(self) -> None:
        self.close()

    async def read_into_link(self, reader: asyncio.StreamReader) -> None:
        """Feed the link until the end of the stream."""
        while data := await reader.read(READ_SIZE):
            self._link.data_received(data)
            await self._reading.wait()

    async def finish(self) -> None:
        """Let nothing run on."""
        self.close()
        if self._draining is not None:
            self._draining.cancel()
            await asyncio.gather(self._draining, return_exceptions=True)


async def run_on_streams(
    link: AgentLink, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Run a link until the stream ends or the link closes. The streams stay the caller's."""
    transport = StreamTransport(link, writer)
    link.connection_made(transport)
    reading = asyncio.ensure_future(transport.read_into_link(reader))
    error: BaseException | None = None
    try:
        await asyncio.wait({reading, transport.closed}, return_when=asyncio.FIRST_COMPLETED)
        if reading.done():
            error = reading.exception()
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await transport.finish()
        link.connection_lost(error if isinstance(error, Exception) else None)
    if error is not None:
        raise error
