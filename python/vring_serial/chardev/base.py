"""The one interface of all host ends.

A chardev is where a port's bytes go on the host. It offers its user (a port, a test) an *end* while
something is connected to it, in one of two forms:

- :class:`DescriptorEnd`: file descriptors. The user moves bytes between guest memory and the
  descriptors itself, without the interpreter; the chardev never reads or writes them.
- :class:`ProtocolEnd`: Python code, as an :class:`asyncio.Protocol`. The user makes an
  :class:`asyncio.Transport` around its queues and connects the two; flow control is asyncio's own
  (``pause_reading``/``resume_reading`` on the transport, ``pause_writing``/``resume_writing`` on
  the protocol), so asyncio's StreamReader and StreamWriter work on a port as they are.

The life of a chardev: constructed (checks its options, touches nothing) → ``await start()`` (opens,
binds, listens; raises ResourceError) → any number of ends, one at a time → ``await stop()``.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vring_serial.errors import LocalProtocolError, ResourceError
from vring_serial.keeping import Keeping
from vring_serial.lifetime import Starting


@dataclass(frozen=True, slots=True)
class DescriptorEnd:
    """Non-blocking file descriptors, owned by the chardev, open until ``end_closed`` has returned.

    Attributes:
        read_fd: where bytes for the guest come from, or -1 if nothing ever does.
        write_fd: where the guest's bytes go, or -1 if they are discarded.
    """

    read_fd: int
    write_fd: int


@dataclass(frozen=True, slots=True)
class ProtocolEnd:
    """Python code as the host end, connected for as long as the guest has its side open.

    A connection is made when the guest opens the port (to a console: as soon as there is an end)
    and lost when the guest closes it, after everything that it wrote before has been received, or
    when the end closes. The protocol may close its transport itself: the user then calls
    :meth:`Chardev.peer_gone`, and connects again when the guest opens the port the next time.

    Attributes:
        factory: makes the protocol for one connection; called once per connection to a port.
    """

    factory: Callable[[], asyncio.Protocol]


End = DescriptorEnd | ProtocolEnd


class ChardevUser(Protocol):
    """What a chardev tells the one who uses it; always called in the event loop's thread."""

    def end_opened(self, end: End) -> None:
        """Take the connected host end; called right after ``start`` for chardevs without a peer."""

    def end_replaced(self, end: DescriptorEnd) -> None:
        """Use the new descriptors of the open end, without telling the guest; the peer is the same.

        On return the user must not use the old descriptors any more.
        """

    def end_closed(self) -> None:
        """Let go of the end: on return the user must no longer touch its descriptors."""

    def end_resized(self, cols: int, rows: int) -> None:
        """Note the size of the terminal behind the end, in characters."""


class Chardev(Starting):
    """One host end of a port.

    Attributes:
        id: the name that options and logs use.
        end: the connected end, or None. It changes only inside calls of ChardevUser methods.
        keeping: where kinds that can go on in a successor of this process keep what that needs, and
            find what a predecessor left; set before ``start``. None: there is no successor.
    """

    def __init__(self, id: str) -> None:
        self.id = id
        self.end: End | None = None
        self.keeping: Keeping | None = None
        self._user: ChardevUser | None = None

    def attach(self, user: ChardevUser) -> None:
        """Name the one user, before ``start``. Raises LocalProtocolError if there is one."""
        if self._user is not None:
            raise LocalProtocolError(f"chardev {self.id} is in use already")
        self._user = user

    @abc.abstractmethod
    async def start(self) -> None:
        """Open, bind, listen or begin to connect; does nothing if that is done already.

        Raises:
            ResourceError: naming what, where and why. Nothing is left open or behind.
        """

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Close everything and remove what was created; afterwards it may be started again.

        Safe to call twice, after a failed start, and while ``start`` is still waiting (which then
        raises ResourceError).
        """

    def peer_gone(self, reason: OSError | None = None) -> None:
        """Handle end of file, or an error, that the user saw on the end's descriptors.

        The chardev closes the end (``end_closed`` is called before this returns) and waits for the
        next peer in the way of its kind. After an error it may keep the end, for a peer that takes
        no more or is leaving (see :mod:`vring_serial.chardev.hangup`); the user reads on and writes
        no more. The default suits chardevs whose end never closes.
        """

    def guest_opened(self, is_open: bool) -> None:
        """Note that the guest opened or closed its side of the port."""

    def reopen(self) -> None:
        """Reopen files at their paths, after a log rotation renamed them.

        Raises:
            ResourceError: a file cannot be opened; the old one stays in use.
        """

    @property
    def description(self) -> str:
        """One short phrase for logs and tables, such as ``unix:/run/agent.sock (server)``."""
        return type(self).__name__

    def _open_end(self, end: End) -> None:
        self.end = end
        if self._user is not None:
            self._user.end_opened(end)

    def _replace_end(self, end: DescriptorEnd) -> None:
        self.end = end
        if self._user is not None:
            self._user.end_replaced(end)

    def _close_end(self) -> None:
        if self.end is not None:
            try:
                if self._user is not None:
                    self._user.end_closed()
            finally:
                self.end = None

    def _error(self, doing: str, why: OSError | str) -> ResourceError:
        """Return the ResourceError for a failure, worded as for every chardev."""
        text = why if isinstance(why, str) else why.strerror or str(why)
        return ResourceError(f"chardev {self.id}: cannot {doing}: {text}")
