"""Pipes that outlive the process."""

from __future__ import annotations

from typing import NamedTuple


class Relay(NamedTuple):
    """A pipe that outlives the process: what went through it is known to a successor.

    Attributes:
        read_fd: its end to read from.
        write_fd: its end to write to.
    """

    read_fd: int
    write_fd: int
