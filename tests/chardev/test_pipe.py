"""Named pipes: a pair or one, and what is not a named pipe."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.chardev_kinds import Guest
from vring_serial.chardev.pipe import PipeChardev, PipeOptions
from vring_serial.errors import ConfigError, ResourceError

pytestmark = pytest.mark.usefixtures("no_leak")


def pipe(path: Path) -> PipeChardev:
    return PipeChardev("dut", PipeOptions(path=str(path)))


async def test_output_waits_for_a_reader_that_comes_later(tmp_path: Path) -> None:
    for name in ("p.in", "p.out"):
        os.mkfifo(tmp_path / name)
    chardev = pipe(tmp_path / "p")
    guest = Guest(chardev)
    await chardev.start()
    await guest.write(b"early")
    for expected in (b"ear", b"ly"):  # readers come and go
        reader = os.open(tmp_path / "p.out", os.O_RDONLY | os.O_NONBLOCK)
        assert os.read(reader, 3) == expected
        os.close(reader)
    await chardev.aclose()
    assert guest.events == ["opened", "closed"]
    assert sorted(os.listdir(tmp_path)) == ["p.in", "p.out"]


async def test_one_pipe_for_both_directions(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    os.mkfifo(tmp_path / "p.in")  # half a pair is none
    chardev = pipe(tmp_path / "p")
    guest = Guest(chardev)
    await chardev.start()
    assert guest.read_fd != guest.write_fd
    writer = os.open(tmp_path / "p", os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, b"in")
    os.close(writer)
    assert await guest.read(2) == b"in"
    await guest.write(b"out")
    reader = os.open(tmp_path / "p", os.O_RDONLY | os.O_NONBLOCK)
    assert os.read(reader, 3) == b"out"
    os.close(reader)
    await chardev.aclose()


async def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=f"dut.*{tmp_path / 'p'}.*mkfifo makes them"):
        await pipe(tmp_path / "p").start()


@pytest.mark.parametrize("names", [["p"], ["p.in", "p.out"], ["p.out", "p.in"]])
async def test_what_is_no_pipe(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / names[0]).write_text("precious")
    for name in names[1:]:
        os.mkfifo(tmp_path / name)
    with pytest.raises(ResourceError, match=f"dut.*{tmp_path / names[0]}.*not a named pipe"):
        await pipe(tmp_path / "p").start()
    assert (tmp_path / names[0]).read_text() == "precious"


async def test_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "p").symlink_to("nowhere")
    with pytest.raises(ResourceError, match=f"dut.*{tmp_path / 'p'}: No such file"):
        await pipe(tmp_path / "p").start()


def test_a_path_is_needed() -> None:
    with pytest.raises(ConfigError) as caught:
        PipeOptions()
    assert caught.value.where == "path"
