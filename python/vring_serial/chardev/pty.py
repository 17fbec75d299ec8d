"""pty: a pseudo-terminal whose other side anybody may open."""

from __future__ import annotations

from dataclasses import dataclass

from vring_serial.chardev.options import Options, check_path


@dataclass(frozen=True, slots=True, kw_only=True)
class PtyOptions(Options):
    """Options of pty.

    Attributes:
        path: a symbolic link to make to the terminal, removed at the end; "" for none.
    """

    path: str = ""

    def __post_init__(self) -> None:
        if self.path:
            check_path("path", self.path)
