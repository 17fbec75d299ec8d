"""What this process holds: the one way in which tests look for leaks."""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Held:
    """Descriptors, shared mappings and threads of this process at one moment.

    Attributes:
        descriptors: what each open descriptor refers to, by number.
        mappings: the file and length in bytes of each mapping that is shared and writable, sorted.
        threads: names of all threads that have one, but the workers of an event loop, which live as
            long as it.
    """

    descriptors: dict[int, str]
    mappings: tuple[tuple[str, int], ...]
    threads: tuple[str, ...]

    def mapped(self, name: str) -> int:
        """Return how many mappings there are of files whose names have this in them."""
        return sum(name in file for file, _ in self.mappings)


def held() -> Held:
    """Collect garbage, then return what is held.

    Equal results before and after show that nothing has leaked. Without the collection, cycles
    of the tests before would be counted, and go at any time.
    """
    gc.collect()
    return Held(_descriptors(), _mappings(), _threads())


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the one that listed them
    return found


def _mappings() -> tuple[tuple[str, int], ...]:
    """Shared and writable ones, as guest memory is; not the kernel's own, which stay."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, _, _, _, *file = line.split(maxsplit=5)
        if permissions == "rw-s" and not (file and file[0].startswith("/[aio]")):
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append((file[0] if file else "", end - start))
    return tuple(sorted(found))


#: Of a task whose end has begun: whoever joined it may know before /proc does (PF_EXITING).
_EXITING = 0x4


def _is_exiting(task: Path) -> bool:
    """Return whether a thread has ended but for the kernel's clearing up."""
    after_name = (task / "stat").read_text().rpartition(")")[2].split()
    return bool(int(after_name[6]) & _EXITING)  # the ninth field (proc_pid_stat(5))


def _threads() -> tuple[str, ...]:
    """Return those of Python, and those of C that have a name of their own, as the pump's has.

    Others are numpy's, and pytest's watchdog (faulthandler), of which each test has another one: it
    may still be ending when the next test begins.
    """
    ours = {thread.native_id: thread.name for thread in threading.enumerate()}
    unnamed = Path("/proc/self/comm").read_text().strip()
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            if _is_exiting(task):
                continue
            name = ours.get(int(task.name)) or (task / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if name != unnamed and not name.startswith("asyncio_"):
            found.append(name)
    return tuple(sorted(found))
