"""The log of a port: what the guest writes goes to a file as well, and waits for no disk.

Whoever moves the guest's bytes writes them to a pipe that takes what it has room for. A thread of
the log moves them on to a second pipe, and from there to the file. The second one is for the disk's
sake: while ``splice`` writes to a file, nobody can write to the pipe that it reads from.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import threading
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass

from vring_serial.chardev.kept import Kept
from vring_serial.chardev.log_file import STEP_BYTES, LogFile
from vring_serial.chardev.options import Options, check_path, check_range
from vring_serial.chardev.relay import Relay
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.keeping import Keeping
from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger(__name__)

#: Bytes that wait for a slow disk, where this user may have so large a pipe.
QUEUE_BYTES = 1 << 20
#: Seconds until a write that failed is tried again; doubled each time, up to RETRY_MOST.
RETRY_SECONDS = 1.0
RETRY_MOST = 30.0
#: Seconds for the last bytes at the end; a disk that takes longer keeps its thread, nobody else.
END_SECONDS = 1.0
MAX_BACKUPS = 1000
#: Names of the section and of the pipes that a successor process takes over.
_SECTION, _QUEUE, _HAND = "log", "queue", "hand"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogOptions(Options):
    """Options of a log, which every kind of chardev has beside its own.

    Attributes:
        logfile: the file; "" for no log.
        logappend: keep the file's contents; otherwise the file is emptied first.
        logsize: bytes after which the file is renamed to ``logfile.0`` and another one begins; 0:
            never.
        logbackups: renamed files that are kept; the oldest is removed.
    """

    logfile: str = ""
    logappend: bool = False
    logsize: int = 0
    logbackups: int = 3

    def __post_init__(self) -> None:
        if self.logfile:
            check_path("logfile", self.logfile)
        for key in ("logappend", "logsize", "logbackups"):
            if not self.logfile and getattr(self, key) != self.keys()[key].default:
                raise ConfigError("goes with logfile only", key)
        check_range("logsize", self.logsize, 0, 2**62)
        check_range("logbackups", self.logbackups, 0, MAX_BACKUPS)


class OutputLog:
    """What the guest writes to a port, in a file.

    Nothing waits for it: what a disk does not take in time is left out and counted.

    Args:
        id: the chardev's name, for logs.
        options: with a ``logfile``.
        file: what to write to; None: as the options say.

    Attributes:
        fd: end of a pipe to write to, non-blocking, while started; else -1.
        left_out: bytes that the pipe had no room for, as far as whoever writes has said.
    """

    def __init__(self, id: str, options: LogOptions, file: LogFile | None = None) -> None:
        self._file = file or LogFile(options.logfile, options.logsize, options.logbackups)
        self.options = options
        self.fd = -1
        self.left_out = 0
        self._id = id
        self._log = RateLimitedLog(log, burst=1, seconds=60)
        self._kept = Kept(None)
        self._drain: _Drain | None = None

    async def start(self, keeping: Keeping | None = None) -> None:
        """Open the file, and log from now on. Does nothing if started already.

        Args:
            keeping: of the chardev; bytes that a predecessor process left unwritten are written.

        Raises:
            ResourceError: the file cannot be written to; everything is closed again.
        """
        if self._drain is not None:
            return
        options = self.options
        self._kept = Kept(None if keeping is None else keeping.scoped(_SECTION))
        file = self._file
        pipes: list[tuple[str, Relay]] = []
        wake = -1
        try:
            file.open(empty=not options.logappend and not self._kept.started_before)
            for role, size in ((_QUEUE, QUEUE_BYTES), (_HAND, STEP_BYTES)):
                pipes.append((role, self._kept.pipe(role, size)))
            self._kept.started()
            wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            drain = _Drain(self._id, file, pipes[0][1].read_fd, pipes[1][1], wake)
            drain.start()
        except BaseException as error:
            file.close()
            for role, pipe in pipes:
                self._kept.end_relay(role, pipe)
            if wake >= 0:
                os.close(wake)
            if isinstance(error, (OSError, RuntimeError)):  # RuntimeError: no thread is left
                why = error.strerror if isinstance(error, OSError) else str(error)
                text = f"chardev {self._id}: cannot log to {options.logfile}: {why}"
                raise ResourceError(text) from error
            raise
        self._drain = drain
        self.fd = pipes[0][1].write_fd

    async def aclose(self) -> None:
        """Write what waits, within END_SECONDS, and close. May be called twice.

        Nobody writes to ``fd`` any more.
        """
        if self._drain is None:
            return
        drain, self._drain = self._drain, None
        fd, self.fd = self.fd, -1
        for role in (_QUEUE, _HAND):
            self._kept.forget_relay(role)
        os.close(fd)
        if not await drain.end():
            log.warning("chardev %s: the end of %s is missing", self._id, self.options.logfile)
        if self.left_out:
            text = "chardev %s: %d bytes in all were left out of %s, which was too slow for them"
            log.warning(text, self._id, self.left_out, self.options.logfile)

    def reopen(self) -> None:
        """Go on in a new file at the path, after the one there was renamed, soon."""
        if self._drain is not None:
            self._drain.reopen()

    def write(self, data: bytes) -> None:
        """Write what Python code took from the guest."""
        if self.fd < 0:
            return
        try:
            done = os.write(self.fd, data)
        except BlockingIOError:
            done = 0
        if done < len(data):
            self.left_out += len(data) - done
            self.falls_behind()

    def falls_behind(self) -> None:
        """Say that bytes are left out now."""
        text = "chardev %s: %s is too slow: bytes of the guest's are left out of it"
        self._log.warning(text, self._id, self.options.logfile)


class _Drain(threading.Thread):
    """Moves what is in the queue to the file; a thread, since disks may make it wait for long.

    Args:
        id: the chardev's name, for logs.
        file: open; closed by the thread at its end, as the descriptors that follow are.
        queue: end to read from of the pipe that is written to.
        hand: the pipe in between, which nobody else uses.
        wake: an eventfd.
    """

    def __init__(self, id: str, file: LogFile, queue: int, hand: Relay, wake: int) -> None:
        # Not waited for at the end of the process: it may hang for as long as the disk does.
        super().__init__(name=f"log-{id}", daemon=True)
        self._id = id
        self._file = file
        self._queue = queue
        self._hand = hand
        self._wake = wake
        self._orders, self._all = select.poll(), select.poll()
        self._orders.register(wake, select.POLLIN)
        self._all.register(wake, select.POLLIN)
        self._all.register(queue, select.POLLIN)
        self._loop = asyncio.get_running_loop()
        self._context = copy_context()
        self._done = asyncio.Event()
        self._ending = False
        self._wants_reopen = False
        self._delay = 0.0  # seconds until the next attempt; 0: the last one succeeded

    def reopen(self) -> None:
        """Open the file at its path anew."""
        self._wants_reopen = True
        os.eventfd_write(self._wake, 1)

    async def end(self) -> bool:
        """Have the rest written, and end; return whether all of it was, in time."""
        self._ending = True
        os.eventfd_write(self._wake, 1)
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._done.wait()
        except TimeoutError:
            return False
        self.join()
        return not self._delay

    def run(self) -> None:
        try:
            ending = False
            self._work()  # a predecessor may have left bytes that nobody would tell of
            while not ending:
                if self._delay:
                    self._orders.poll(1000 * self._delay)
                else:
                    self._all.poll()
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
                ending = self._ending  # before the last bytes are looked for
                self._work()
        finally:
            self._file.close()
            for fd in (self._queue, *self._hand, self._wake):
                os.close(fd)
            self._tell(self._done.set)

    def _work(self) -> None:
        if self._wants_reopen:
            self._wants_reopen = False
            try:
                self._file.open()
            except OSError as error:
                text = "chardev %s: cannot open %s anew, and go on in the file before: %s"
                self._tell(log.warning, text, self._id, self._file.path, error.strerror)
        try:
            self._move()
        except OSError as error:
            if not self._delay:
                text = "chardev %s: %s: %s; what the guest writes waits, up to %d KiB"
                text_args = (self._id, self._file.path, error.strerror, QUEUE_BYTES >> 10)
                self._tell(log.warning, text, *text_args)
            self._delay = min(2 * self._delay or RETRY_SECONDS, RETRY_MOST)
        else:
            self._delay = 0.0

    def _move(self) -> None:
        """Write all that is there now. Raises OSError."""
        while True:
            while self._file.take(self._hand.read_fd):
                pass
            try:
                flags = os.SPLICE_F_NONBLOCK
                if not os.splice(self._queue, self._hand.write_fd, STEP_BYTES, flags=flags):
                    return
            except BlockingIOError:
                return

    def _tell(self, function: Callable[..., object], *args: object) -> None:
        """Call a function in the event loop, unless that has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args, context=self._context)
