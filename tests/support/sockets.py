"""Socket chardevs, and what connects to them."""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.support.leaks import held
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.errors import ResourceError


def reset_connection(sock: socket.socket) -> None:
    """Close a TCP socket so that its peer sees a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def unix_server(path: Path | str, **options: Any) -> SocketChardev:
    return SocketChardev(
        "dut", SocketOptions(path=str(path), server=True, **{"wait": False, **options})
    )


def tcp_server(**options: Any) -> SocketChardev:
    values: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "server": True,
        "wait": False,
        **options,
    }
    return SocketChardev("dut", SocketOptions(**values))


async def unix_client(path: Path | str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, str(path))
    return sock


async def refused(chardev: SocketChardev, *words: str) -> str:
    """Start fails with all these words, and leaves nothing open or behind."""
    before = held()
    with pytest.raises(ResourceError) as caught:
        async with asyncio.timeout(5):
            await chardev.start()
    assert held() == before
    assert chardev.end is None
    message = str(caught.value)
    for word in ("dut", *words):
        assert word in message
    return message
