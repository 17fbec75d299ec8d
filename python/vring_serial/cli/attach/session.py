"""The connection of ``vring attach`` to a console, which goes on when a worker is replaced."""

from __future__ import annotations

import asyncio
import contextlib
import signal

from vring_serial.cli import (
    STATUS_ERROR,
    STATUS_INTERRUPTED,
    STATUS_NO_SERVER,
    STATUS_REFUSED,
    STATUS_TIMED_OUT,
    StatusError,
)
from vring_serial.cli.attach.keys import Command, Escape, Keys
from vring_serial.cli.attach.screen import CUT, Screen
from vring_serial.cli.attach.terminal import Terminal
from vring_serial.cli.plain import escaped
from vring_serial.cli.signals import stop_on_signals
from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.attach import (
    INPUT_MAX,
    Frame,
    FrameParser,
    Hello,
    Kind,
    Lost,
    Resize,
    Welcome,
    pack_frame,
)

#: Seconds before another connection after one that was closed before it began.
_RETRY_SECONDS = 0.1
#: Bytes typed that wait for the guest; a person's further keys are dropped.
_TYPED_MAX = 1 << 16


class _Over(Exception):  # noqa: N818 - it is no error
    """The server has said that this is the end, and why."""


class Session:
    """One ``vring attach``.

    Args:
        path: of the console's socket.
        terminal: whoever watches and types.
        escape: the key.
        read_only: type nothing.
        timeout: seconds that the server has for an answer.
    """

    def __init__(
        self, path: str, terminal: Terminal, escape: Escape, *, read_only: bool, timeout: float
    ) -> None:
        self._path = path
        self._terminal = terminal
        self._escape = escape
        self._keys = Keys(escape)
        self._read_only = read_only
        self._timeout = timeout
        self._screen = Screen()
        self._stream = self._position = self._live = 0
        self._began = False
        self._writer: asyncio.StreamWriter | None = None
        self._connected = asyncio.Event()

    async def run(self) -> int:
        """Attach until somebody leaves or the server ends it; return the exit status.

        Raises StatusError: there is no server, or it has gone.
        """
        loop = asyncio.get_running_loop()
        stop = stop_on_signals()
        tasks: list[asyncio.Task[None]] = [asyncio.create_task(self._watch())]
        connected = asyncio.create_task(self._connected.wait())
        stopping = asyncio.create_task(stop.wait())
        try:
            await _first(*tasks, stopping, connected)
            if connected.done() and not tasks[0].done():
                tasks.append(asyncio.create_task(self._type()))
                await _first(*tasks, stopping)
            for task in tasks:
                if task.done():
                    task.result()
                    return 0
            return STATUS_INTERRUPTED
        finally:
            loop.remove_signal_handler(signal.SIGWINCH)
            loop.remove_signal_handler(signal.SIGCONT)
            for each in (*tasks, connected, stopping):
                each.cancel()
            await asyncio.gather(*tasks, connected, stopping, return_exceptions=True)
            if self._writer is not None:
                self._writer.transport.abort()
            if self._began:
                self._terminal.put_back(self._screen.undo)

    def _begin(self) -> None:
        """Take the terminal: until the first WELCOME, it is as it was."""
        self._began = True
        self._terminal.set_raw()
        if self._terminal.is_interactive:
            how = ", read-only" if self._read_only else ""
            text = f"attached to {escaped(self._path)}{how}"
            help = f"; {self._escape} and ? for help" if self._escape.key else ""
            self._terminal.say(text + help)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGWINCH, self._resized)
        loop.add_signal_handler(signal.SIGCONT, self._continued)

    # --- from the server

    async def _watch(self) -> None:
        """Show what comes, over one connection after another. Raises StatusError at the end."""
        end = asyncio.get_running_loop().time() + self._timeout
        while True:
            try:
                await self._connect_and_follow(end)
            except _Over as over:
                text = f"{self._path}: {escaped(str(over))}"
                raise StatusError(
                    text, STATUS_NO_SERVER if self._began else STATUS_REFUSED
                ) from None
            except RemoteProtocolError as error:
                raise StatusError(f"{self._path}: {error}", STATUS_REFUSED) from None
            if self._connected.is_set():
                self._connected.clear()
                self._writer = None
                end = asyncio.get_running_loop().time() + self._timeout
            else:
                await asyncio.sleep(_RETRY_SECONDS)

    async def _connect_and_follow(self, end: float) -> None:
        """Follow one connection to its end. Raises StatusError, _Over and RemoteProtocolError."""
        writer = None
        try:
            async with asyncio.timeout_at(end) as limit:
                try:
                    reader, writer = await asyncio.open_unix_connection(self._path)
                except OSError as error:
                    gone = "the connection was lost, and there is" if self._began else "there is"
                    text = f"{gone} no server at {self._path}: {error.strerror or error}"
                    raise StatusError(text, STATUS_NO_SERVER) from None
                cols, rows = self._terminal.size
                resume = (self._stream, self._position) if self._began else None
                hello = Hello(self._read_only, cols, rows, resume)
                writer.write(pack_frame(Kind.HELLO, hello.pack()))
                parser = FrameParser(from_server=True)
                with contextlib.suppress(ConnectionError):
                    while data := await reader.read(1 << 16):
                        parser.receive_data(data)
                        while (frame := parser.next_message()) is not None:
                            await self._handle(frame, writer)
                            if self._connected.is_set():
                                limit.reschedule(None)
        except TimeoutError:
            text = f"the server at {self._path} did not answer in {self._timeout:g} s"
            raise StatusError(text, STATUS_TIMED_OUT) from None
        finally:
            if writer is not None:
                writer.transport.abort()

    async def _handle(self, frame: Frame, writer: asyncio.StreamWriter) -> None:
        if frame.kind is Kind.BYE:
            raise _Over(frame.payload.decode(errors="replace"))
        if frame.kind is Kind.WELCOME:
            self._welcome(Welcome.unpack(frame.payload), writer)
        elif not self._connected.is_set():
            raise RemoteProtocolError(f"{frame.kind.name} before WELCOME")
        elif frame.kind is Kind.LOST:
            count = Lost.unpack(frame.payload).count
            self._position += count
            if self._terminal.shows:
                await self._show(CUT)
            self._terminal.say(f"{count} bytes are left out: this terminal was too slow")
        else:
            await self._data(frame.payload)

    def _welcome(self, welcome: Welcome, writer: asyncio.StreamWriter) -> None:
        if self._connected.is_set():
            raise RemoteProtocolError("a second WELCOME")
        if self._began and welcome.stream != self._stream:
            self._terminal.say("the console began anew")
        if not self._began or welcome.stream != self._stream:
            self._live = welcome.live
        self._stream, self._position = welcome.stream, welcome.position
        self._writer = writer
        self._connected.set()
        if not self._began:
            self._begin()

    async def _data(self, data: bytes) -> None:
        """Show bytes, of which some may be history. The position moves when they are shown."""
        self._position += len(data)
        old = max(0, min(len(data), self._live - self._position + len(data)))
        if not self._terminal.shows:
            await self._show(data)
            return
        if old:
            last = self._position >= self._live
            await self._show(self._screen.history(data[:old], last=last))
        if old < len(data):
            self._screen.live(data[old:])
            await self._show(data[old:])

    async def _show(self, data: bytes) -> None:
        try:
            await self._terminal.write(data)
        except OSError as error:
            raise StatusError(f"standard output: {error.strerror}", STATUS_ERROR) from None

    # --- to the server

    async def _type(self) -> None:
        """Send what is typed, until the escape key is used to leave."""
        while data := await self._terminal.read():
            data, commands = self._keys.feed(data)
            for command in commands:
                if command is Command.LEAVE:
                    await self._send(data)
                    return
                self._help()
            await self._send(data)
        if self._terminal.is_interactive:  # it has hung up
            return
        await asyncio.Event().wait()  # the end of a file or pipe: go on watching

    async def _send(self, data: bytes) -> None:
        if self._read_only or not data:
            return
        if not self._terminal.is_interactive:
            for at in range(0, len(data), INPUT_MAX):
                await self._connected.wait()
                assert self._writer is not None
                self._writer.write(pack_frame(Kind.INPUT, data[at : at + INPUT_MAX]))
                with contextlib.suppress(ConnectionError):
                    await self._writer.drain()
            return
        # Somebody who types goes on to the escape key also while the guest takes nothing.
        writer = self._writer
        if writer is None or writer.transport.get_write_buffer_size() > _TYPED_MAX:
            await self._terminal.write(b"\a")
            return
        for at in range(0, len(data), INPUT_MAX):
            writer.write(pack_frame(Kind.INPUT, data[at : at + INPUT_MAX]))

    def _resized(self) -> None:
        if self._writer is not None and not self._read_only:
            self._writer.write(pack_frame(Kind.RESIZE, Resize(*self._terminal.size).pack()))

    def _continued(self) -> None:
        """After a stop, in which the shell has set the terminal's modes."""
        self._terminal.set_raw()
        self._resized()

    def _help(self) -> None:
        key = self._escape
        self._terminal.say(f"{key} . leaves; {key} {key} types {key}; {key} ? shows this")


async def _first(*tasks: asyncio.Task[object]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
