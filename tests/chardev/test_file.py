"""Files: what is kept, what is refused, the end of the input and a disk that is full."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from tests.support.chardev_kinds import Guest
from tests.support.waiting import LoopClock
from vring_serial.chardev.file import FileChardev, FileOptions
from vring_serial.errors import ConfigError, ResourceError

pytestmark = pytest.mark.usefixtures("no_leak")


async def write_failure(guest: Guest, data: bytes) -> OSError:
    """What the data plane meets when it writes."""
    with pytest.raises(OSError) as caught:
        await guest.write(data)
    return caught.value


@pytest.mark.parametrize(("append", "left"), [(False, b"new"), (True, b"oldnew")])
async def test_append_or_empty_first(tmp_path: Path, append: bool, left: bytes) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    chardev = FileChardev("dut", FileOptions(path=str(path), append=append))
    guest = Guest(chardev)
    await chardev.start()
    assert guest.read_fd == -1
    await guest.write(b"new")
    await chardev.aclose()
    assert path.read_bytes() == left


async def test_a_file_that_is_not_empty_is_not_emptied_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "out"
    for content, append, told in ((b"old", False, 1), (b"", False, 0), (b"old", True, 0)):
        caplog.clear()
        path.write_bytes(content)
        chardev = FileChardev("dut", FileOptions(path=str(path), append=append))
        Guest(chardev)
        await chardev.start()
        await chardev.aclose()
        assert len(caplog.records) == told
        assert path.read_bytes() == (content if append else b"")
    path.write_bytes(b"old")
    chardev = FileChardev("dut", FileOptions(path=str(path)))
    await chardev.start()
    await chardev.aclose()
    assert f"chardev dut: {path} is emptied of 3 bytes; append=on keeps them" in caplog.text


async def test_no_hole_after_a_truncation(tmp_path: Path) -> None:
    path = tmp_path / "out"
    chardev = FileChardev("dut", FileOptions(path=str(path)))
    guest = Guest(chardev)
    await chardev.start()
    await guest.write(b"before")
    os.truncate(path, 0)
    await guest.write(b"after")
    assert path.read_bytes() == b"after"
    await chardev.aclose()


async def test_after_a_rename_it_goes_on_in_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    (tmp_path / "in").write_bytes(b"input")
    options = FileOptions(path=str(path), input_path=str(tmp_path / "in"))
    chardev = FileChardev("dut", options)
    guest = Guest(chardev)
    await chardev.start()
    await guest.write(b"before")
    path.rename(tmp_path / "old")
    chardev.reopen()
    await guest.write(b"after")
    assert (tmp_path / "old").read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert await guest.read(5) == b"input"
    assert guest.events == ["opened", "replaced"]
    chardev.reopen()  # without a rename: the same file
    await guest.write(b" all")
    assert path.read_bytes() == b"after all"
    await chardev.aclose()
    chardev.reopen()  # does nothing
    assert chardev.end is None


async def test_a_new_file_that_cannot_be_opened_leaves_the_old(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    path = tmp_path / "d" / "out"
    chardev = FileChardev("dut", FileOptions(path=str(path)))
    guest = Guest(chardev)
    await chardev.start()
    (tmp_path / "d").rename(tmp_path / "e")
    with pytest.raises(ResourceError, match="No such file or directory"):
        chardev.reopen()
    await guest.write(b"goes on")
    assert (tmp_path / "e" / "out").read_bytes() == b"goes on"
    await chardev.aclose()


async def test_the_file_stays_after_stop(tmp_path: Path) -> None:
    chardev = FileChardev("dut", FileOptions(path=str(tmp_path / "out")))
    await chardev.start()
    await chardev.aclose()
    assert (tmp_path / "out").exists()


async def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, why in (
        (tmp_path / "missing" / "out", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "fifo", "No such device or address"),  # nobody reads it
    ):
        chardev = FileChardev("dut", FileOptions(path=str(path)))
        with pytest.raises(ResourceError, match=f"dut.*write to {path}: {why}"):
            await chardev.start()
        assert chardev.end is None


@pytest.mark.parametrize(
    ("name", "why"), [("missing", "No such file or directory"), ("", "it is a directory")]
)
async def test_without_its_input_the_output_is_not_emptied(
    tmp_path: Path, name: str, why: str
) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"precious")
    options = FileOptions(path=str(out), input_path=str(tmp_path / name))
    with pytest.raises(ResourceError, match=f"dut.*read from {tmp_path / name}: {why}"):
        await FileChardev("dut", options).start()
    assert out.read_bytes() == b"precious"


async def test_after_the_end_of_the_input_the_output_goes_on(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"script")
    options = FileOptions(path=str(tmp_path / "out"), input_path=str(tmp_path / "in"))
    chardev = FileChardev("dut", options)
    guest = Guest(chardev)
    await chardev.start()
    assert await guest.read(6) == b"script"
    assert os.read(guest.read_fd, 1) == b""
    chardev.peer_gone()
    assert guest.events == ["opened", "closed"]
    await guest.opened()
    assert guest.read_fd == -1
    await guest.write(b"done")
    await chardev.aclose()
    assert (tmp_path / "out").read_bytes() == b"done"


async def test_a_named_pipe_as_input_has_no_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in")
    options = FileOptions(path=str(tmp_path / "out"), input_path=str(tmp_path / "in"))
    chardev = FileChardev("dut", options)
    guest = Guest(chardev)
    await chardev.start()
    for text in (b"one", b"two"):
        (tmp_path / "in").write_bytes(text)
        assert await guest.read(3) == text
        with pytest.raises(BlockingIOError):
            os.read(guest.read_fd, 1)
    await chardev.aclose()


async def test_a_full_disk_is_told_once_and_tried_again(
    caplog: pytest.LogCaptureFixture, clock: LoopClock
) -> None:
    chardev = FileChardev("dut", FileOptions(path="/dev/full"))
    guest = Guest(chardev)
    await chardev.start()
    seconds = FileChardev.retry_seconds
    for turn in range(1, 4):
        reason = await write_failure(guest, b"data")
        chardev.peer_gone(reason)
        assert guest.events.count("closed") == turn
        await clock.forward(seconds)
        assert guest.events.count("opened") == turn + 1
        seconds *= 2
    assert len(caplog.records) == 1
    assert "dut" in caplog.text
    assert "/dev/full: No space left on device; the guest waits" in caplog.text
    await clock.forward(3 * seconds)  # it worked for a while; the next time is news
    chardev.peer_gone(await write_failure(guest, b"data"))
    assert len(caplog.records) == 2
    await chardev.aclose()


async def test_the_output_goes_on_where_it_failed(tmp_path: Path, clock: LoopClock) -> None:
    """A limit on the size of files, lifted later, is a disk that is full and then is not."""
    chardev = FileChardev("dut", FileOptions(path=str(tmp_path / "out")))
    guest = Guest(chardev)
    await chardev.start()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limits[1]))
    try:
        await guest.write(b"1234")
        reason = await write_failure(guest, b"5678")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    chardev.peer_gone(reason)
    await clock.forward(FileChardev.retry_seconds)
    await guest.opened()
    await guest.write(b"5678")
    await chardev.aclose()
    assert (tmp_path / "out").read_bytes() == b"12345678"


async def test_stop_while_it_waits_to_try_again(clock: LoopClock) -> None:
    chardev = FileChardev("dut", FileOptions(path="/dev/full"))
    guest = Guest(chardev)
    await chardev.start()
    chardev.peer_gone(await write_failure(guest, b"data"))
    await chardev.aclose()
    await clock.forward(FileChardev.retry_seconds)
    assert guest.events == ["opened", "closed"]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "path"),
        ({"path": "a\0"}, "path"),
        ({"path": "out", "input_path": "a\0"}, "input-path"),
    ],
)
def test_options_that_cannot_be(options: dict[str, str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FileOptions(**options)
    assert caught.value.where == key
