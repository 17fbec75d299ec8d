"""serial: a serial line of the host, or any other terminal that has a path."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import termios
from dataclasses import dataclass

from vring_serial.chardev.fd import INPUT, MAX_RETRY_SECONDS, OUTPUT, FdChardev
from vring_serial.chardev.hangup import HangupWatch, unread
from vring_serial.chardev.options import Options, check_path
from vring_serial.chardev.terminal import set_line
from vring_serial.errors import ResourceError

#: How long a break lasts, as tcsendbreak(3) has it.
BREAK_SECONDS = 0.25
_TIOCSBRK, _TIOCCBRK = 0x5427, 0x5428


@dataclass(frozen=True, slots=True, kw_only=True)
class SerialOptions(Options):
    """Options of serial.

    Attributes:
        path: path of the device.
    """

    path: str = ""

    def __post_init__(self) -> None:
        check_path("path", self.path)


class SerialChardev(FdChardev):
    """A terminal that is there already, with the settings that QEMU gives it: 115200 baud, 8N1.

    If it hangs up or fails (it was unplugged), the end closes, and opens again when the path can be
    opened again, which is tried at growing intervals.

    A successor of a process that was killed goes on with the same open terminal, and neither loses
    nor doubles a byte.
    """

    retry_seconds = 1.0

    def __init__(self, id: str, options: SerialOptions) -> None:
        super().__init__(id)
        self.options = options
        self._watch: HangupWatch | None = None
        self._break: asyncio.TimerHandle | None = None

    @property
    def description(self) -> str:
        return f"serial:{self.options.path}"

    def peer_gone(self, reason: OSError | None = None) -> None:
        if self.end is None:
            return
        self._close_end()
        self._release()
        loop = asyncio.get_running_loop()
        self._failed(reason or OSError(errno.EIO, os.strerror(errno.EIO)), loop.time())
        self._reopening = loop.call_later(self._delay, self._try_again)

    def send_break(self) -> None:
        if self._output < 0 or self._break is not None:
            return
        try:
            fcntl.ioctl(self._output, _TIOCSBRK)
        except OSError as error:
            raise self._error("send a break", error) from error
        self._break = asyncio.get_running_loop().call_later(BREAK_SECONDS, self._end_break)

    def _open_fds(self) -> None:
        path = self.options.path
        try:
            self._input = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
            if not os.isatty(self._input):
                raise self._error(f"open {path}", "it is no terminal")
            set_line(self._input)
            self._output = os.dup(self._input)
        except (OSError, termios.error) as error:
            why = error if isinstance(error, OSError) else str(error)
            raise self._error(f"open {path}", why) from error

    def _make_relays(self) -> None:
        super()._make_relays()
        if self._watch is None and self._input >= 0:
            try:
                self._watch = HangupWatch(lambda fd: self.peer_gone(), left=self._unread)
                self._watch.watch(self._input)
            except OSError as error:
                raise self._error("watch it", error) from error

    def _fds_closing(self) -> None:
        if self._break is not None:
            self._end_break()
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _open(self) -> None:
        if self._input < 0:  # a predecessor had lost it
            self._try_again()
        else:
            super()._open()

    def _try_again(self) -> None:
        self._reopening = None
        try:
            self._open_fds()
            self._kept.keep(INPUT, self._input)
            self._kept.keep(OUTPUT, self._output)
            self._make_relays()
        except ResourceError:
            self._release()
            self._delay = min(2 * self._delay, MAX_RETRY_SECONDS)
            loop = asyncio.get_running_loop()
            self._reopening = loop.call_later(self._delay, self._try_again)
            return
        self._delay = self.retry_seconds
        self._open()

    def _unread(self, fd: int) -> int:
        relay = self._input_relay
        return unread(fd) or (0 if relay is None else unread(relay.read_fd)) or self.taken()

    def _end_break(self) -> None:
        if self._break is not None:
            self._break.cancel()
            self._break = None
        with contextlib.suppress(OSError):  # it has hung up
            fcntl.ioctl(self._output, _TIOCCBRK)
