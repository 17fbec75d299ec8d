"""The common interface of all host ends.

A chardev is the host's end of a port. While something is connected to it, it offers its user (a
port, a test) an *end* in one of two forms:

- :class:`DescriptorEnd`: file descriptors. The user moves bytes between guest memory and the
  descriptors itself, without the interpreter; the chardev never reads or writes them.
- :class:`ProtocolEnd`: Python code, as an :class:`asyncio.Protocol`. The user makes an
  :class:`asyncio.Transport` around its queues and connects the two; flow control is asyncio's
  (``pause_reading``/``resume_reading`` on the transport, ``pause_writing``/``resume_writing`` on
  the protocol), so asyncio's StreamReader and StreamWriter work on a port unchanged.

The life of a chardev: constructed (checks its options, touches nothing) → ``await start()`` (opens,
binds, listens; raises ResourceError) → any number of ends, one at a time → ``await stop()``.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vring_serial.errors import LocalProtocolError, ResourceError
from vring_serial.keeping import Keeping
from vring_serial.lifetime import Starting

if TYPE_CHECKING:  # kinds are loaded when they are asked for
    from vring_serial.chardev.log import OutputLog
    from vring_serial.chardev.relay import Relay


@dataclass(frozen=True, slots=True)
class DescriptorEnd:
    """Non-blocking file descriptors, owned by the chardev, open until ``end_closed`` has returned.

    Attributes:
        read_fd: descriptor to read bytes for the guest from; -1: there are none.
        write_fd: descriptor to write the guest's bytes to; -1: discard them.
        kept: the open files outlive this process, with their positions.
        read_relay: for a pipe or terminal to read from that is kept: what its bytes go through.
        write_relay: the same, to write to.
    """

    read_fd: int
    write_fd: int
    kept: bool = False
    read_relay: Relay | None = None
    write_relay: Relay | None = None


@dataclass(frozen=True, slots=True)
class ProtocolEnd:
    """Python code as the host end, connected for as long as the guest has its side open.

    The protocol is connected when the guest opens the port (a console: as soon as there is an end)
    and disconnected when the end closes, or when the guest closes the port, after all it wrote was
    received. The protocol may close its transport: the user then calls :meth:`Chardev.peer_gone`,
    and connects a new protocol when the guest next opens the port.

    Attributes:
        factory: makes a protocol; called once per connection.
    """

    factory: Callable[[], asyncio.Protocol]


End = DescriptorEnd | ProtocolEnd


class ChardevUser(Protocol):
    """The callbacks of a chardev's user, always called in the event loop's thread."""

    def end_opened(self, end: End) -> None:
        """Use the connected end; chardevs without a peer call this right after ``start``."""

    def end_replaced(self, end: DescriptorEnd, between: Callable[[], None]) -> None:
        """Use new descriptors for the open end, without the guest noticing: the peer is the same.

        Call ``between`` when the old ones are used no more, and the new ones not yet.
        """

    def end_closed(self) -> None:
        """Release the end: after this returns, the user must not use its descriptors."""

    def end_resized(self, cols: int, rows: int) -> None:
        """Take note of the size of the terminal behind the end, in characters."""


class Chardev(Starting):
    """One host end of a port.

    Attributes:
        id: its name in options and logs.
        end: the connected end, or None. It changes only during calls of ChardevUser methods.
        keeping: store for what a successor process needs and a predecessor left, for kinds that
            can continue in one; set before ``start``. None: there is no successor.
        log: what the user writes the guest's output to as well; set before there is a user. None:
            nothing.
        taken: return how many bytes the user has read from the end that are not the guest's yet; it
            is set by a user that reads ahead. While there are some, a peer is not gone.
    """

    def __init__(self, id: str) -> None:
        self.id = id
        self.taken: Callable[[], int] = lambda: 0
        self.end: End | None = None
        self.keeping: Keeping | None = None
        self.log: OutputLog | None = None
        self._user: ChardevUser | None = None

    def attach(self, user: ChardevUser) -> None:
        """Set the only user. Raises LocalProtocolError if there is one.

        After ``start`` there may be an end already, of which the user is not told.
        """
        if self._user is not None:
            raise LocalProtocolError(f"chardev {self.id} is in use already")
        self._user = user

    def detach(self) -> None:
        """Leave the user, which must not use the end any more; the end stays, for another one."""
        user, self._user = self._user, None
        if user is not None and self.end is not None:
            user.end_closed()

    @abc.abstractmethod
    async def start(self) -> None:
        """Open, bind, listen or begin to connect; does nothing if started already.

        Raises:
            ResourceError: what failed, where and why. Everything is closed and removed again.
        """

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Close everything and remove what was created; the chardev may be started again.

        May be called twice, after a failed start, and while ``start`` is waiting, which then raises
        ResourceError.
        """

    async def start_with_log(self) -> None:
        """Start the log, if there is one, and the chardev. Raises as :meth:`start`."""
        if self.log is not None:
            await self.log.start(self.keeping)
        try:
            await self.start()
        except BaseException:
            if self.log is not None:
                await self.log.aclose()
            raise

    async def aclose_with_log(self) -> None:
        """Close the chardev, and its log when nobody writes to it any more."""
        try:
            await self.aclose()
        finally:
            if self.log is not None:
                await self.log.aclose()

    def peer_gone(self, reason: OSError | None = None) -> None:
        """Handle end of file or an error that the user met on the end's descriptors.

        The chardev closes the end (it calls ``end_closed`` before this returns) and waits for the
        next peer as its kind does. After an error it may keep the end for a peer that takes no
        more or is leaving (see :mod:`vring_serial.chardev.hangup`); the user then keeps reading but
        does not write. The default is for chardevs whose end never closes.
        """

    def guest_opened(self, is_open: bool) -> None:
        """Handle the guest's opening or closing of its side of the port."""

    def reopen(self) -> None:
        """Reopen files at their paths, after a log rotation renamed them.

        Raises:
            ResourceError: a file cannot be opened; the old one stays in use.
        """

    @property
    def description(self) -> str:
        """Short text for logs and tables, such as ``unix:/run/agent.sock (server)``."""
        return type(self).__name__

    def send_away(self) -> bool:
        """Send the connected peer away, as if it had hung up; return whether there was one.

        The default is for chardevs that have no peers of their own.
        """
        return False

    def send_break(self) -> None:
        """Send a break on the line. The default is for chardevs that have none.

        Raises ResourceError.
        """

    @property
    def filename(self) -> str:
        """Return what QEMU's ``query-chardev`` calls such a host end."""
        return self.description.partition(":")[0]

    def _open_end(self, end: End) -> None:
        self.end = end
        if self._user is not None:
            self._user.end_opened(end)

    def _replace_end(self, end: DescriptorEnd, between: Callable[[], None]) -> None:
        self.end = end
        if self._user is not None:
            self._user.end_replaced(end, between)
        else:
            between()

    def _close_end(self) -> None:
        if self.end is not None:
            try:
                if self._user is not None:
                    self._user.end_closed()
            finally:
                self.end = None

    def _error(self, doing: str, why: OSError | str) -> ResourceError:
        """Return the ResourceError for a failure, with the wording common to all chardevs."""
        text = why if isinstance(why, str) else why.strerror or str(why)
        return ResourceError(f"chardev {self.id}: cannot {doing}: {text}")
