"""file: the guest's output goes to a file; optionally its input comes from another."""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass

from vring_serial.chardev.fd import OUTPUT, FdChardev
from vring_serial.chardev.options import Options, check_path

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions(Options):
    """Options of file.

    Attributes:
        path: file for the guest's output; created if it does not exist.
        append: keep the file's contents; otherwise the file is emptied first.
        input_path: file with the guest's input; "" for none.
    """

    path: str = ""
    append: bool = False
    input_path: str = ""

    def __post_init__(self) -> None:
        check_path("path", self.path)
        if self.input_path:
            check_path("input-path", self.input_path)


class FileChardev(FdChardev):
    """A file for the guest's output.

    A write error (a full disk) is logged, and the write is retried after a second and then at
    growing intervals. Until it works the host end is closed, so the guest's writers wait and lose
    nothing. After a rename, :meth:`reopen` continues in a new file at the path.
    """

    retry_seconds = 1.0

    def __init__(self, id: str, options: FileOptions) -> None:
        super().__init__(id)
        self.options = options

    def _open_fds(self) -> None:
        # The input first: if it is missing, the output must not have been emptied.
        if self.options.input_path:
            self._input = self._open_input(self.options.input_path)
        self._output = self._open_output()
        if not self.options.append:
            self._empty(self._output)

    def reopen(self) -> None:
        if self._output < 0:
            return
        old, self._output = self._output, self._open_output()
        try:
            self._make_relays()

            def keep() -> None:
                self._kept.keep(OUTPUT, self._output)

            if self.end is not None:
                self._replace_end(self._descriptors(), keep)
            else:
                keep()
        finally:
            os.close(old)

    def _open_output(self) -> int:
        # With O_APPEND, writing continues at the new end after the file is truncated.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOCTTY | os.O_NONBLOCK | os.O_APPEND
        try:
            return os.open(self.options.path, flags, 0o666)
        except OSError as error:
            raise self._error(f"write to {self.options.path}", error) from error

    def _empty(self, fd: int) -> None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return
        log.warning(
            "chardev %s: %s is emptied of %d bytes; append=on keeps them",
            *(self.id, self.options.path, status.st_size),
        )
        try:
            os.ftruncate(fd, 0)
        except OSError as error:
            raise self._error(f"empty {self.options.path}", error) from error

    def _open_input(self, path: str) -> int:
        try:
            # A FIFO that is also open for writing gives no end of file between its writers.
            fifo = stat.S_ISFIFO(os.stat(path).st_mode)
            fd = os.open(path, (os.O_RDWR if fifo else os.O_RDONLY) | os.O_NOCTTY | os.O_NONBLOCK)
        except OSError as error:
            raise self._error(f"read from {path}", error) from error
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise self._error(f"read from {path}", "it is a directory")
        return fd

    @property
    def description(self) -> str:
        return f"file:{self.options.path}"
