"""Files that memory is mapped from, and those that it is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vring import GuestMemory, MemoryMapError, Region

SIZE = 1 << 16


@contextmanager
def opened(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def on_disk(_: Path) -> int:
    with tempfile.TemporaryFile(dir=Path(__file__).parent) as file:
        return os.dup(file.fileno())


def on_tmpfs(_: Path) -> int:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        return os.dup(file.fileno())


@pytest.mark.parametrize("make", [lambda _: os.memfd_create("memory"), on_tmpfs, on_disk])
def test_memory_and_local_disks_are_mapped(tmp_path: Path, make: Callable[[Path], int]) -> None:
    with opened(make(tmp_path)) as fd:
        os.ftruncate(fd, SIZE)
        memory = GuestMemory([Region.map(fd, SIZE, guest_addr=0)])
        memory.write(100, b"there")
        assert os.pread(fd, 5, 100) == b"there"


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("name", ["fuse", "overlay"])
def test_a_file_that_can_make_us_wait_is_refused(
    hostile_files: Any, name: str, private: bool
) -> None:
    """Neither it nor its file system is asked anything: not even fstat would return."""
    fd = getattr(hostile_files, name)
    with pytest.raises(MemoryMapError, match=r"region at 0x1000: its file is on a file system"):
        Region.map(fd, SIZE, guest_addr=0x1000, private=private)


MAP = """
import sys, vring
try:
    vring.Region.map(int(sys.argv[1]), 4096, guest_addr=0)
except vring.MemoryMapError as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize("name", ["fuse", "overlay"])
def test_a_file_system_that_is_mounted_here_is_named(hostile_files: Any, name: str) -> None:
    if shutil.which("nsenter") is None or os.getuid():
        pytest.skip("only root enters another mount namespace, with nsenter")
    # Its end closes the descriptors, which takes as long as the file system lives.
    fds = (hostile_files.fuse, hostile_files.overlay)
    enter = ["nsenter", "-t", str(hostile_files.pid), "-m", sys.executable, "-c", MAP]
    enter.append(str(getattr(hostile_files, name)))
    with subprocess.Popen(enter, pass_fds=fds, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        line = program.stdout.readline()
        hostile_files.end()
    assert f"its file is on {name}, where an access can wait for ever" in line


def test_other_file_systems_are_named() -> None:
    with (
        opened(os.open("/proc/self/maps", os.O_RDONLY)) as fd,
        pytest.raises(MemoryMapError, match="its file is on proc, where"),
    ):
        Region.map(fd, 4096, guest_addr=0, private=True)


def test_what_is_no_file_has_no_bytes() -> None:
    with (
        opened(os.eventfd(0)) as fd,
        pytest.raises(MemoryMapError, match="its file has 0x0 bytes"),
    ):
        Region.map(fd, 4096, guest_addr=0)
