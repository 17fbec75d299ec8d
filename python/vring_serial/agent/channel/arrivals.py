"""Waiting for the files that a guest sends to the host."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from vring_serial.agent.errors import AgentGoneError, AgentTimeoutError, FileTransferError


class Arrivals:
    """The files of one list, as they come to their ends."""

    def __init__(self) -> None:
        self._ended: asyncio.Queue[Path | AgentGoneError | None] = asyncio.Queue()
        self._there: list[Path] = []

    def ended(self, path: Path | None) -> None:
        """Count a transfer that has ended, with the file or without."""
        if path is not None:
            self._there.append(path)
        self._ended.put_nowait(path)

    def agent_left(self) -> None:
        """End the waiting: no more files will come."""
        self._ended.put_nowait(AgentGoneError("the agent went away with files missing"))

    def remove(self) -> None:
        """Delete the files that came."""
        for path in self._there:
            with contextlib.suppress(OSError):
                path.unlink()

    async def all(self, count: int, timeout: float) -> list[Path]:
        """Wait for the ends of ``count`` transfers, and return the paths of the files.

        Raises FileTransferError if one of them did not come, AgentTimeoutError if one takes longer
        than ``timeout`` seconds, AgentGoneError.
        """
        for number in range(count):
            try:
                async with asyncio.timeout(timeout):
                    path = await self._ended.get()
            except TimeoutError:
                raise AgentTimeoutError(
                    f"file {number + 1} of {count} did not come from the guest within {timeout:g} s"
                ) from None
            if isinstance(path, AgentGoneError):
                raise path
        if len(self._there) < count:
            raise FileTransferError(f"{count - len(self._there)} of {count} files did not come")
        return list(self._there)
