"""The function's state on its way to or from another server, piece by piece."""

from __future__ import annotations

import os
from collections.abc import Callable

from vring_serial.errors import StateError
from vring_serial.transport.state_memory import MAX_STATE, check_memory, make_memory, write_at
from vring_serial.transport.vfio_user.state import ClientState
from vring_serial.unix_fds import close_all


class MovedState:
    """Keeps the pieces in memory that outlives the process.

    A piece changes its own bytes there, and a number in the client's state: what one costs does not
    grow with those before it. A piece that was written and not counted is written again.

    Args:
        state: the client's; ``memory``, ``length`` and ``moved`` are kept up to date here.
        keep: keeps a descriptor, under a number, for a successor of this process.
    """

    def __init__(self, state: ClientState, keep: Callable[[int, int], None]) -> None:
        self._state = state
        self._keep = keep
        self._fd = -1

    @property
    def all_read(self) -> bool:
        """Whether the client has all of it."""
        return self._state.moved == self._state.length

    def resume(self, take: Callable[[int], int | None]) -> None:
        """Go on with a predecessor's memory; ``take`` returns the descriptor with a number.

        Raises StateError: it is not there, or something else.
        """
        if self._state.memory is None:
            return
        if (fd := take(self._state.memory)) is None:
            raise StateError("the memory of the function's state is not there")
        self._fd = fd
        check_memory(fd, self._state.length)

    def begin(self, content: bytes | None = None) -> None:
        """Have this to read, or nothing yet and room for what comes. Raises OSError."""
        fd = make_memory(MAX_STATE) if content is None else make_memory(len(content), content)
        self.end()
        self._fd = fd
        self._state.memory = self._state.next_serial
        self._state.next_serial += 1
        self._state.length = len(content or b"")
        self._keep(self._state.memory, fd)

    def end(self) -> None:
        """Have nothing. Safe to call twice."""
        close_all([self._fd])
        self._fd = -1
        self._state.memory = None
        self._state.length = self._state.moved = 0

    def read(self, size: int) -> bytes:
        """Return the next piece; fewer bytes are the last."""
        state = self._state
        data = os.pread(self._fd, min(size, state.length - state.moved), state.moved)
        state.moved += len(data)
        return data

    def write(self, data: bytes) -> None:
        """Take one more piece. Raises OSError without memory."""
        write_at(self._fd, data, self._state.length)
        self._state.length += len(data)

    def whole(self) -> bytes:
        """Return all that was written."""
        return os.pread(self._fd, self._state.length, 0)
