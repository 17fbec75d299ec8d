"""The sockets of a chardev that a successor of this process goes on with."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from vring_serial.keeping import Keeping

_LISTENER, _CLIENT = "listener.", "client."
#: Section that says that the chardev had been started, and with it everything that comes first.
_STARTED = "started"


class KeptSockets:
    """Keeps listening sockets, and clients in the order in which they came.

    Args:
        keeping: of the chardev; None: there is no successor, and nothing is done.
    """

    def __init__(self, keeping: Keeping | None) -> None:
        self._keeping = keeping
        self._roles: dict[int, str] = {}  # of clients, by descriptor
        self._next = 0

    @property
    def started_before(self) -> bool:
        """Whether a predecessor of this process had started the chardev."""
        return self._keeping is not None and self._keeping.read(_STARTED) is not None

    def started(self) -> None:
        """Note that the chardev has started."""
        if self._keeping is not None:
            self._keeping.write(_STARTED, b"1")

    def take_listeners(self) -> list[socket.socket]:
        """Return the listening sockets that a predecessor left, in their order."""
        return [sock for _, sock in self._take(_LISTENER)]

    def take_clients(self) -> list[socket.socket]:
        """Return the clients that a predecessor left, in the order in which they came."""
        clients = self._take(_CLIENT)
        for number, sock in clients:
            self._roles[sock.fileno()] = f"{_CLIENT}{number}"
            self._next = max(self._next, number + 1)
        return [sock for _, sock in clients]

    def keep_listeners(self, sockets: Sequence[socket.socket]) -> None:
        """Keep listening sockets."""
        if self._keeping is not None:
            for i, sock in enumerate(sockets):
                self._keeping.keep(f"{_LISTENER}{i}", sock.fileno())

    def keep_client(self, sock: socket.socket) -> None:
        """Keep a client that has come; one that is kept already stays where it is."""
        if self._keeping is not None and sock.fileno() not in self._roles:
            role = self._roles[sock.fileno()] = f"{_CLIENT}{self._next}"
            self._next += 1
            self._keeping.keep(role, sock.fileno())

    def drop_client(self, sock: socket.socket) -> None:
        """Keep a client no longer; called before it is closed."""
        role = self._roles.pop(sock.fileno(), None)
        if role is not None and self._keeping is not None:
            self._keeping.drop(role)

    def _take(self, prefix: str) -> list[tuple[int, socket.socket]]:
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
            taken.append((number, socket.socket(fileno=fd)))
        return taken
