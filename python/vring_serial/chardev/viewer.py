"""One client of a ``console`` host end: somebody who watches, and may type."""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

from vring_serial.chardev.scrollback import Scrollback
from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.attach import (
    DATA_MAX,
    INPUT_MAX,
    REASON_MAX,
    VERSION,
    Frame,
    FrameParser,
    Hello,
    Kind,
    Lost,
    Resize,
    Welcome,
    pack_frame,
    pack_header,
)

#: Seconds that a client has for its HELLO.
HELLO_SECONDS = 10.0
#: Frames that a client which is sent away still gets, if its socket takes them at once.
_LAST_FRAMES = 64


class ViewerOwner(Protocol):
    """What a viewer needs of its console."""

    scrollback: Scrollback
    replay: int

    def attached(self, viewer: Viewer) -> None:
        """Note that it has said who it is."""

    def typed(self, viewer: Viewer, data: bytes) -> bytes:
        """Give the guest bytes; return those for which there is no room yet."""

    def resized(self, viewer: Viewer) -> None:
        """Note another size of its terminal."""

    def left(self, viewer: Viewer, reason: str) -> None:
        """Forget it; its socket is closed after that."""


class Viewer:
    """A connected client.

    It reads the console's scrollback at a position of its own, so that it holds no more than one
    frame, and whoever reads slowly only falls behind. What it was too slow for is left out, up to
    the start of a line, and it is told how much.

    Args:
        sock: connected and non-blocking; taken over.
        owner: its console.

    Attributes:
        read_only: it does not type.
        size: columns and rows of its terminal; None: it has none.
    """

    def __init__(self, sock: socket.socket, owner: ViewerOwner) -> None:
        self.read_only = True
        self.size: tuple[int, int] | None = None
        self._sock = sock
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._parser = FrameParser(from_server=False)
        self._position: int | None = None  # None: it has not said HELLO
        self._unsent = b""  # rest of a frame
        self._writing = False
        self._reading = True
        self._untyped = b""  # of an INPUT that the guest has no room for
        self._deadline = self._loop.call_later(HELLO_SECONDS, self._too_late)
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def fd(self) -> int:
        """Descriptor of its socket; -1 once it is closed."""
        return self._sock.fileno()

    def wake(self) -> None:
        """Send what is new, if the client takes it."""
        if self._position is not None and not self._writing:
            self._send()

    def room(self) -> None:
        """Go on typing: the guest has taken something."""
        if self._untyped and self.fd >= 0:
            self._untyped = self._owner.typed(self, self._untyped)
            if not self._untyped:
                self._frames()
                if self.fd >= 0 and not self._untyped:
                    self._read(True)

    def send_away(self, reason: str) -> None:
        """Send what the client takes at once, say why, and close."""
        if self.fd < 0:
            return
        if self._position is not None:
            for _ in range(_LAST_FRAMES):
                if not self._send_one():
                    break
        if self.fd >= 0 and not self._unsent:
            text = reason.encode()[:REASON_MAX]
            self._write(pack_frame(Kind.BYE, text))
        self.close()

    def close(self, reason: str = "") -> None:
        """Close the connection. Safe to call twice.

        Args:
            reason: for the log; empty if it is not worth a word.
        """
        if self.fd < 0:
            return
        self._deadline.cancel()
        self._loop.remove_reader(self.fd)
        self._loop.remove_writer(self.fd)
        self._owner.left(self, reason)
        self._sock.close()

    def _too_late(self) -> None:
        self.send_away("no HELLO came")

    # --- what it sends

    def _readable(self) -> None:
        try:
            data = self._sock.recv(INPUT_MAX)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(error.strerror or "")
            return
        if not data:
            self.close()
            return
        self._parser.receive_data(data)
        self._frames()

    def _frames(self) -> None:
        """Handle the frames that have come, until the guest has no room for one."""
        try:
            while self.fd >= 0 and not self._untyped:
                frame = self._parser.next_message()
                if frame is None:
                    return
                self._handle(frame)
        except RemoteProtocolError as error:
            self.send_away(str(error))

    def _handle(self, frame: Frame) -> None:
        if self._position is None:
            if frame.kind is not Kind.HELLO:
                raise RemoteProtocolError(f"{frame.kind.name} before HELLO")
            self._hello(Hello.unpack(frame.payload))
        elif frame.kind is Kind.HELLO:
            raise RemoteProtocolError("a second HELLO")
        elif self.read_only:
            raise RemoteProtocolError(f"{frame.kind.name} of a client that is read-only")
        elif frame.kind is Kind.RESIZE:
            self._resize(Resize.unpack(frame.payload))
        else:
            self._untyped = self._owner.typed(self, frame.payload)
            if self._untyped:
                self._read(False)

    def _hello(self, hello: Hello) -> None:
        if hello.version != VERSION:
            text = f"version {VERSION} is spoken here, not {hello.version}"
            raise RemoteProtocolError(text)
        self._deadline.cancel()
        scrollback = self._owner.scrollback
        stream, position = hello.resume or (0, 0)
        if stream != scrollback.stream or position > scrollback.end:
            oldest = max(scrollback.start, scrollback.end - self._owner.replay)
            position = scrollback.line_start(oldest)
        welcome = Welcome(scrollback.stream, position, scrollback.end)
        self._position = position
        self.read_only = hello.read_only
        self._unsent = pack_frame(Kind.WELCOME, welcome.pack())
        self._owner.attached(self)
        if not self.read_only:
            self._resize(Resize(hello.cols, hello.rows))
        self._send()

    def _resize(self, resize: Resize) -> None:
        self.size = (resize.cols, resize.rows) if resize.cols and resize.rows else None
        self._owner.resized(self)

    def _read(self, wanted: bool) -> None:
        if wanted != self._reading:
            self._reading = wanted
            if wanted:
                self._loop.add_reader(self.fd, self._readable)
            else:
                self._loop.remove_reader(self.fd)

    # --- what it gets

    def _send(self) -> None:
        """Send one frame, and have the rest sent when the client takes more."""
        self._send_one()
        if self.fd < 0:
            return
        more = bool(self._unsent) or self._position != self._owner.scrollback.end
        if more != self._writing:
            self._writing = more
            if more:
                self._loop.add_writer(self.fd, self._send)
            else:
                self._loop.remove_writer(self.fd)

    def _send_one(self) -> bool:
        """Send the rest of a frame, or the next one; return whether all of it went."""
        if self._unsent:
            return self._write(self._unsent)
        scrollback = self._owner.scrollback
        assert self._position is not None
        if self._position < scrollback.start:
            # Not to the oldest byte, which would be gone before the client has read it.
            behind = scrollback.start + scrollback.capacity // 4
            position = scrollback.line_start(behind)
            lost = Lost(position - self._position)
            self._position = position
            return self._write(pack_frame(Kind.LOST, lost.pack()))
        piece = scrollback.read(self._position, DATA_MAX)
        if not piece:
            return False
        self._position += len(piece)
        return self._write(pack_header(Kind.DATA, len(piece)), piece)

    def _write(self, *parts: bytes | memoryview) -> bool:
        """Send as much as the client takes, and keep the rest; return whether there is none."""
        try:
            sent = self._sock.sendmsg(parts)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.close(error.strerror or "")
            return False
        self._unsent = b"" if sent == sum(map(len, parts)) else b"".join(parts)[sent:]
        return not self._unsent
