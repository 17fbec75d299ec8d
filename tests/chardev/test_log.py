"""The log of a port: files, rotation, disks that fail, and disks that do not answer."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.leaks import held
from tests.support.waiting import until, until_file_says, until_logged
from vring_serial.chardev.log import QUEUE_BYTES, LogOptions, OutputLog
from vring_serial.chardev.log_file import LogFile
from vring_serial.errors import ConfigError, ResourceError

LINES = [b"%099d\n" % number for number in range(50)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.log"


def log_to(path: Path, **options: object) -> OutputLog:
    return OutputLog("c", LogOptions(logfile=str(path), **options))


async def write_all(log: OutputLog) -> None:
    for line in LINES:
        log.write(line)


@pytest.mark.parametrize(("append", "before"), [(False, b""), (True, b"before\n")])
async def test_a_file_is_emptied_or_appended_to(path: Path, append: bool, before: bytes) -> None:
    path.write_bytes(b"before\n")
    held_before = held()
    log = log_to(path, logappend=append)
    await log.start()
    await write_all(log)
    await until_file_says(path, LINES[-1])
    await log.aclose()
    await log.aclose()
    assert path.read_bytes() == before + b"".join(LINES)
    assert held() == held_before


async def test_rotation_keeps_so_many_files_of_that_size(path: Path) -> None:
    log = log_to(path, logsize=1000, logbackups=2)
    await log.start()
    await write_all(log)
    await log.aclose()
    assert sorted(os.listdir(path.parent)) == ["out.log", "out.log.0", "out.log.1"]
    kept = [path.with_name(f"out.log{end}").read_bytes() for end in (".1", ".0", "")]
    assert [len(content) for content in kept] == [1000, 1000, 1000]
    assert b"".join(kept) == b"".join(LINES[20:])


async def test_rotation_without_backups_begins_anew(path: Path) -> None:
    log = log_to(path, logsize=2000, logbackups=0)
    await log.start()
    await write_all(log)
    await log.aclose()
    assert os.listdir(path.parent) == ["out.log"]
    assert path.read_bytes() == b"".join(LINES[40:])


async def test_a_file_that_is_renamed_is_opened_anew(path: Path) -> None:
    log = log_to(path)
    await log.start()
    log.write(b"one\n")
    await until_file_says(path, "one")
    path.rename(path.with_suffix(".old"))
    log.reopen()
    await until(path.exists)
    log.write(b"two\n")
    await log.aclose()
    assert path.read_bytes() == b"two\n"
    assert path.with_suffix(".old").read_bytes() == b"one\n"


async def test_the_file_before_is_used_if_none_can_be_opened(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = log_to(path)
    await log.start()
    path.rename(path.with_suffix(".old"))
    path.mkdir()
    log.reopen()
    await until_logged(caplog, "cannot open")
    log.write(b"goes on\n")
    await log.aclose()
    assert path.with_suffix(".old").read_bytes() == b"goes on\n"


async def test_a_file_that_is_cut_off_goes_on_at_its_end(path: Path) -> None:
    log = log_to(path)
    await log.start()
    log.write(b"one\n")
    await until_file_says(path, "one")
    os.truncate(path, 0)
    log.write(b"two\n")
    await log.aclose()
    assert path.read_bytes() == b"two\n"


@contextmanager
def full_at_1000() -> Iterator[None]:
    """No file grows beyond 1000 bytes in the block: writing more fails as on a full disk.

    That includes where pytest's own output goes, and so it is for a block without any.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_what_a_full_disk_does_not_take_waits(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = log_to(path)
    with full_at_1000():
        await log.start()
        await write_all(log)
        await until_logged(caplog, "File too large")
        assert len(path.read_bytes()) == 1000
    log.reopen()  # tries again at once
    await until_file_says(path, LINES[-1])
    await log.aclose()
    assert path.read_bytes() == b"".join(LINES)
    assert log.left_out == 0
    assert "missing" not in caplog.text


async def test_what_a_full_disk_does_not_take_at_the_end_is_told(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = held()
    log = log_to(path)
    with full_at_1000():
        await log.start()
        await write_all(log)
        await log.aclose()
    assert f"the end of {path} is missing" in caplog.text
    assert held() == before


class StuckFile(LogFile):
    """A file on a disk that answers only when it is told to."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.called = threading.Event()
        self.answers = threading.Event()

    def take(self, pipe: int) -> int:
        self.called.set()
        self.answers.wait()
        return super().take(pipe)


async def test_nobody_waits_for_a_disk_that_does_not_answer(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = StuckFile(str(path))
    log = OutputLog("c", LogOptions(logfile=str(path)), file)
    await log.start()
    data = os.urandom(QUEUE_BYTES)
    log.write(data)
    await until(file.called.is_set)
    log.write(data)
    assert 0 < log.left_out <= len(data)
    assert caplog.text.count("left out") == 1
    file.answers.set()
    await log.aclose()
    assert path.read_bytes() == (data + data)[: 2 * len(data) - log.left_out]
    assert f"{log.left_out} bytes in all were left out" in caplog.text


async def test_the_end_does_not_wait_for_it_either(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = held()
    file = StuckFile(str(path))
    log = OutputLog("c", LogOptions(logfile=str(path)), file)
    await log.start()
    log.write(b"late")
    await until(file.called.is_set)
    await log.aclose()
    assert "is missing" in caplog.text
    file.answers.set()
    await until(lambda: held() == before)
    assert path.read_bytes() == b"late"


async def test_what_cannot_be_opened_leaves_nothing_behind(path: Path) -> None:
    before = held()
    for wrong, why in ((path / "x", "No such file"), (path.parent, "directory")):
        with pytest.raises(ResourceError, match=f"chardev c: cannot log to .*{why}"):
            await log_to(wrong).start()
    os.mkfifo(path)
    with pytest.raises(ResourceError):
        await log_to(path).start()
    assert held() == before


def test_options_that_contradict_each_other() -> None:
    for options in ({"logappend": True}, {"logsize": 5}, {"logfile": "x", "logbackups": -1}):
        with pytest.raises(ConfigError):
            LogOptions(**options)
