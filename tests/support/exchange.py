"""The same bytes both ways through a port at once, with checksums."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from tests.support.bench import MIB, Stream, hang_up
from tests.support.qemu_machine import QemuMachine


class Payload:
    """Random bytes that the guest has as the file /payload."""

    def __init__(self, size: int) -> None:
        self.data = os.urandom(size)
        self.size = size

    def sha256(self, times: int = 1) -> str:
        """Of its bytes, so many times over."""
        digest = hashlib.sha256()
        for _ in range(times):
            digest.update(self.data)
        return digest.hexdigest()


class Exchange:
    """The payload so many times to the guest through a connection, and as much from the guest.

    The guest has the port open until it has read all: what has been received and is not read when a
    port is closed, Linux throws away.

    Args:
        stream: to the port's host end.
        node: the port in the guest.
        payload, times: what is moved.
        writer: what writes /payload in the guest.
        hangs_up: the host hangs up when it has sent all, and the guest reads until it notices;
            otherwise it reads just as many bytes.

    Attributes:
        sent, received: bytes so far.
        script: what the guest does for it: it prints the checksum of what it read.
    """

    def __init__(
        self,
        stream: Stream,
        node: str,
        payload: Payload,
        times: int,
        writer: str = "dd bs=64k",
        *,
        hangs_up: bool = True,
    ) -> None:
        self.sent = self.received = 0
        reader = "cat" if hangs_up else f"head -c {times * payload.size}"
        self.script = f"""
            (exec 3<>{node}
            {reader} <&3 | sha256sum &
            for i in $(seq {times}); do {writer} </payload >&3 2>/dev/null; done
            wait) &"""
        self._reader, self._writer = stream
        self._payload = payload
        self._times = times
        self._hangs_up = hangs_up

    @property
    def moved(self) -> int:
        """Bytes, in the slower direction."""
        return min(self.sent, self.received)

    async def run(self) -> str:
        """Move the bytes; the checksum of what came."""
        sending = asyncio.create_task(self._send())
        digest = hashlib.sha256()
        while self.received < self._times * self._payload.size:
            data = await self._reader.read(MIB)
            assert data, f"end of stream after {self.received} bytes"
            digest.update(data)
            self.received += len(data)
        await sending
        if self._hangs_up:
            self._writer.close()
        return digest.hexdigest()

    async def _send(self) -> None:
        for _ in range(self._times):
            for start in range(0, self._payload.size, MIB):
                self._writer.write(self._payload.data[start : start + MIB])
                await self._writer.drain()
                self.sent += MIB


async def check(
    machine: QemuMachine, *exchanges: Exchange, expected: str, timeout: float = 240
) -> None:
    """Run exchanges at once; assert that every byte arrived on both sides."""
    script = "\n".join(exchange.script for exchange in exchanges)
    async with asyncio.timeout(timeout):
        run = asyncio.create_task(machine.run(f"{script}\nwait", timeout))
        digests = await asyncio.gather(*(exchange.run() for exchange in exchanges))
        sums = await run
    assert digests == [expected] * len(exchanges)
    assert [line.split()[0] for line in sums.splitlines()] == [expected] * len(exchanges)


@asynccontextmanager
async def connections(
    connect: Callable[[str], Awaitable[Stream]], *names: str
) -> AsyncIterator[list[Stream]]:
    """Streams to host ends, all of them closed in the end."""
    streams = [await connect(name) for name in names]
    try:
        yield streams
    finally:
        await asyncio.gather(*(hang_up(writer) for _, writer in streams))
