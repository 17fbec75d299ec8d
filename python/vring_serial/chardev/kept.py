"""The descriptors of a chardev that a successor process takes over."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import stat
from collections.abc import Iterable, Sequence

from vring_serial.chardev.relay import Relay
from vring_serial.keeping import Keeping
from vring_serial.unix_fds import stream_socket

_log = logging.getLogger(__name__)

_LISTENER, _CLIENT = "listener.", "client."
#: Roles of the two ends of a pair between the port and the chardev.
_PAIR = ("guest-end", "our-end")
#: Roles of a relay's two ends, after that of the descriptor.
_RELAY = (".relay-out", ".relay-in")
#: Bytes that a relay should hold: as many as the pump moves at once.
_RELAY_SIZE = 256 << 10
#: Section whose presence means that the chardev had been started.
_STARTED = "started"


class Kept:
    """What a chardev has kept.

    Args:
        keeping: of the chardev; None: there is no successor, and nothing is done.
    """

    def __init__(self, keeping: Keeping | None) -> None:
        self._keeping = keeping

    @property
    def started_before(self) -> bool:
        """Whether a predecessor process had started the chardev."""
        return self._keeping is not None and self._keeping.read(_STARTED) is not None

    def started(self) -> None:
        """Note that the chardev has started."""
        if self._keeping is not None:
            self._keeping.write(_STARTED, b"1")

    def keep(self, role: str, fd: int) -> None:
        """Keep a descriptor instead of what had this role; -1: keep none."""
        if self._keeping is not None:
            if fd >= 0:
                self._keeping.keep(role, fd)
            else:
                self._keeping.drop(role)

    def take(self, role: str) -> int:
        """Return the descriptor that a predecessor left, from then on the caller's; -1 if none."""
        fd = None if self._keeping is None else self._keeping.take(role)
        return -1 if fd is None else fd

    def relay(self, role: str, fd: int) -> Relay | None:
        """Return the relay for a pipe or terminal: a predecessor's, or a new one.

        The caller ends it with :meth:`end_relay`. None: there is no successor, or ``fd`` is
        something else. Raises OSError without descriptors.
        """
        if self._keeping is None or not _wants_relay(fd):
            return None
        return self.pipe(role, _RELAY_SIZE)

    def pipe(self, role: str, size: int) -> Relay:
        """Return a non-blocking pipe: a predecessor's with what is in it, or a new one.

        The caller ends it with :meth:`end_relay`. It holds ``size`` bytes, if this user may have so
        many. Raises OSError without descriptors.
        """
        ends = [self.take(role + end) for end in _RELAY]
        if -1 not in ends:
            return Relay(*ends)
        for end in ends:
            if end >= 0:
                os.close(end)
        relay = Relay(*os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
        with contextlib.suppress(OSError):  # more than this user may have
            fcntl.fcntl(relay.write_fd, fcntl.F_SETPIPE_SZ, size)
        for name, end in zip(_RELAY, relay, strict=True):
            self.keep(role + name, end)
        return relay

    def end_relay(self, role: str, relay: Relay | None) -> None:
        """Close a relay, with what is in it, and keep it no longer."""
        if relay is not None:
            self.forget_relay(role)
            for end in relay:
                os.close(end)

    def forget_relay(self, role: str) -> None:
        """Keep a relay no longer; it stays open here."""
        for name in _RELAY:
            self.keep(role + name, -1)


class KeptSockets(Kept):
    """Keeps listening sockets, and clients in the order in which they came.

    Args:
        keeping: see Kept.
        name: of whose sockets they are, for the log.
    """

    def __init__(self, keeping: Keeping | None, name: str = "") -> None:
        super().__init__(keeping)
        self._name = name
        self._roles: dict[int, str] = {}  # of clients, by descriptor
        self._next = 0

    def take_listeners(self) -> list[socket.socket]:
        """Return the listening sockets that a predecessor left, in order."""
        return [sock for _, sock in self._take(_LISTENER, listening=True)]

    def take_clients(self) -> list[socket.socket]:
        """Return the clients that a predecessor left, in order of arrival."""
        clients = self._take(_CLIENT, listening=False)
        for number, sock in clients:
            self._roles[sock.fileno()] = f"{_CLIENT}{number}"
            self._next = max(self._next, number + 1)
        return [sock for _, sock in clients]

    def keep_listeners(self, sockets: Sequence[socket.socket]) -> None:
        """Keep listening sockets."""
        for i, sock in enumerate(sockets):
            self.keep(f"{_LISTENER}{i}", sock.fileno())

    def keep_client(self, sock: socket.socket) -> None:
        """Keep a new client; one that is kept already keeps its place."""
        if self._keeping is not None and sock.fileno() not in self._roles:
            role = self._roles[sock.fileno()] = f"{_CLIENT}{self._next}"
            self._next += 1
            self._keeping.keep(role, sock.fileno())

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Return two sockets, non-blocking: a predecessor's with what is in them, or a new pair.

        The first is for the port. The caller ends them with :meth:`end_pair`. Raises OSError
        without descriptors.
        """
        left = []
        for role in _PAIR:
            fd = self.take(role)
            left.append(None if fd < 0 else stream_socket(fd, listening=False))
        guest, ours = left
        if guest is None or ours is None:
            for sock in left:
                if sock is not None:
                    sock.close()
            guest, ours = socket.socketpair()
            for role, sock in zip(_PAIR, (guest, ours), strict=True):
                self.keep(role, sock.fileno())
        for sock in (guest, ours):
            sock.setblocking(False)
        return guest, ours

    def end_pair(self, pair: Iterable[socket.socket | None]) -> None:
        """Close the two sockets, if they are there, and keep them no longer."""
        for role, sock in zip(_PAIR, pair, strict=True):
            if sock is not None:
                self.keep(role, -1)
                sock.close()

    def drop_client(self, sock: socket.socket) -> None:
        """Stop keeping a client; called before it is closed."""
        role = self._roles.pop(sock.fileno(), None)
        if role is not None and self._keeping is not None:
            self._keeping.drop(role)

    def _take(self, prefix: str, *, listening: bool) -> list[tuple[int, socket.socket]]:
        if self._keeping is None:
            return []
        numbers = sorted(
            int(role.removeprefix(prefix))
            for role in self._keeping.roles()
            if role.startswith(prefix) and role.removeprefix(prefix).isdecimal()
        )
        taken = []
        for number in numbers:
            fd = self._keeping.take(f"{prefix}{number}")
            assert fd is not None  # its role was there
            if (sock := stream_socket(fd, listening=listening)) is not None:
                taken.append((number, sock))
            else:
                self._keeping.drop(f"{prefix}{number}")
                text = "%s: what was kept as %s%d is no such socket, and is dropped"
                _log.warning(text, self._name, prefix, number)
        return taken


def _wants_relay(fd: int) -> bool:
    return fd >= 0 and (stat.S_ISFIFO(os.fstat(fd).st_mode) or os.isatty(fd))
