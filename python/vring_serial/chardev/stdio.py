"""stdio: the process's own standard input and output."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import os
import signal
import stat
import termios
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from vring_serial.chardev.fd import FdChardev
from vring_serial.chardev.hangup import HangupWatch, LastWords, unread
from vring_serial.chardev.options import Options
from vring_serial.chardev.terminal import set_raw, terminal_size


@dataclass(frozen=True, slots=True, kw_only=True)
class StdioOptions(Options):
    """Options of stdio.

    Attributes:
        signal: whether Ctrl-C and similar keys end the process; if not, they go to the guest.
    """

    signal: bool = True


class StdioChardev(FdChardev):
    """Descriptors 0 and 1 as the host end; a terminal is set to raw mode until close or exit.

    The process's own output is not affected: the end has separate, non-blocking descriptors,
    wherever the system can make them. Only one stdio chardev may be started in a process.
    """

    kept = False  # a successor has the same standard streams, which :func:`remember` is for

    _holder: ClassVar[StdioChardev | None] = None

    def __init__(self, id: str, options: StdioOptions | None = None) -> None:
        super().__init__(id)
        self.options = options or StdioOptions()
        self._undo: list[Callable[[], None]] = []
        self._watch: HangupWatch | None = None
        self._last_words = LastWords(self.peer_gone, self._unread)
        self._on_terminal = False
        self._size: tuple[int, int] | None = None

    @property
    def description(self) -> str:
        return "stdio"

    def peer_gone(self, reason: OSError | None = None) -> None:
        if reason is None and self._on_terminal:
            # A raw terminal ends only by its hang-up, which also ends the output.
            reason = OSError(errno.EIO, os.strerror(errno.EIO))
        if self._input >= 0 and self._last_words.remain(self._input, reason):
            return
        self._last_words.cancel()
        super().peer_gone(reason)

    def _open_fds(self) -> None:
        if StdioChardev._holder is not None:
            raise self._error(
                "use stdio", f"chardev {StdioChardev._holder.id} of this process has it"
            )
        StdioChardev._holder = self
        try:
            self._input = self._own(0, os.O_RDONLY)
            self._output = self._own(1, os.O_WRONLY)
            self._watch = HangupWatch(lambda fd: self.peer_gone(), left=self._unread)
            self._watch.watch(self._input)  # a broken output shows when it is written
            self._on_terminal = os.isatty(self._input)
            if self._on_terminal:
                self._take_terminal(self._input)
            if self._on_terminal or os.isatty(self._output):
                self._on_signal(signal.SIGWINCH, self._tell_size)
        except (OSError, termios.error) as error:
            why = error if isinstance(error, OSError) else str(error)
            raise self._error("use stdio", why) from error

    def _fds_closing(self) -> None:
        self._last_words.cancel()
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        while self._undo:
            self._undo.pop()()
        self._size = None
        if StdioChardev._holder is self:
            StdioChardev._holder = None

    def _open(self) -> None:
        super()._open()
        self._size = None
        self._tell_size()

    def _input_ended(self) -> None:
        if self._watch is not None:
            self._watch.unwatch(self._input)
        super()._input_ended()

    def _unread(self, fd: int) -> int:
        relay = self._input_relay
        return unread(fd) or (0 if relay is None else unread(relay.read_fd)) or self.taken()

    def _own(self, fd: int, access: int) -> int:
        """Return a non-blocking descriptor for the file that ``fd`` is open on.

        O_NONBLOCK is a property of the open file, which other processes and our own standard error
        may share, so the file is opened again if its kind allows that without loss.
        """
        mode = os.fstat(fd).st_mode
        if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
            try:
                return os.open(f"/proc/self/fd/{fd}", access | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError:
                pass  # not ours to open, or nobody reads the pipe yet
        if not stat.S_ISREG(mode) and _was_blocking(fd):
            os.set_blocking(fd, False)
            self._undo.append(lambda: os.set_blocking(fd, True))
        return os.dup(fd)

    def _take_terminal(self, fd: int) -> None:
        saved = _remembered.attributes if _remembered else None
        saved = saved or termios.tcgetattr(fd)

        def restore() -> None:
            with contextlib.suppress(termios.error):  # it hung up
                if _in_foreground(fd):
                    termios.tcsetattr(fd, termios.TCSANOW, saved)

        def go_raw() -> None:
            with contextlib.suppress(termios.error):
                if _in_foreground(fd):
                    set_raw(fd, keep_output=True, keep_signals=self.options.signal)

        self._undo.append(restore)
        atexit.register(restore)
        self._undo.append(lambda: atexit.unregister(restore))
        go_raw()
        # After Ctrl-Z the shell has set the terminal to its own mode.
        self._on_signal(signal.SIGCONT, go_raw)

    def _on_signal(self, number: int, handler: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        try:
            loop.add_signal_handler(number, handler)
        except (ValueError, RuntimeError):
            return  # not the main thread; it has no say in signals
        self._undo.append(lambda: _remove_signal_handler(loop, number))

    def _tell_size(self) -> None:
        size = terminal_size(self._input) or terminal_size(self._output)
        if self.end is not None and size is not None and size != self._size:
            self._size = size
            if self._user is not None:
                self._user.end_resized(*size)


@dataclass(frozen=True, slots=True)
class StreamsState:
    """How the standard streams were.

    Attributes:
        blocking: the descriptors that were blocking.
        terminal: settings of the terminal that is standard input (termios(3)), without its special
            characters; None if it is none.
        characters: those.
    """

    blocking: tuple[int, ...] = ()
    terminal: tuple[int, ...] | None = None
    characters: tuple[bytes | int, ...] = ()

    @classmethod
    def now(cls) -> StreamsState:
        """Return how they are."""
        terminal: list[Any] | None = termios.tcgetattr(0) if os.isatty(0) else None
        return cls(
            tuple(fd for fd in (0, 1) if os.get_blocking(fd)),
            None if terminal is None else tuple(terminal[:-1]),
            () if terminal is None else tuple(terminal[-1]),
        )

    @property
    def attributes(self) -> list[Any] | None:
        """Return the terminal's settings for ``tcsetattr``; None if it is none."""
        return None if self.terminal is None else [*self.terminal, list(self.characters)]


_remembered: StreamsState | None = None


def remember(before: StreamsState | None = None) -> Callable[[], None]:
    """Note how the standard streams are, and return what puts them back.

    For a process whose children use them, and may be killed before they put anything back: what a
    killed one left is not what the next one is to leave.

    Args:
        before: what this process noted before its code was replaced.
    """
    global _remembered
    found = _remembered = before or StreamsState.now()

    def put_back() -> None:
        for fd in found.blocking:
            with contextlib.suppress(OSError):
                os.set_blocking(fd, True)
        with contextlib.suppress(termios.error, OSError):  # it hung up
            if (attributes := found.attributes) is not None and _in_foreground(0):
                termios.tcsetattr(0, termios.TCSANOW, attributes)

    return put_back


def remembered() -> StreamsState | None:
    """Return what was noted; None if nothing was."""
    return _remembered


def _was_blocking(fd: int) -> bool:
    return fd in _remembered.blocking if _remembered else os.get_blocking(fd)


def _in_foreground(fd: int) -> bool:
    """Return whether setting the terminal would not stop the process (SIGTTOU)."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:  # not our controlling terminal, where that rule does not hold
        return True


def _remove_signal_handler(loop: asyncio.AbstractEventLoop, number: int) -> None:
    if not loop.is_closed():
        loop.remove_signal_handler(number)
