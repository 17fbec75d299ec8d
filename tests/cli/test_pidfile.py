"""A pid file after crashes, in containers, and where it is none."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vring_serial.cli.pidfile import pid_file
from vring_serial.errors import ResourceError

OURS = f"{os.getpid()}\n"


@contextlib.contextmanager
def held_by_another(path: Path) -> Iterator[int]:
    """Another process has the file, as `vring serve` and QEMU have theirs."""
    script = (
        "import sys\n"
        "from vring_serial.cli.pidfile import pid_file\n"
        "with pid_file(sys.argv[1]):\n"
        "    print('taken', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"taken\n"
            yield process.pid
        finally:
            process.kill()


@pytest.mark.parametrize(
    "left",
    [
        pytest.param(OURS, id="our-own-number"),  # always 1 or 7 in a container
        pytest.param(f"{os.getppid()}\n", id="reused-by-a-living-process"),
        pytest.param("1\n", id="reused-by-another-user"),
        pytest.param("4194304\n", id="of-nobody"),
        pytest.param("", id="killed-before-it-wrote"),
        pytest.param("4194304", id="without-a-newline"),
    ],
)
def test_what_a_killed_process_left_is_taken(tmp_path: Path, left: str) -> None:
    path = tmp_path / "pid"
    path.write_text(left)
    with pid_file(str(path)):
        assert path.read_text() == OURS
    assert not path.exists()


def test_one_that_is_held_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with held_by_another(path) as pid:
        with (
            pytest.raises(ResourceError, match=f"pid: exists, process {pid} is running"),
            pid_file(str(path)),
        ):
            pass
        assert path.read_text() == f"{pid}\n"
    with pid_file(str(path)):  # it was killed
        assert path.read_text() == OURS


def test_others_see_our_lock(tmp_path: Path) -> None:
    """With the lock that QEMU takes."""
    path = tmp_path / "pid"
    script = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | 4)"  # NB
    with pid_file(str(path)):
        result = subprocess.run([sys.executable, "-c", script, str(path)], stderr=subprocess.PIPE)
        assert b"BlockingIOError" in result.stderr


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_what_is_no_file_is_an_error_and_no_hang(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pid"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    with (
        pytest.raises(ResourceError, match=r"pid: (exists and is no regular file|Is a directory)"),
        pid_file(str(path)),
    ):
        pass
    assert path.exists()


def test_one_that_was_replaced_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with pid_file(str(path)):
        path.unlink()
        path.write_text("somebody's")
    assert path.read_text() == "somebody's"
    path.unlink()
    with pid_file(str(path)):
        path.unlink()
    assert os.listdir(tmp_path) == []
