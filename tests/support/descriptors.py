"""Reading and writing descriptors that do not block, with the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable


async def readable(fd: int) -> None:
    """Wait until a read of ``fd`` would not block; regular files always are."""
    await _ready(fd, asyncio.get_running_loop().add_reader, "remove_reader")


async def writable(fd: int) -> None:
    await _ready(fd, asyncio.get_running_loop().add_writer, "remove_writer")


async def _ready(fd: int, add: Callable[..., None], remove: str) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def come() -> None:
        if not ready.done():
            ready.set_result(None)

    # A duplicate, because selectors want one registration per descriptor.
    copy = os.dup(fd)
    try:
        add(copy, come)
    except PermissionError:
        os.close(copy)
        return
    try:
        await ready
    finally:
        getattr(loop, remove)(copy)
        os.close(copy)


async def read_some(fd: int, size: int = 65536) -> bytes:
    """At least one byte, or b"" at end of file; what a terminal calls EIO is that too."""
    while True:
        try:
            return os.read(fd, size)
        except BlockingIOError:
            await readable(fd)
        except OSError:
            return b""


async def read_exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await read_some(fd, size - len(data))
        assert more, f"end of file after {len(data)} of {size} bytes"
        data += more
    return data


async def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            await writable(fd)
