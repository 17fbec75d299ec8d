"""The log of ``vring serve``: readers that stop, rotation, terminals that hang up."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import signal
import socket
import sys
import termios
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.processes import running
from tests.support.served import NULL_PORT, TIMEOUT, Serve, guest_of, listening
from tests.support.waiting import until, until_file_says
from vring_serial.guest.guest import EmbeddedGuest

FILE_PORT = ("--chardev", "file,id=f,path=out", "--port", "chardev=f,nr=1")


@contextlib.asynccontextmanager
async def started(
    directory: Path,
    *arguments: str,
    stderr: int,
    stdin: int = asyncio.subprocess.DEVNULL,
    **options: object,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """``vring serve`` whose standard error is a descriptor of the test's."""
    async with running(
        *(sys.executable, "-m", "vring_serial", "serve", *arguments),
        *("--vhost-user", str(directory / "v")),
        cwd=directory,
        stdin=stdin,
        stderr=stderr,
        **options,
    ) as process:
        yield process


async def there(path: Path) -> None:
    await until(path.exists)


async def open_and_close(guest: EmbeddedGuest, count: int) -> None:
    port = await guest.wait_port(nr=1)
    await port.wait_host()
    for _ in range(count):
        _, writer = await port.open()
        writer.close()
        await writer.wait_closed()


def fill(fd: int) -> None:
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(fd, b"x" * 512):
            pass
    os.set_blocking(fd, True)


@pytest.mark.parametrize("kind", ["pipe", "terminal", "socket"])
async def test_a_reader_that_stops_stops_nothing(tmp_path: Path, kind: str) -> None:
    """Nobody ever reads; what was full at the start is full at the end."""
    if kind == "pipe":
        reading, writing = os.pipe()
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    elif kind == "terminal":
        reading, writing = pty.openpty()
    else:
        pair = socket.socketpair()
        reading, writing = (sock.detach() for sock in pair)
    fill(writing)
    async with started(tmp_path, *NULL_PORT, stderr=writing) as process:
        await listening(tmp_path / "v")
        for _ in range(3):
            async with asyncio.timeout(TIMEOUT), guest_of(tmp_path / "v") as guest:
                await open_and_close(guest, 5)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(TIMEOUT):
            assert await process.wait() == 0
    assert os.listdir(tmp_path) == []
    os.close(reading)
    os.close(writing)


