"""A shell in a guest that takes one script at a time, over a serial port."""

from __future__ import annotations

import asyncio
import base64
from collections import deque
from collections.abc import Awaitable, Callable

#: What a guest runs at last, with a serial port as its standard input and output.
LOOP = """\
stty raw -echo
echo @ready
while read -r number script; do
    echo "$script" | base64 -d >/tmp/script
    sh /tmp/script </dev/null
    printf '\\n@done %s %s\\n' "$number" $?
done
"""


class CommandError(AssertionError):
    """A command in the guest ended with another status than 0, or the guest died of it."""


class GuestShell:
    """The other end of that serial port.

    Args:
        reader, writer: what the machine has connected its serial port to.
        last_words: what firmware and kernel have said, for errors.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        last_words: Callable[[], str],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._last_words = last_words
        self._count = 0
        self._lines: deque[bytes] = deque(maxlen=20)  # the last ones
        self._lock = asyncio.Lock()

    async def ready(
        self, timeout: float = 60, *, after: Callable[[], Awaitable[object]] | None = None
    ) -> None:
        """Return when the guest has booted and takes commands.

        Args:
            timeout: in seconds.
            after: makes it boot; no script is run meanwhile.
        """
        async with self._lock:
            if after is not None:
                await after()
            await self._wait_ready(timeout)

    async def run(self, script: str, timeout: float = 30) -> str:
        """Run a shell script in the guest; what it printed. Raises CommandError."""
        async with self._lock, asyncio.timeout(timeout):
            output, words = await self._exchange(script)
        if words[1] != "0":
            raise CommandError(f"{script}: status {words[1]}\n{output}")
        return output

    async def reboot(self, timeout: float = 60) -> None:
        """Let the guest reboot itself, and return when it takes commands again."""
        async with self._lock:
            self._send("reboot -f")
            await self._wait_ready(timeout)

    def _send(self, script: str) -> int:
        self._count += 1
        encoded = base64.b64encode(script.encode()).decode()
        self._writer.write(f"{self._count} {encoded}\n".encode())
        return self._count

    async def _exchange(self, script: str) -> tuple[str, list[str]]:
        number = self._send(script)
        output = bytearray()
        while True:
            line = await self._line()
            if line.startswith(b"@done %d " % number):
                return output.decode(errors="replace").removesuffix("\n"), line.decode().split()[1:]
            if line == b"@ready\n":
                raise CommandError(f"{script}: the guest rebooted\n{self._last_words()}")
            output += line

    async def _wait_ready(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                while await self._line() != b"@ready\n":
                    pass
        except TimeoutError:
            raise CommandError(f"no boot in {timeout:g} s\n{self._last_words()}") from None

    async def _line(self) -> bytes:
        line = await self._reader.readline()
        self._lines.append(line)
        if not line.endswith(b"\n"):
            said = b"".join(self._lines).decode(errors="replace")
            raise CommandError(f"the machine ended\n{self._last_words()}\n{said}")
        return line
