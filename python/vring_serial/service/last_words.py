"""What is written when a system call has ended the process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LastWords:
    """The line that is logged about a system call that ends the process.

    Attributes:
        line: with its newline.
        time_at, name_at: where the time is in it (23 bytes), and where the call's name goes.
        ahead_of_utc: of the time, in seconds.
        fd: where it is written.
    """

    line: bytes
    time_at: int
    name_at: int
    ahead_of_utc: int
    fd: int
