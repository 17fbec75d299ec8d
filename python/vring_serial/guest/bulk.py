"""A port that sends and receives bulk data on request, with checksums, as ``vring demo`` asks.

The host writes one line at a time and the guest answers:

- ``send N``: the guest writes N bytes, then the line ``sha256 HEX`` of them;
- ``receive N`` and N bytes after it: the guest answers ``sha256 HEX`` of what arrived;
- anything else: ``error WHY``.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator

#: Bytes per write; each block starts with its number, so that no two blocks are alike.
BLOCK = 1 << 20
#: Most bytes that one request may name.
MAX_BYTES = 1 << 40


def stamped_blocks(total: int) -> Iterator[bytes]:
    """Blocks of random bytes, ``total`` bytes together, every one different from all the others."""
    body = os.urandom(BLOCK - 8)
    for number, start in enumerate(range(0, total, BLOCK)):
        block = number.to_bytes(8, "little") + body
        yield block[: total - start]


async def send_bulk(writer: asyncio.StreamWriter, total: int) -> str:
    """Write ``total`` bytes as fast as the other side takes them. Returns their SHA-256, in hex."""
    digest = hashlib.sha256()
    for block in stamped_blocks(total):
        writer.write(block)
        digest.update(block)
        await writer.drain()
    return digest.hexdigest()


async def receive_bulk(reader: asyncio.StreamReader, total: int) -> str:
    """Read ``total`` bytes. Returns their SHA-256, in hex. Raises IncompleteReadError."""
    digest = hashlib.sha256()
    left = total
    while left:
        data = await reader.read(min(left, BLOCK))
        if not data:
            raise asyncio.IncompleteReadError(b"", left)
        digest.update(data)
        left -= len(data)
    return digest.hexdigest()


def is_count(word: bytes) -> bool:
    """Return whether ``word`` is a number of bytes that a request may name."""
    return word.isdigit() and len(word) <= 16 and int(word) <= MAX_BYTES


async def serve_bulk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer requests on an open port until the host end goes away."""
    while line := await reader.readline():
        match line.split():
            case [b"send", count] if is_count(count):
                answer = f"sha256 {await send_bulk(writer, int(count))}"
            case [b"receive", count] if is_count(count):
                answer = f"sha256 {await receive_bulk(reader, int(count))}"
            case _:
                answer = f"error {line[:64]!r} is neither `send N` nor `receive N`"
        writer.write(answer.encode() + b"\n")
        await writer.drain()
