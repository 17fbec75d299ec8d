"""Resource limits of this process, checked before a low one ends it with an obscure error."""

from __future__ import annotations

import errno
import os
import resource

from vring_serial.errors import ResourceError

#: Bytes of address space that a command needs before it maps any guest's memory.
NEEDED = 320 << 20
#: The same with a keeper: a journal is mapped too, of which little becomes memory.
NEEDED_WITH_KEEPER = NEEDED + (1 << 30)
_LIMITS = ((resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d"))


def prepare() -> None:
    """Keep OpenBLAS from reserving memory, and check that there is enough address space.

    NumPy loads OpenBLAS, which reserves memory for every processor and ends the process if it
    gets none. It is not used here. Its threads would also keep `vring serve` from forking.

    Raises:
        ResourceError: the limit of the address space is too low.
    """
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    for limit, text in _limits():
        if limit < NEEDED:
            raise ResourceError(f"{text}, and {NEEDED >> 20} MiB are needed")


def prepare_keeper() -> None:
    """Check that there is enough address space for a worker with a journal.

    Raises:
        ResourceError: the limit is too low.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < NEEDED_WITH_KEEPER:
        raise ResourceError(
            f"memory is limited to {limit >> 20} MiB (ulimit -v), and "
            f"{NEEDED_WITH_KEEPER >> 20} MiB are needed ({NEEDED >> 20} MiB with --no-keeper)"
        )


def exhausted(error: Exception) -> str | None:
    """Return a message for an error caused by lack of memory or threads; None for any other."""
    number = error.errno if isinstance(error, OSError) and error.filename is None else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        what = "out of memory"
    elif number == errno.EAGAIN or "can't start new thread" in str(error):
        what = "no more threads and processes can be started"
    else:
        return None
    return ": ".join([what, *(text for _, text in _limits())])


def _limits() -> list[tuple[int, str]]:
    """Return the limits that are set, each with a text for messages, the lowest first."""
    found = ((resource.getrlimit(which)[0], how) for which, how in _LIMITS)
    return sorted(
        (limit, f"memory is limited to {limit >> 20} MiB ({how})")
        for limit, how in found
        if limit != resource.RLIM_INFINITY
    )
