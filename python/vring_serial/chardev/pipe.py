"""pipe: named pipes that exist already, one for each direction or one for both."""

from __future__ import annotations

from dataclasses import dataclass

from vring_serial.chardev.options import Options, check_path


@dataclass(frozen=True, slots=True, kw_only=True)
class PipeOptions(Options):
    """Options of pipe.

    Attributes:
        path: PATH.in is read for the guest and PATH.out takes its output; if they do not exist, PATH
            itself does both.
    """

    path: str = ""

    def __post_init__(self) -> None:
        check_path("path", self.path)
