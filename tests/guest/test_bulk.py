from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket

import pytest

from vring_serial.guest.bulk import BLOCK, receive_bulk, send_bulk, serve_bulk, stamped_blocks


@pytest.fixture
async def served():
    """Streams of the host's end of a socket pair whose other end answers requests."""
    host, guest = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=host)
    guest_reader, guest_writer = await asyncio.open_connection(sock=guest)
    task = asyncio.create_task(serve_bulk(guest_reader, guest_writer))
    try:
        async with asyncio.timeout(20):
            yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await task
        guest_writer.close()
        with contextlib.suppress(OSError):
            await guest_writer.wait_closed()


@pytest.mark.parametrize("size", [0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 5, 3 * BLOCK])
def test_blocks_have_the_asked_size_and_differ(size):
    blocks = list(stamped_blocks(size))
    assert sum(map(len, blocks)) == size
    assert len(set(blocks)) == len(blocks)


@pytest.mark.parametrize("size", [0, 1, 2 * BLOCK + 3])
async def test_guest_sends(served, size):
    reader, writer = served
    writer.write(f"send {size}\n".encode())
    digest = await receive_bulk(reader, size)
    assert await reader.readline() == f"sha256 {digest}\n".encode()


@pytest.mark.parametrize("size", [0, 1, 2 * BLOCK + 3])
async def test_guest_receives(served, size):
    reader, writer = served
    writer.write(f"receive {size}\n".encode())
    digest = await send_bulk(writer, size)
    assert await reader.readline() == f"sha256 {digest}\n".encode()


@pytest.mark.parametrize(
    "line", [b"", b"send", b"send -1", b"send x", b"send " + b"9" * 5000, b"steal 3", b"\xff"]
)
async def test_other_lines_are_answered_and_the_next_is_served(served, line):
    reader, writer = served
    writer.write(line + b"\nsend 3\n")
    assert (await reader.readline()).startswith(b"error ")
    assert hashlib.sha256(await reader.readexactly(3)).hexdigest() in str(await reader.readline())


async def test_early_end_is_an_error():
    reader = asyncio.StreamReader()
    reader.feed_data(b"abc")
    reader.feed_eof()
    with pytest.raises(asyncio.IncompleteReadError):
        await receive_bulk(reader, 4)
