"""console: a console that several people are attached to at once, with its scrollback."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from dataclasses import dataclass

from vring_serial.accept import Acceptor
from vring_serial.chardev import hangup
from vring_serial.chardev.base import Chardev, DescriptorEnd
from vring_serial.chardev.endpoint import Listener, UnixAddress
from vring_serial.chardev.hangup import HangupWatch
from vring_serial.chardev.kept import KeptSockets
from vring_serial.chardev.options import Options, check_path, check_range
from vring_serial.chardev.scrollback import Scrollback
from vring_serial.chardev.viewer import Viewer
from vring_serial.errors import ResourceError
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.unix_socket import SocketPathError

log = logging.getLogger(__name__)

#: Most bytes of scrollback.
SCROLLBACK_MAX = 256 << 20
#: Clients at a time.
MOST_VIEWERS = 32

#: Bytes that a client may be behind, however little scrollback there is.
_LAG = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleOptions(Options):
    """Options of console.

    Attributes:
        path: path of the unix socket that `vring attach` connects to.
        scrollback: bytes that are replayed to who attaches.
    """

    path: str = ""
    scrollback: int = 1 << 18

    def __post_init__(self) -> None:
        check_path("path", self.path)
        check_range("scrollback", self.scrollback, 0, SCROLLBACK_MAX)


class ConsoleChardev(Chardev):
    """A unix socket that any number of people attach to, with :mod:`vring_serial.proto.attach`.

    All of them see what the guest writes, and who is not read-only types to it. The guest never
    waits for them: its bytes go to a ring in memory, from which each client is sent what it takes.
    The terminal has the size of the client that attached, typed or resized its terminal last.

    The end is open from start to close. The pump moves the guest's bytes to one end of a pair of
    sockets; both ends, the listener and the ring outlive the process, and a successor goes on
    without losing or doubling a byte. Clients are cut off, and connect again.

    Attributes:
        scrollback: the ring, while started.
        replay: bytes of it that are sent to who attaches.
    """

    scrollback: Scrollback

    def __init__(self, id: str, options: ConsoleOptions) -> None:
        super().__init__(id)
        self.options = options
        self.replay = options.scrollback
        self._address = UnixAddress(options.path)
        self._log = RateLimitedLog(log, burst=20, seconds=10)  # clients can come and go in a loop
        self._kept = KeptSockets(None)
        self._listener = Listener()
        self._acceptor: Acceptor | None = None
        self._watch: HangupWatch | None = None
        self._guest: socket.socket | None = None
        self._ours: socket.socket | None = None
        self._viewers: list[Viewer] = []  # who attached, typed or resized last comes last
        self._size: tuple[int, int] | None = None

    @property
    def description(self) -> str:
        count = f" ({len(self._viewers)} attached)" if self._viewers else ""
        return f"console:{self.options.path}{count}"

    @property
    def filename(self) -> str:
        return f"console:{os.path.abspath(self.options.path)}"

    async def start(self) -> None:
        if self._acceptor is not None:
            return
        self._kept = KeptSockets(self.keeping, f"chardev {self.id}")
        try:
            self.scrollback = Scrollback(self._memory())
            self._watch = HangupWatch(self._hung_up, lambda fd, all: hangup.LAST_WORDS_SECONDS)
            self._guest, self._ours = self._kept.pair()
            if listening := self._kept.take_listeners():
                self._listener.adopt(self._address, listening)
            else:
                await self._listener.listen(self._address)
                self._kept.keep_listeners(self._listener.sockets)
        except (OSError, SocketPathError) as error:
            self._release()
            why = error.why if isinstance(error, SocketPathError) else error
            raise self._error(f"listen on {self._address}", why) from error
        except BaseException:
            self._release()
            raise
        name = f"chardev {self.id} at {self.description}"
        self._acceptor = Acceptor(self._arrived, name=name, peer="client")
        self._acceptor.open(self._listener.sockets)
        assert self._guest is not None
        assert self._ours is not None
        asyncio.get_running_loop().add_reader(self._ours.fileno(), self._readable)
        self._kept.started()
        self._open_end(DescriptorEnd(self._guest.fileno(), self._guest.fileno()))

    async def aclose(self) -> None:
        self._close_end()
        if self._ours is not None and self._acceptor is not None:
            while self._receive():
                pass
        self._send_all_away("the console was closed")
        self._release()

    def send_away(self) -> bool:
        return self._send_all_away("sent away by an operator")

    # --- ViewerOwner

    def attached(self, viewer: Viewer) -> None:
        """See ViewerOwner."""
        how = "read-only" if viewer.read_only else "read-write"
        text = "chardev %s: a client attached (%s)"
        self._log.log(logging.INFO, text, self.id, how)

    def typed(self, viewer: Viewer, data: bytes) -> bytes:
        """See ViewerOwner."""
        assert self._ours is not None
        self._is_latest(viewer)
        try:
            sent = self._ours.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            asyncio.get_running_loop().add_writer(self._ours.fileno(), self._room)
        return data[sent:]

    def resized(self, viewer: Viewer) -> None:
        """See ViewerOwner."""
        self._is_latest(viewer)

    def left(self, viewer: Viewer, reason: str) -> None:
        """See ViewerOwner."""
        self._viewers.remove(viewer)
        if self._watch is not None:
            self._watch.unwatch(viewer.fd)
        text = "chardev %s: a client left%s"
        self._log.log(logging.INFO, text, self.id, f": {reason}" if reason else "")
        self._tell_size()

    # --- internals

    def _memory(self) -> memoryview:
        size = Scrollback.area_size(max(self.options.scrollback, _LAG))
        if self.keeping is not None:
            try:
                return self.keeping.area("scrollback", size)
            except ResourceError as error:
                log.warning("chardev %s: it does not outlive a worker: %s", self.id, error)
        return memoryview(bytearray(size))

    def _release(self) -> None:
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        self._listener.close()
        if self._ours is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._ours.fileno())
            loop.remove_writer(self._ours.fileno())
        self._kept.end_pair((self._guest, self._ours))
        self._guest = self._ours = None
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._size = None

    def _arrived(self, sock: socket.socket) -> None:
        assert self._watch is not None  # there from start to close
        viewer = Viewer(sock, self)
        self._viewers.insert(0, viewer)
        if len(self._viewers) > MOST_VIEWERS:
            viewer.send_away(f"{MOST_VIEWERS} clients are attached already")
        else:
            self._watch.watch(sock.fileno())

    def _hung_up(self, fd: int) -> None:
        for viewer in self._viewers:
            if viewer.fd == fd:
                viewer.close()
                return

    def _readable(self) -> None:
        self._receive()
        for viewer in list(self._viewers):
            viewer.wake()

    def _receive(self) -> bool:
        """Take what the guest wrote; return whether there was something."""
        assert self._ours is not None
        try:
            return self.scrollback.receive(self._ours.fileno()) > 0
        except BlockingIOError:
            return False

    def _room(self) -> None:
        assert self._ours is not None
        asyncio.get_running_loop().remove_writer(self._ours.fileno())
        for viewer in list(self._viewers):
            viewer.room()

    def _send_all_away(self, reason: str) -> bool:
        viewers = list(self._viewers)
        for viewer in viewers:
            viewer.send_away(reason)
        return bool(viewers)

    def _is_latest(self, viewer: Viewer) -> None:
        if self._viewers[-1] is not viewer:
            self._viewers.remove(viewer)
            self._viewers.append(viewer)
        self._tell_size()

    def _tell_size(self) -> None:
        sizes = [viewer.size for viewer in self._viewers if viewer.size is not None]
        if sizes and sizes[-1] != self._size:
            self._size = sizes[-1]
            if self._user is not None:
                self._user.end_resized(*self._size)
