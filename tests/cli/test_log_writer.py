"""A log whose reader stops, leaves, or has no room: nobody waits, and what is lost is counted."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vring_serial.cli import log_writer
from vring_serial.cli.log_writer import LineWriter, write_to

TIMEOUT = 20.0


def marker(count: int) -> bytes:
    return b"lost %d\n" % count


@pytest.fixture
def writer_to() -> Iterator[Callable[[Callable[[bytes], int]], LineWriter]]:
    made: list[LineWriter] = []

    def make(write: Callable[[bytes], int]) -> LineWriter:
        made.append(LineWriter(write, marker))
        return made[-1]

    yield make
    for writer in made:
        writer.close()


def read_until(fd: int, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        more = os.read(fd, 65536)
        assert more
        data += more
    return data


def numbered(data: bytes) -> tuple[list[int], int]:
    """The lines' numbers, and how many are missing according to the log itself."""
    lines = data.decode().splitlines()
    lost = sum(int(line[5:]) for line in lines if line.startswith("lost"))
    return [int(line) for line in lines if not line.startswith("lost")], lost


@pytest.mark.parametrize("non_blocking", [False, True])
def test_a_reader_that_stops_costs_lines_and_no_time(
    writer_to: Callable[..., LineWriter], non_blocking: bool
) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, not non_blocking)
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    writer = writer_to(write_to(writing))
    total = 100_000
    for number in range(total):  # many times what pipe and queue hold
        writer.put(b"%d\n" % number)
    writer.flush(0.01)  # it does not wait for the reader either
    data = read_until(reading, b"\n")
    while b"lost" not in data or not data.endswith(b"\n"):
        data += os.read(reading, 65536)
    numbers, lost = numbered(data)
    assert numbers == list(range(len(numbers)))  # the first, whole and in order
    assert len(numbers) + lost == total
    writer.put(b"after\n")
    assert read_until(reading, b"\n") == b"after\n"
    os.close(reading)
    os.close(writing)


def test_an_error_in_the_middle_of_a_line(
    writer_to: Callable[..., LineWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full for a while: the half line ends, and what is lost is counted."""
    monkeypatch.setattr(log_writer, "RETRY_SECONDS", 0.01)
    written = bytearray()
    calls = itertools.count()
    done = threading.Event()

    def write(data: bytes) -> int:
        match next(calls):
            case 0:
                written.extend(data[:2])
                return 2
            case 1 | 2:
                raise OSError(28, "No space left on device")
        written.extend(data)
        done.set()
        return len(data)

    writer = writer_to(write)
    writer.put(b"first\n")
    assert done.wait(TIMEOUT)
    writer.put(b"second\n")
    writer.flush(TIMEOUT)
    assert re.fullmatch(rb"fi\nlost 1\nsecond\n", bytes(written))


def test_a_reader_that_left_delays_no_end(writer_to: Callable[..., LineWriter]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    writer = writer_to(write_to(writing))
    for number in range(1000):
        writer.put(b"%d\n" % number)
    writer.flush(TIMEOUT)  # which would be over only much later
    os.close(writing)


def test_a_closed_writer_ends_its_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with (tmp_path / "log").open("wb") as file:
        writer = LineWriter(write_to(file.fileno()), marker)
        (thread,) = set(threading.enumerate()) - before
        writer.put(b"the last\n")
        writer.close()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert (tmp_path / "log").read_bytes() == b"the last\n"
