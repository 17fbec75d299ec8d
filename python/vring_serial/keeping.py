"""What a part of the device needs so that another process can go on where this one ends.

A process that may die has its descriptors kept, and its state written down, by another one. Parts
that can go on take a :class:`Keeping`; None stands for a process that has no successor.
"""

from __future__ import annotations

from typing import Protocol


class Keeping(Protocol):
    """Descriptors and state that outlive the process.

    The order matters: a descriptor is kept before the state that speaks of it is written, the state
    before anybody is told of what changed, and before anything is done that cannot be taken back: a
    ring runs only once that is written. A descriptor is dropped last. Whoever goes on after any of
    these steps finds at least what was promised.
    """

    def keep(self, role: str, fd: int) -> None:
        """Keep a duplicate of ``fd``, instead of what had this role."""

    def drop(self, role: str) -> None:
        """Keep nothing in this role any more."""

    def take(self, role: str) -> int | None:
        """Return the descriptor that a predecessor left in this role; from then on the caller's.

        It is still kept. None if there is none, or it was taken.
        """

    def roles(self) -> list[str]:
        """Return the roles of descriptors that a predecessor left and nobody took, sorted."""

    def write(self, section: str, state: bytes) -> None:
        """Write a part's state, instead of the one before. Raises ResourceError without memory."""

    def read(self, section: str) -> bytes | None:
        """Return the state that was written last. Raises StateError if it is damaged."""

    def area(self, name: str, size: int) -> memoryview:
        """Return ``size`` bytes of memory that outlives the process, zeroed when they are made.

        Raises ResourceError without memory, StateError if a predecessor's has another size.
        """

    def clear(self) -> None:
        """Keep nothing any more: drop all roles and sections."""

    def scoped(self, name: str) -> Keeping:
        """Return a view in which every role and section begins with ``name`` and a slash."""
