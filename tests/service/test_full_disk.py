"""A disk that is full for a while, under logs of ports and under a `file` host end."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.keeper import kept
from tests.support.small_disk import SmallDisk, small_disk
from tests.support.waiting import DEADLINE, until, until_logged
from vring_serial import EmbeddedGuest
from vring_serial.chardev.log import LogOptions, OutputLog

KIB = 1024


def lines(first: int, count: int) -> bytes:
    """So many numbered lines of 8 bytes."""
    return b"".join(b"%07d\n" % n for n in range(first, first + count))


def is_left_of(left: bytes, whole: bytes) -> bool:
    """Return whether only pieces were left out of a whole of which no 16 bytes come twice."""
    done = at = 0
    while done < len(left):
        at = whole.find(left[done : done + 16], at)
        if at < 0:
            return False
        pairs = zip(left[done:], whole[at:], strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(left) - done)
        done, at = done + same, at + same
    return True


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    monkeypatch.chdir(tmp_path)
    with small_disk(tmp_path / "disk", "size=8m") as disk:
        yield disk


@asynccontextmanager
async def served(tmp_path, *arguments):
    """A service, and a guest."""
    async with (
        kept(tmp_path, *arguments) as keeper,
        EmbeddedGuest("v", memory=32 << 20) as guest,
    ):
        yield keeper, guest


async def guest_end(guest, nr=1):
    port = await guest.wait_port(nr=nr)
    await port.wait_host()
    return await port.open()


async def receive(reader, data):
    async with asyncio.timeout(DEADLINE):
        assert await reader.readexactly(len(data)) == data


LOGGED = (
    *("--chardev", "socket,id=c,path=c,server=on,wait=off,logfile=disk/log,logappend=on"),
    *("--port", "chardev=c,nr=1"),
)
FILE = ("--chardev", "file,id=f,path=disk/out", "--port", "chardev=f,nr=2")
FULL = "disk/log: No space left on device; what the guest writes waits, up to 1024 KiB"


@pytest.mark.parametrize("dies", [False, True], ids=["", "a worker dies meanwhile"])
async def test_a_log_waits_for_room_and_holds_up_nobody(tmp_path, disk, dies):
    async with served(tmp_path, *LOGGED) as (keeper, guest):
        reader, writer = await asyncio.open_unix_connection("c")
        guest_reader, port = await guest_end(guest)
        disk.fill(room=100 * KIB)
        sent = lines(0, 64 * KIB)  # 512 KiB: more than there is room for, less than may wait
        port.write(sent)
        await receive(reader, sent)
        await keeper.logged(FULL)
        if dies:
            # What moves bytes goes on to these only when it is done with those.
            writer.write(b"?")
            await receive(guest_reader, b"?")
            await keeper.kill_until_served()
            await keeper.logged(FULL, 2)  # the next one says it too, once
        more = lines(64 * KIB, KIB)
        port.write(more)
        await receive(reader, more)
        assert 0 < Path("disk/log").stat().st_size < len(sent)
        disk.free()
        keeper.process.send_signal(signal.SIGHUP)  # at once, and not within half a minute
        sent += more
        await until(lambda: Path("disk/log").stat().st_size >= len(sent))
        assert Path("disk/log").read_bytes() == sent
        assert keeper.log.count(FULL) == 1 + dies
        assert "left out" not in keeper.log
        writer.close()
        port.close()


async def test_what_a_log_has_no_room_for_is_counted(tmp_path, disk):
    async with served(tmp_path, *LOGGED) as (keeper, guest):
        reader, writer = await asyncio.open_unix_connection("c")
        _, port = await guest_end(guest)
        disk.fill()
        sent = lines(0, 400 * KIB)  # 3.1 MiB
        port.write(sent)
        await receive(reader, sent)
        await keeper.logged(FULL)
        await keeper.logged("disk/log is too slow: bytes of the guest's are left out of it")
        disk.free()
        keeper.process.send_signal(signal.SIGHUP)
        await until(lambda: Path("disk/log").stat().st_size >= KIB * KIB)
        after = lines(400 * KIB, 100)
        port.write(after)
        await receive(reader, after)
        await until(lambda: Path("disk/log").read_bytes().endswith(after))
        writer.close()
        port.close()
        assert await keeper.stop() == 0
        count = re.search(r"(\d+) bytes in all were left out of disk/log", keeper.log)
        assert count is not None
        logged = Path("disk/log").read_bytes().removesuffix(after)
        assert len(logged) + int(count[1]) == len(sent)
        assert is_left_of(logged, sent)
        assert keeper.log.count(FULL) == 1


async def test_a_file_takes_every_byte_once_there_is_room(tmp_path, disk):
    async with served(tmp_path, *LOGGED, *FILE) as (keeper, guest):
        other, writer = await asyncio.open_unix_connection("c")
        (_, port), (_, logged_port) = await guest_end(guest, 2), await guest_end(guest)
        disk.fill(room=100 * KIB)
        sent = lines(0, 256 * KIB)  # 2 MiB
        port.write(sent)
        told = "disk/out: No space left on device; the guest waits"
        await keeper.logged(told)
        # Nobody else waits for it.
        logged_port.write(b"meanwhile\n")
        await receive(other, b"meanwhile\n")
        await keeper.kill_until_served()
        logged_port.write(b"and then\n")
        await receive(other, b"and then\n")
        disk.free()
        await until(lambda: Path("disk/out").stat().st_size >= len(sent), lambda: keeper.log)
        assert Path("disk/out").read_bytes() == sent
        assert keeper.log.count(told) <= 2  # once for each worker
        for end in (writer, port, logged_port):
            end.close()


async def test_a_rotation_that_cannot_make_a_file_costs_no_file_of_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file system without room for one file more: what was renamed is not renamed again."""
    with small_disk(tmp_path / "disk", "size=1m,nr_inodes=5") as disk:  # the root is one
        path = disk.path / "log"
        for number in range(3):
            (disk.path / f"log.{number}").write_bytes(b"before %d" % number)
        log = OutputLog("dut", LogOptions(logfile=str(path), logsize=1000, logbackups=4))
        await log.start()
        sent = lines(0, 300)
        log.write(sent)
        await until_logged(caplog, "No space left on device; what the guest writes waits")
        for count in range(1, 4):  # it tries again at once, and fails
            log.reopen()
            await until_logged(caplog, "cannot open", count)
        assert path.exists() is False
        assert (disk.path / "log.0").read_bytes() == sent[:1000]
        for number in range(3):
            assert (disk.path / f"log.{number + 1}").read_bytes() == b"before %d" % number
        for number in (2, 3):  # room for two files
            (disk.path / f"log.{number}").unlink()
        log.reopen()
        await until(lambda: path.exists() and path.stat().st_size == len(sent) - 2000)
        await log.aclose()
        names = [f"log.{number}" for number in (1, 0)]
        found = b"".join((disk.path / name).read_bytes() for name in names) + path.read_bytes()
        assert found == sent
        assert log.left_out == 0
