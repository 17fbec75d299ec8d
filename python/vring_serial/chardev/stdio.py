"""stdio: the process's own standard input and output."""

from __future__ import annotations

from dataclasses import dataclass

from vring_serial.chardev.options import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class StdioOptions(Options):
    """Options of stdio.

    Attributes:
        signal: whether Ctrl-C and its like end the process; if not, they go to the guest.
    """

    signal: bool = True
