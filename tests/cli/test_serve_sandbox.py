"""``vring serve`` in its sandbox, which is the default."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.keeper import kept
from tests.support.served import NULL_PORT, TIMEOUT, Serve, close, connect, guest_of
from vring import _confine

pytestmark = pytest.mark.skipif(
    "VRING_SANDBOX" in os.environ, reason="VRING_SANDBOX says what the sandbox is (make coverage)"
)
WITHOUT_CALLS = Path(__file__).parents[1] / "support" / "without_calls.py"
SOCKET_PORT = ("--chardev", "socket,id=c,path=c,server=on,wait=off", "--port", "chardev=c,name=p")


async def test_host_ends_connect_again_from_within_the_sandbox(
    serve: Serve, tmp_path: Path, unused_tcp_port: int
) -> None:
    """By name, for which the C library reads files and asks whom it likes."""
    tcp = f"socket,id=t,host=localhost,port={unused_tcp_port},reconnect-ms=20"
    unix = "socket,id=u,path=u,reconnect-ms=20"
    ends = ("--chardev", tcp, "--port", "chardev=t", "--chardev", unix, "--port", "chardev=u")
    connected: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await connected.put(writer)

    async with serve(*ends) as server, asyncio.timeout(TIMEOUT):
        await server.logged("sandbox: no-new-privileges")
        listening = (
            await asyncio.start_server(accepted, "localhost", unused_tcp_port),
            await asyncio.start_unix_server(accepted, tmp_path / "u"),
        )
        for listener in listening:
            async with listener:
                for _ in range(2):
                    await close(await connected.get())
        assert await server.stop() == 0


async def test_without_a_sandbox_the_log_says_so(serve: Serve) -> None:
    async with serve(*NULL_PORT, "--sandbox", "off") as server:
        await server.logged("sandbox: off")
        assert await server.stop() == 0


@pytest.mark.parametrize("keeper", ["--no-keeper", "--keeper"])
async def test_what_serves_is_in_the_sandbox(serve: Serve, keeper: str) -> None:
    async with serve(*NULL_PORT, keeper) as server:
        pid = server.pid
        if keeper == "--keeper":
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            pid = int(children[0])
        for task in Path(f"/proc/{pid}/task").iterdir():
            status = (task / "status").read_text()
            assert "NoNewPrivs:\t1" in status
            assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
        assert await server.stop() == 0


async def carries(path: Path) -> None:
    """Have a guest send bytes to the client of its port, and get some back."""
    async with guest_of(path / "v") as guest:
        reader, writer = await connect(path / "c")
        port = await guest.wait_port(name="p")
        await port.wait_host()
        guest_reader, guest_writer = await port.open()
        guest_writer.write(b"to the host")
        assert await reader.readexactly(11) == b"to the host"
        writer.write(b"back")
        assert await guest_reader.readexactly(4) == b"back"
        await close(writer)


@pytest.mark.parametrize(
    ("forbidden", "missing", "left"),
    [
        ("landlock_create_ruleset=ENOSYS", "landlock (not in this kernel", "seccomp (1"),
        ("landlock_create_ruleset=EOPNOTSUPP", "landlock (not in this kernel", "seccomp (1"),
        ("seccomp=ENOSYS", "seccomp (this system takes no filters", "landlock (v"),
        ("seccomp=EPERM", "seccomp (this system takes no filters", "landlock (v"),
        ("", "seccomp (libseccomp.so.2 cannot be loaded)", "landlock (v"),
    ],
)
async def test_layers_that_are_not_to_be_had_are_named_once_and_it_serves(
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forbidden: str,
    missing: str,
    left: str,
) -> None:
    """Old kernels and containers have fewer of them, and so have machines without libseccomp."""
    through = (sys.executable, str(WITHOUT_CALLS), forbidden, "--") if forbidden else ()
    if not forbidden:  # another library has its name
        (tmp_path / "lib").mkdir()
        shutil.copy(_confine.__file__, tmp_path / "lib" / "libseccomp.so.2")
        monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "lib"))
    async with serve(*SOCKET_PORT, through=through) as server:
        line = await server.logged("sandbox: no-new-privileges")
        assert left in line.partition("not to be had")[0]
        assert missing in line.partition("not to be had")[2]
        await carries(tmp_path)
        assert await server.stop() == 0
        assert sum("not to be had" in line for line in server.lines) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only a superuser can become another user")
async def test_every_worker_becomes_the_user_and_the_keeper_does_not(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    async with kept(tmp_path, *SOCKET_PORT, "--user", "nobody", "--pid-file", "pid") as keeper:
        for killed in (False, True):
            if killed:
                await keeper.kill_until_served()
            status = Path(f"/proc/{keeper.worker}/status").read_text()
            assert re.search(r"^Uid:(\t65534){4}$", status, re.MULTILINE)
            assert re.search(r"^Groups:\t65534 $", status, re.MULTILINE)
            assert re.search(r"^CapPrm:\t0+$", status, re.MULTILINE)
            await carries(tmp_path)
        assert Path(f"/proc/{keeper.process.pid}").stat().st_uid == 0
        assert await keeper.stop() == 0
    assert os.listdir(tmp_path) == ["log"]
