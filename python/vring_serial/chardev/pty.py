"""pty: a pseudo-terminal whose slave any program may open."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import select
import socket
import sys
from dataclasses import dataclass

from vring_serial.chardev.base import Chardev, DescriptorEnd
from vring_serial.chardev.hangup import unread
from vring_serial.chardev.kept import Kept
from vring_serial.chardev.options import Options, check_path
from vring_serial.chardev.relay import Relay
from vring_serial.chardev.terminal import set_raw, terminal_size

# The kernel does not tell the master that the slave was opened or that its size changed.
POLL_SECONDS = 0.2

_MASTER = "master"  # roles of descriptors (see Keeping)
_INPUT, _OUTPUT = "input", "output"
_TIOCGPTN = 0x80045430  # the number of the slave


@dataclass(frozen=True, slots=True, kw_only=True)
class PtyOptions(Options):
    """Options of pty.

    Attributes:
        path: symbolic link to make to the terminal, removed on close; "" for none.
    """

    path: str = ""

    def __post_init__(self) -> None:
        if self.path:
            check_path("path", self.path)


class PtyChardev(Chardev):
    """A pseudo-terminal in raw mode; its end is open while any program has the slave open.

    The size of the terminal is reported when the end opens, if the slave's user has set one, and
    whenever it changes.

    Attributes:
        path: path of the slave (``/dev/pts/3``) while started, else "".
    """

    def __init__(self, id: str, options: PtyOptions | None = None) -> None:
        super().__init__(id)
        self.options = options or PtyOptions()
        self.path = ""
        self._master = -1
        self._timer: asyncio.TimerHandle | None = None
        self._size: tuple[int, int] | None = None
        self._kept = Kept(None)
        self._input_relay: Relay | None = None
        self._output_relay: Relay | None = None
        self._claim: socket.socket | None = None  # of the link

    async def start(self) -> None:
        if self._master >= 0:
            return
        try:
            self._kept = Kept(self.keeping)
            if self._kept.started_before:
                self._go_on()
            else:
                self._make_terminal()
                self._kept.keep(_MASTER, self._master)
                self._make_link()
                self._kept.started()
            self._make_relays()
        except BaseException:
            self._release()
            raise
        self._poll()

    async def aclose(self) -> None:
        self._close_end()
        self._release()

    def peer_gone(self, reason: OSError | None = None) -> None:
        if self.end is None:
            return
        self._close_end()
        self._size = None
        # The next program should not inherit the settings of the last one.
        set_raw(self._master)

    @property
    def filename(self) -> str:
        return f"pty:{self.path}"

    @property
    def description(self) -> str:
        link = f" ({self.options.path})" if self.options.path else ""
        return f"pty:{self.path}{link}" if self.path else f"pty{link}"

    def _go_on(self) -> None:
        """Take the predecessor's terminal; its link, unless somebody has removed it, is there."""
        self._master = self._kept.take(_MASTER)
        try:
            number = fcntl.ioctl(self._master, _TIOCGPTN, bytes(4))
            self.path = f"/dev/pts/{int.from_bytes(number, sys.byteorder)}"
            if self.options.path:
                self._claim = _claim(self.options.path)
        except OSError as error:
            raise self._error("go on with a pty", error) from error

    def _make_terminal(self) -> None:
        try:
            self._master, slave = os.openpty()
        except OSError as error:
            raise self._error("make a pty", error) from error
        try:
            self.path = os.ttyname(slave)
            set_raw(slave)
            os.set_blocking(self._master, False)
        except OSError as error:
            raise self._error("make a pty", error) from error
        finally:
            # The master sees a hang-up only after the slave was opened once and closed.
            os.close(slave)

    def _make_relays(self) -> None:
        try:
            self._input_relay = self._kept.relay(_INPUT, self._master)
            self._output_relay = self._kept.relay(_OUTPUT, self._master)
        except OSError as error:
            raise self._error("make a pipe", error) from error

    def _make_link(self) -> None:
        link = self.options.path
        if not link:
            return
        try:
            self._claim = _claim(link)
            if self._is_left_over(link):
                os.unlink(link)
            os.symlink(self.path, link)
        except FileExistsError:
            raise self._error(f"make the link {link}", "it exists already") from None
        except OSError as error:
            raise self._error(f"make the link {link}", error) from error

    def _is_left_over(self, link: str) -> bool:
        """Return whether a killed process left the link: see docs/decisions/0014."""
        if not os.path.islink(link):
            return False
        target = os.readlink(link)
        if not os.path.exists(link) or target == self.path:
            return True
        ours = os.lstat(link).st_uid == os.geteuid() and re.fullmatch(r"/dev/pts/[0-9]+", target)
        return bool(ours) and self._claim is not None

    def _poll(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(POLL_SECONDS, self._poll)
        readable, hung_up = self._state()
        if self.end is not None:
            if hung_up and not readable:
                self.peer_gone()
        elif readable or not hung_up:
            # Bytes of a program that has left are still delivered; end of file follows.
            self._open_end(self._descriptors())
        if self.end is not None:
            self._tell_size()

    def _descriptors(self) -> DescriptorEnd:
        return DescriptorEnd(
            read_fd=self._master,
            write_fd=self._master,
            kept=self.keeping is not None,
            read_relay=self._input_relay,
            write_relay=self._output_relay,
        )

    def _state(self) -> tuple[bool, bool]:
        """Return whether there are bytes to read, and whether no program has the slave open."""
        poller = select.poll()
        poller.register(self._master, select.POLLIN)
        mask = sum(mask for _, mask in poller.poll(0))
        relay = self._input_relay
        left = self.taken() or (relay is not None and unread(relay.read_fd))
        return bool(mask & select.POLLIN or left), bool(mask & select.POLLHUP)

    def _tell_size(self) -> None:
        size = terminal_size(self._master)
        if size is not None and size != self._size:
            self._size = size
            if self._user is not None:
                self._user.end_resized(*size)

    def _release(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._master < 0:
            return
        # The link may be gone by now, or belong to another process.
        with contextlib.suppress(OSError):
            if self.options.path and os.readlink(self.options.path) == self.path:
                os.unlink(self.options.path)
        if self._claim is not None:
            self._claim.close()
            self._claim = None
        for role, relay in ((_INPUT, self._input_relay), (_OUTPUT, self._output_relay)):
            self._kept.end_relay(role, relay)
        self._input_relay = self._output_relay = None
        self._kept.keep(_MASTER, -1)
        os.close(self._master)
        self._master = -1
        self.path = ""
        self._size = None


def _claim(link: str) -> socket.socket | None:
    """Bind the abstract address that marks the link as in use until this process ends.

    The address is derived from the link's directory and name. Return None if another process has
    it.
    """
    directory, name = os.path.split(link)
    status = os.stat(directory or ".")
    digest = hashlib.sha256(os.fsencode(f"{status.st_dev}:{status.st_ino}:{name}")).hexdigest()
    # Of a stream: datagrams could be sent to any address, from within a sandbox too.
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0vring-pty-{digest}")
    except OSError as error:
        claim.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return claim