async def test_a_reader_that_comes_back_gets_what_waited(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    async with started(tmp_path, *NULL_PORT, stderr=writing) as process:
        await listening(tmp_path / "v")
        fill(writing)
        os.close(writing)
        async with asyncio.timeout(TIMEOUT), guest_of(tmp_path / "v") as guest:
            await open_and_close(guest, 5)
        process.send_signal(signal.SIGTERM)
        with os.fdopen(reading, "rb") as file:
            text = (await asyncio.to_thread(file.read)).decode()
        async with asyncio.timeout(TIMEOUT):
            assert await process.wait() == 0
    assert re.search("x+.*stopped\n$", text, re.DOTALL)


async def test_an_error_at_the_end_does_not_wait_for_a_reader(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    fill(writing)
    (tmp_path / "v").write_text("somebody's")
    async with started(tmp_path, *NULL_PORT, stderr=writing) as process:
        async with asyncio.timeout(TIMEOUT):
            assert await process.wait() == 1
    os.close(reading)
    os.close(writing)


async def test_sighup_opens_files_anew(serve: Serve, tmp_path: Path) -> None:
    """As logrotate renames them; the guest, in the middle of a stream, notices nothing."""
    async with started(
        tmp_path, *FILE_PORT, "--log-file", "log", stderr=asyncio.subprocess.DEVNULL
    ) as process:
        await listening(tmp_path / "v")
        async with asyncio.timeout(TIMEOUT), guest_of(tmp_path / "v") as guest:
            port = await guest.wait_port(nr=1)
            await port.wait_host()
            _, writer = await port.open()
            written = 0
            for turn in range(3):
                for number in range(written, written + 2000):
                    writer.write(b"%d\n" % number)
                written += 2000
                for name in ("out", "log"):
                    os.rename(tmp_path / name, tmp_path / f"{name}.{turn}")
                process.send_signal(signal.SIGHUP)
                await there(tmp_path / "out")
                await there(tmp_path / "log")
                await until_file_says(tmp_path / "log", "SIGHUP: files were opened anew")
                await writer.drain()
            writer.write(b"end\n")
            await until_file_says(tmp_path / "out", "end\n")
            writer.close()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(TIMEOUT):
            assert await process.wait() == 0
    files = [tmp_path / name for name in ("out.0", "out.1", "out.2", "out")]
    assert b"".join(file.read_bytes() for file in files) == b"".join(
        b"%d\n" % number for number in range(written)
    ) + (b"end\n")
    logs = "".join((tmp_path / f"log{end}").read_text() for end in (".0", ".1", ".2", ""))
    assert "serving;" in logs
    assert logs.endswith("stopped\n")
    assert "closed by the host" not in logs.partition("stopping")[0]


async def test_a_ports_log_is_rotated_in_the_sandbox(serve: Serve, tmp_path: Path) -> None:
    """By its size, and by SIGHUP."""
    os.mkdir(tmp_path / "d")
    log = "logfile=d/out,logsize=64K,logbackups=4"
    lines = b"".join(b"%099d\n" % number for number in range(2000))
    arguments = ("--chardev", f"null,id=n,{log}", "--port", "chardev=n,nr=1")
    async with serve(*arguments) as server, asyncio.timeout(TIMEOUT):
        await server.logged("sandbox: ")
        async with guest_of(tmp_path / "v") as guest:
            port = await guest.wait_port(nr=1)
            await port.wait_host()
            _, writer = await port.open()
            writer.write(lines)
            await until_file_says(tmp_path / "d" / "out", lines[-100:])
            os.rename(tmp_path / "d" / "out", tmp_path / "d" / "renamed")
            os.kill(server.pid, signal.SIGHUP)
            await there(tmp_path / "d" / "out")
            writer.write(b"anew")
            await until_file_says(tmp_path / "d" / "out", "anew")
            writer.close()
        assert await server.stop() == 0
    files = [tmp_path / "d" / name for name in ("out.2", "out.1", "out.0", "renamed")]
    assert b"".join(file.read_bytes() for file in files) == lines
    assert {file.stat().st_size for file in files[:3]} == {64 << 10}
    assert (tmp_path / "d" / "out").read_bytes() == b"anew"


@pytest.mark.parametrize("keeper", ["--keeper", "--no-keeper"])
async def test_a_log_without_backups_is_emptied_in_the_sandbox(
    serve: Serve, tmp_path: Path, keeper: str
) -> None:
    """Also one that was opened anew, or by the next worker: in the sandbox, and not before it."""
    os.mkdir(tmp_path / "d")
    out = tmp_path / "d" / "out"
    arguments = ("--chardev", "null,id=n,logfile=d/out,logsize=4K,logbackups=0")
    arguments += ("--port", "chardev=n,nr=1", "--sandbox", "on", keeper)
    async with serve(*arguments) as server, asyncio.timeout(TIMEOUT):
        await server.logged("sandbox: ")
        async with guest_of(tmp_path / "v") as guest:
            port = await guest.wait_port(nr=1)
            await port.wait_host()
            _, writer = await port.open()
            for turn in range(3):
                if turn:
                    if turn == 1:
                        os.rename(out, tmp_path / "d" / "renamed")
                    os.kill(server.pid, signal.SIGHUP)
                    await server.logged("SIGHUP: files were opened anew", turn)
                    await there(out)
                for number in range(3 * 4096 // 64):
                    writer.write(b"%063d\n" % number)
                end = b"end %d\n" % turn
                writer.write(end)
                await until_file_says(out, end)
                assert out.stat().st_size <= 4096
            writer.close()
        assert await server.stop() == 0
        assert not [line for line in server.lines if "warning" in line or "error" in line]


async def test_a_file_that_cannot_be_opened_anew(serve: Serve, tmp_path: Path) -> None:
    os.mkdir(tmp_path / "d")
    arguments = ("--chardev", "file,id=f,path=d/out", "--port", "chardev=f,nr=1")
    async with serve(*arguments) as server, asyncio.timeout(TIMEOUT):
        os.rename(tmp_path / "d", tmp_path / "elsewhere")
        os.kill(server.pid, signal.SIGHUP)
        await server.logged("SIGHUP: chardev f: cannot write to d/out: No such file or directory")
        async with guest_of(tmp_path / "v") as guest:
            port = await guest.wait_port(nr=1)
            await port.wait_host()
            _, writer = await port.open()
            writer.write(b"goes on")
            await until_file_says(tmp_path / "elsewhere" / "out", "goes on")
            writer.close()
        assert await server.stop() == 0


async def test_truncation_leaves_no_hole(tmp_path: Path) -> None:
    """copytruncate, of the guest's output and of the log that a shell redirected without append."""
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    async with started(tmp_path, *FILE_PORT, stderr=log) as process:
        os.close(log)
        await listening(tmp_path / "v")
        async with asyncio.timeout(TIMEOUT), guest_of(tmp_path / "v") as guest:
            port = await guest.wait_port(nr=1)
            await port.wait_host()
            _, writer = await port.open()
            writer.write(b"before")
            await until_file_says(tmp_path / "out", "before")
            for name in ("out", "log"):
                os.truncate(tmp_path / name, 0)
            writer.write(b"after")
            await until_file_says(tmp_path / "out", "after")
            writer.close()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(TIMEOUT):
            assert await process.wait() == 0
    assert (tmp_path / "out").read_bytes() == b"after"
    text = (tmp_path / "log").read_text()
    assert text.endswith("stopped\n")
    assert "\0" not in text


async def test_a_terminal_that_hangs_up_ends_it_as_sigterm_does(tmp_path: Path) -> None:
    """Its controlling terminal, in the foreground; the log is a file, to read it afterwards."""
    master, slave = pty.openpty()
    arguments = (*NULL_PORT, "--log-file", "log")
    async with started(
        tmp_path,
        *arguments,
        stdin=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as process:
        os.close(slave)
        log = tmp_path / "log"
        async with asyncio.timeout(TIMEOUT):
            await until_file_says(log, "serving;")
            process.send_signal(signal.SIGHUP)  # not the terminal's
            await until_file_says(log, "opened anew")
            os.close(master)
            assert await process.wait() == 0
    assert os.listdir(tmp_path) == ["log"]
    assert log.read_text().endswith("stopped\n")
