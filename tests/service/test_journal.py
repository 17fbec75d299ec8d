"""The journal: a successor reads what was written last, whole, wherever the writer died."""

from __future__ import annotations

import os
import random
import signal
import struct
import time

import pytest

from vring_serial.errors import ResourceError, StateError
from vring_serial.service.journal import ENTRIES, JOURNAL_SIZE, Journal, checksum


@pytest.fixture
def fd():
    fd = Journal.create()
    yield fd
    os.close(fd)


def test_a_successor_finds_what_was_written(fd):
    with Journal(fd) as journal:
        journal.write("a", b"first")
        journal.write("a", b"second")
        journal.write("b", b"x" * 100_000)
        journal.write("empty", b"")
        journal.area("slots", 8192)[5000:5003] = b"abc"
    with Journal(fd) as journal:
        assert journal.read("a") == b"second"
        assert journal.read("b") == b"x" * 100_000
        assert journal.read("empty") == b""
        assert journal.read("c") is None
        assert journal.sections == ["a", "b", "empty"]
        assert bytes(journal.area("slots", 8192)[5000:5004]) == b"abc\0"


def test_what_is_there_already_changes_nothing(fd):
    with Journal(fd) as journal:
        journal.write("a", b"one")
        before = checksum(fd)
        journal.write("a", b"one")
        assert checksum(fd) == before
        journal.write("a", b"two")
        assert checksum(fd) != before
        journal.write("empty", b"")
        assert journal.read("empty") == b""


def test_a_section_grows_and_is_dropped(fd):
    with Journal(fd) as journal:
        for size in (10, 5000, 300_000, 7):
            journal.write("a", bytes([size % 251]) * size)
            assert journal.read("a") == bytes([size % 251]) * size
        journal.drop("a")
        journal.drop("a")
        assert journal.read("a") is None
    with Journal(fd) as journal:
        assert journal.sections == []


def test_sections_that_come_and_go_need_no_more_room(fd):
    """Also after successors, who do not know what was free."""
    for life in range(3):
        with Journal(fd) as journal:
            for i in range(2000):
                journal.write("s", b"x" * (1 << 18))
                journal.drop("s")
                journal.write(f"kept {life}", b"y" * (i % 9 * 1000))
            assert journal.read(f"kept {life}") == b"y" * (1999 % 9 * 1000)
    assert os.fstat(fd).st_blocks * 512 < 4 << 20


def test_new_memory_is_zero(fd):
    with Journal(fd) as journal:
        journal.area("a", 4096)[:] = b"\xff" * 4096
        journal.drop("a")
        assert bytes(journal.area("b", 4096)) == bytes(4096)
        journal.drop("b")
        assert journal.read("b") is None
        journal.write("c", b"")
        assert journal.read("c") == b""


def test_a_full_journal_is_an_error_and_stays_whole(fd):
    with Journal(fd) as journal:
        journal.write("a", b"kept")
        with pytest.raises(ResourceError, match="the journal is full: big needs"):
            journal.write("big", b"x" * (JOURNAL_SIZE // 4 + 1))
        for i in range(ENTRIES - 1):
            journal.write(f"s{i}", b"")
        with pytest.raises(ResourceError, match="room for 2048 names"):
            journal.write("one more", b"")
        assert journal.read("a") == b"kept"


def test_one_process_writes_at_a_time(fd):
    with Journal(fd) as journal:
        journal.lock()
        pid = os.fork()
        if not pid:
            try:
                Journal(fd).lock()
            except StateError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_writer_that_is_killed_leaves_one_of_its_states_whole(fd):
    """Every state is its number, over and over; the sizes make the section move as well."""
    chance = random.Random(5)
    numbers = []
    for _ in range(40):
        pid = os.fork()
        if not pid:
            journal = Journal(fd)
            last = journal.read("s")
            number = struct.unpack_from("<Q", last)[0] if last else 0
            while True:
                number += 1
                journal.write("s", struct.pack("<Q", number) * (1 + number % 3000))
        time.sleep(chance.random() * 0.02)  # any moment of a write
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with Journal(fd) as journal:
            state = journal.read("s")
        if state:
            (number,) = struct.unpack_from("<Q", state)
            assert state == struct.pack("<Q", number) * (1 + number % 3000)
            numbers.append(number)
    assert numbers == sorted(numbers)
    assert numbers[-1] > 100


def poke(fd, offset, data):
    os.pwrite(fd, data, offset)


@pytest.mark.parametrize(
    ("offset", "data", "why"),
    [
        (0, b"X", "does not begin as one"),
        (8, b"\2", "has layout 2; 1 is known"),
        (64 + 8, b"\7", r"entry 0 \('a'\) is damaged"),
        (64 + 9, b"\0", r"entry 0 \(''\) is damaged"),
        (64 + 10, b"\xff", "entry 0 has no name"),
        (64, b"\x3f", "a is damaged"),
        (64, struct.pack("<Q", 64 << 8 | 12), "a is damaged"),
        (64, struct.pack("<Q", (JOURNAL_SIZE - 4096) << 8 | 13), "a is damaged"),
        (64, struct.pack("<Q", 139264 << 8 | 12), "is damaged"),
        (64 + 64 + 10, b"a", r"entry 1 \('a'\) is damaged"),
    ],
)
def test_a_forged_directory_is_refused(fd, offset, data, why):
    with Journal(fd) as journal:
        journal.write("a", b"1")
        journal.write("b", b"2")
    poke(fd, offset, data)
    with pytest.raises(StateError, match=why):
        Journal(fd)


def test_a_torn_half_gives_the_one_before_and_two_are_an_error(fd):
    with Journal(fd) as journal:
        journal.write("a", b"one")
        journal.write("a", b"two")
    content = os.pread(fd, 1 << 20, 0)
    poke(fd, content.index(b"two"), b"T")
    with Journal(fd) as journal:
        assert journal.read("a") == b"one"
    poke(fd, content.index(b"one"), b"O")
    with Journal(fd) as journal, pytest.raises(StateError, match="journal: a is damaged"):
        journal.read("a")


def test_what_is_no_journal_is_refused(tmp_path):
    with open(tmp_path / "file", "wb") as file, pytest.raises(StateError, match="has 0 bytes"):
        Journal(file.fileno())
