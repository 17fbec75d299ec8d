"""A desktop for the embedded guest's agent, and a port over which it can be asked: for scripts.

One JSON object a line each way. ``{"do": "resolution"}`` answers ``{"result": [1920, 1080]}``, the
size of the first monitor, or null; ``{"do": "paste"}`` the text that a program in the guest would
paste; ``{"do": "copy", "text": "..."}`` copies. What goes wrong is ``{"error": "..."}``.
"""

from __future__ import annotations

import asyncio
import json

from vring_serial.agent.errors import AgentError
from vring_serial.guest.agent import GuestAgent

#: Longest request in bytes, which bounds a text to copy.
MAX_REQUEST = 64 << 20


class Desktop:
    """The desktop that a guest agent tells of its host's wishes.

    Attributes:
        agent: its ``run`` serves the agent's port, :meth:`serve` the port for scripts.
    """

    def __init__(self) -> None:
        self.agent = GuestAgent()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer requests until the host end goes away."""
        while line := await _read_line(reader):
            try:
                answer: dict[str, object] = {"result": await self._do(line)}
            except (ValueError, AgentError) as error:
                answer = {"error": str(error)}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()

    async def _do(self, line: bytes) -> object:
        """Raises ValueError for what is no request, AgentError for one that fails."""
        request = json.loads(line)
        match request:
            case {"do": "resolution"}:
                monitors = self.agent.monitors
                return [monitors[0].width, monitors[0].height] if monitors else None
            case {"do": "paste"}:
                return (await self.agent.get_clipboard()).decode("utf-8", "replace")
            case {"do": "copy", "text": str(text)}:
                self.agent.set_clipboard(text)
                return None
        raise ValueError(f"{line[:64]!r} is none of resolution, paste and copy")


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    """A line of any length up to MAX_REQUEST; b"" at the end. Raises ValueError beyond that."""
    parts: list[bytes] = []
    size = 0
    while not parts or not parts[-1].endswith(b"\n"):
        try:
            part = await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError:
            return b""
        except asyncio.LimitOverrunError as error:
            part = await reader.readexactly(max(1, error.consumed))
        parts.append(part)
        size += len(part)
        if size > MAX_REQUEST:
            raise ValueError(f"a request of more than {MAX_REQUEST} bytes")
    return b"".join(parts)
