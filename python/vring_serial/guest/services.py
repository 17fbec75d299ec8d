"""What a guest can do with a port by itself, and how it keeps doing it while hosts come and go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from vring_serial.guest.port import GuestPort

log = logging.getLogger(__name__)

#: Bytes per read of an echoing port.
ECHO_SIZE = 1 << 18

Service = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def serve_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what arrives, until the host end goes away."""
    while data := await reader.read(ECHO_SIZE):
        writer.write(data)
        await writer.drain()


async def keep_serving(port: GuestPort, service: Service) -> None:
    """Run a service on a port, one host end after another, until the port is gone.

    A service that fails because of what its peer did closes the port and opens it anew.
    """
    while port.removed is None:
        try:
            reader, writer = await port.open()
        except ConnectionError:
            break
        try:
            await service(reader, writer)
            if not reader.at_eof():
                await _close(writer)
        except (ConnectionError, asyncio.IncompleteReadError, ValueError) as error:
            if port.removed is None:
                log.warning("port %d: %s", port.nr, error)
                await _close(writer)
        except asyncio.CancelledError:
            writer.close()
            raise
    log.info("port %d: %s", port.nr, port.removed)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    try:
        await writer.wait_closed()
    except ConnectionError:
        return
