"""pipe: existing named pipes, one per direction or one for both."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from vring_serial.chardev.fd import FdChardev
from vring_serial.chardev.options import Options, check_path


@dataclass(frozen=True, slots=True, kw_only=True)
class PipeOptions(Options):
    """Options of pipe.

    Attributes:
        path: PATH.in has the guest's input and PATH.out takes its output; if either does not exist,
            PATH serves for both.
    """

    path: str = ""

    def __post_init__(self) -> None:
        check_path("path", self.path)


class PipeChardev(FdChardev):
    """Named pipes as a host end.

    They are opened for both directions, as QEMU does, so readers and writers on the other side may
    come and go without the guest noticing; what the guest writes while nobody reads stays in the
    pipe. With one pipe for both directions the guest may read its own output.
    """

    def __init__(self, id: str, options: PipeOptions) -> None:
        super().__init__(id)
        self.options = options

    def _open_fds(self) -> None:
        path = self.options.path
        pair = (f"{path}.in", f"{path}.out")
        if all(os.path.lexists(name) for name in pair):
            self._input = self._open_fifo(pair[0])
            self._output = self._open_fifo(pair[1])
        elif os.path.lexists(path):
            self._input = self._open_fifo(path)
            self._output = self._open_fifo(path)
        else:
            raise self._error(
                f"open pipe {path}",
                f"neither {pair[0]} and {pair[1]} nor {path} exist (mkfifo makes them)",
            )

    def _open_fifo(self, path: str) -> int:
        try:
            if not stat.S_ISFIFO(os.stat(path).st_mode):
                raise self._error(f"open pipe {path}", "it exists and is not a named pipe")
            return os.open(path, os.O_RDWR | os.O_NONBLOCK)
        except OSError as error:
            raise self._error(f"open pipe {path}", error) from error

    @property
    def description(self) -> str:
        return f"pipe:{self.options.path}"
