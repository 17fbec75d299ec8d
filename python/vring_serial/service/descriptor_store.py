"""systemd's descriptor store protocol (sd_notify(3), sd_pid_notify_with_fds(3)), both sides.

A worker sends datagrams of ``KEY=value`` lines with descriptors beside them; whoever started it
keeps the descriptors under their names, and gives them to the next worker.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
from collections.abc import Iterable, Mapping, Sequence

from vring_serial.errors import ResourceError
from vring_serial.service.aside import Aside, may_be_kept
from vring_serial.unix_fds import close_all, receive

#: Longest datagram; systemd's.
DATAGRAM_MAX = 4096
#: Descriptors beside one datagram: what the kernel passes (SCM_MAX_FD).
FDS_MAX = 253
#: Longest name; systemd's (``FDNAME_MAX``).
NAME_MAX = 255
#: Seconds that the keeper has to take what a worker sends: it does little else. A frontend waits
#: for 5 s before it gives its device up.
HEAR_SECONDS = 3.0
#: What sending gives once the other end is closed.
_GONE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN)


def is_name(name: str) -> bool:
    """Return whether systemd takes it as a FDNAME: printable ASCII without a colon."""
    return (
        1 <= len(name) <= NAME_MAX
        and ":" not in name
        and all(" " <= character < "\x7f" for character in name)
    )


def connect(address: str) -> socket.socket:
    """Return a socket to whoever has this ``NOTIFY_SOCKET``. Raises ResourceError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
    except OSError as error:
        sock.close()
        raise ResourceError(f"NOTIFY_SOCKET {address}: {error.strerror}") from None
    return sock


class DescriptorStore:
    """The keeper's side: what one worker stored.

    Args:
        limit: descriptors that a worker may store; more are closed, as systemd does.
        stored: what is in it already, by name, oldest first; taken over.

    Attributes:
        refused: messages of which not every descriptor was kept: there were too many, or the
            process had no number for them, or closing them may take for ever.
        unfit: how many of their descriptors may take for ever to close.
        aside: closes what is not kept.
    """

    def __init__(self, limit: int, stored: Mapping[str, Sequence[int]] | None = None) -> None:
        self.refused = 0
        self.unfit = 0
        self.aside = Aside()
        self._limit = limit
        self._fds: dict[str, list[int]] = {n: list(fds) for n, fds in (stored or {}).items()}
        self._count = sum(map(len, self._fds.values()))

    def __len__(self) -> int:
        return self._count

    @property
    def descriptors(self) -> dict[str, list[int]]:
        """The descriptors by name, oldest first; they stay the store's."""
        return {name: list(fds) for name, fds in self._fds.items()}

    def receive(self, sock: socket.socket) -> dict[str, str] | None:
        """Take one datagram; return its fields that concern no descriptor, None if none waits.

        Whatever it holds, nothing else than this store is changed.
        """
        room = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)
        try:
            data, ancillary, flags, _ = sock.recvmsg(
                DATAGRAM_MAX, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        fds: list[int] = []
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                fds += numbers
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                self.refused += 1
                return {}
            fields = _fields(data)
            name = fields.pop("FDNAME", "stored")
            fields.pop("FDPOLL", None)
            if fields.pop("FDSTORE", "") == "1" and is_name(name):
                self._add(name, fds)
            elif fields.pop("FDSTOREREMOVE", "") == "1":
                self._remove(name)
            return fields
        finally:
            self.aside.close(fds)

    def close(self) -> None:
        """Close everything. Safe to call twice."""
        fds = [fd for fds in self._fds.values() for fd in fds]
        self._fds.clear()
        self._count = 0
        self.aside.close(fds)

    def forsake(self) -> None:
        """Close everything in a fork of the process that goes on having it."""
        close_all(fd for fds in self._fds.values() for fd in fds)
        close_all(self.aside.queued)

    def _add(self, name: str, fds: list[int]) -> None:
        for fd in list(fds):
            if self._count >= self._limit:
                break
            if not may_be_kept(fd):
                self.unfit += 1
                continue
            self._fds.setdefault(name, []).append(fd)
            self._count += 1
            fds.remove(fd)
        self.refused += bool(fds)

    def _remove(self, name: str) -> None:
        fds = self._fds.pop(name, [])
        self._count -= len(fds)
        self.aside.close(fds)


class Notifier:
    """The worker's side.

    Args:
        sock: a datagram socket connected to the keeper; taken over. See :meth:`from_environment`.
        patience: seconds that the keeper has to take a message.

    Attributes:
        gone: the keeper has ended, or it did not take a message in time: nothing is sent any more.
    """

    def __init__(self, sock: socket.socket, *, patience: float = HEAR_SECONDS) -> None:
        self.gone = False
        self._sock = sock
        self._patience = patience
        sock.settimeout(patience)

    @staticmethod
    def from_environment(environment: dict[str, str]) -> Notifier | None:
        """Return the one of ``NOTIFY_SOCKET``, which is removed; None if it is not set.

        Raises ResourceError if it cannot be reached.
        """
        address = environment.pop("NOTIFY_SOCKET", None)
        return None if address is None else Notifier(connect(address))

    def notify(self, *lines: str, fds: Iterable[int] = ()) -> None:
        """Send lines and descriptors. Raises ResourceError if nobody hears."""
        if self.gone:
            raise ResourceError("the keeper does not hear any more")
        passed = array.array("i", fds)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)] if passed else []
        try:
            self._sock.sendmsg(["\n".join(lines).encode()], rights, socket.MSG_NOSIGNAL)
        except TimeoutError:
            self.gone = True
            raise ResourceError("the keeper took nothing for too long") from None
        except OSError as error:
            self.gone = error.errno in _GONE
            raise ResourceError(f"the keeper does not hear: {error.strerror}") from None

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def hear(self) -> tuple[dict[str, str], list[int]]:
        """Return what the keeper says to this process, and descriptors, the caller's.

        Raises BlockingIOError: it says nothing; OSError.
        """
        self._sock.setblocking(False)
        try:
            found = receive(self._sock, DATAGRAM_MAX, FDS_MAX)
        finally:
            self._sock.settimeout(self._patience)
        return _fields(found.data), list(found.fds)

    def store(self, name: str, fd: int) -> None:
        """Have a duplicate of ``fd`` kept under ``name``, beside others of that name."""
        assert is_name(name), name
        self.notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd])

    def remove(self, name: str) -> None:
        """Have every descriptor of that name closed."""
        self.notify("FDSTOREREMOVE=1", f"FDNAME={name}")

    def barrier(self, seconds: float = 5.0) -> None:
        """Wait until everything sent before has been taken. Raises ResourceError after a while."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                self.notify("BARRIER=1", fds=[writer])
            finally:
                os.close(writer)
            poll = select.poll()
            poll.register(reader, 0)  # its hang-up: the keeper has closed the other end
            if not poll.poll(1000 * seconds):
                raise ResourceError(f"the keeper took nothing for {seconds:g} s")
        finally:
            os.close(reader)

    def close(self) -> None:
        """Close the socket. Safe to call twice."""
        with contextlib.suppress(OSError):
            self._sock.close()


def _fields(data: bytes) -> dict[str, str]:
    """Return the lines ``KEY=value``; others are left out."""
    fields = {}
    for line in data.decode("ascii", errors="replace").splitlines():
        key, equals, value = line.partition("=")
        if equals and key:
            fields[key] = value
    return fields
