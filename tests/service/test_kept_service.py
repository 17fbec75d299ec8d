"""`vring serve` with its keeper as operators meet it: signals, files, errors, deaths in a row."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.keeper import kept
from tests.support.waiting import until, until_file_says, wait_until
from vring_serial import EmbeddedGuest

NULL_PORT = ("--chardev", "null,id=n", "--port", "chardev=n,nr=1")
SOCKET_PORT = ("--chardev", "socket,id=c,path=c,server=on,wait=off", "--port", "chardev=c,nr=1")


def guest():
    return EmbeddedGuest("v", memory=32 << 20)


async def opened(port):
    await port.wait_host()
    return await port.open()


@pytest.fixture(autouse=True)
def short_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def failing(*arguments):
    """The status and the output of a service that does not begin."""
    done = subprocess.run(
        [sys.executable, "-m", "vring_serial", "serve", *arguments],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


async def test_a_worker_that_dies_again_and_again_ends_the_session_and_the_next_is_served(tmp_path):
    async with kept(tmp_path, *SOCKET_PORT) as keeper:
        async with guest() as first:
            port = await first.wait_port(nr=1)
            client, writer = await asyncio.open_unix_connection("c")
            _, back = await opened(port)
            await keeper.kill_until_anew()
            await keeper.logged("5 times in 10 s; its sessions end here")
            assert await client.read() == b""
            writer.close()
            back.close()
        async with guest() as second:
            port = await second.wait_port(nr=1)
            _, writer = await asyncio.open_unix_connection("c")
            reader, back = await opened(port)
            writer.write(b"again")
            assert await reader.readexactly(5) == b"again"
            writer.close()
            back.close()
        assert await keeper.stop() == 0
    assert sorted(os.listdir()) == ["log"]


async def test_workers_that_never_serve_begin_anew(tmp_path):
    """What a successor finds may be what it cannot even begin with."""
    async with kept(tmp_path, *SOCKET_PORT) as keeper:
        journal = next(
            fd
            for fd in Path(f"/proc/{keeper.process.pid}/fd").iterdir()
            if "vring-journal" in os.readlink(fd)
        )
        with journal.open("r+b") as file:
            file.write(b"X")
        os.kill(keeper.worker, signal.SIGKILL)
        await keeper.logged("the journal does not begin as one", 4)
        await keeper.logged("its sessions end here, and another one begins anew")
        await keeper.logged("serving;", 2)
        async with guest() as next_one:
            await next_one.wait_port(nr=1)
        assert await keeper.stop() == 0


async def test_a_keeper_that_is_killed_leaves_its_worker_serving(tmp_path):
    path = str(tmp_path / "v")
    async with kept(tmp_path, *SOCKET_PORT, socket=path) as keeper, guest() as vm:
        port = await vm.wait_port(nr=1)
        worker = keeper.worker
        keeper.process.kill()
        await keeper.logged("the keeper has ended; this process serves on")
        for number, said in enumerate((b"one", b"two"), 1):  # clients come and go as before
            _, writer = await asyncio.open_unix_connection("c")
            reader, back = await opened(port)
            writer.write(said)
            assert await reader.readexactly(3) == said
            writer.close()
            assert await reader.read() == b""
            back.close()
            # Else what the next one sends may go to the guest that closes.
            await keeper.logged("closed by the guest", number)
        status, text = failing("--vhost-user", path, "--log-level", "error", *NULL_PORT)
        assert status == 1
        assert text == f"vring: {path}: exists, another process listens on it (process {worker})\n"
        os.kill(worker, signal.SIGTERM)
        await until(lambda: not (os.path.exists("v") or os.path.exists("c")))
    assert keeper.log.count("the keeper has ended") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_stops_while_a_worker_is_replaced(tmp_path, number):
    """The successor begins, only to remove what its predecessor had made."""
    async with kept(tmp_path, *SOCKET_PORT) as keeper:
        os.kill(keeper.worker, signal.SIGKILL)
        assert await keeper.stop(number) == 0
    assert sorted(os.listdir()) == ["log"]


async def test_an_interrupt_of_the_whole_group_stops_it_in_order(tmp_path):
    """Ctrl-C: the terminal tells keeper and worker, and the keeper the worker once more."""
    async with kept(tmp_path, *SOCKET_PORT) as keeper:
        os.killpg(keeper.process.pid, signal.SIGINT)
        assert await keeper.process.wait() == 0
    assert sorted(os.listdir()) == ["log"]
    assert "stopped" in keeper.log


async def test_a_second_signal_kills_a_worker_that_does_not_stop(tmp_path):
    async with kept(tmp_path, *NULL_PORT) as keeper:
        worker = keeper.worker
        os.kill(worker, signal.SIGSTOP)
        keeper.process.send_signal(signal.SIGINT)
        keeper.process.send_signal(signal.SIGTERM)
        # Two signals, two bytes: they are taken in one turn or in two.
        assert await keeper.process.wait() == 1
        assert not os.path.exists(f"/proc/{worker}")


async def test_the_pid_file_is_the_keepers_and_outlives_workers(tmp_path):
    async with kept(tmp_path, *NULL_PORT, "--pid-file", "pid") as keeper:
        await keeper.kill_until_served()
        assert int(Path("pid").read_text()) == keeper.process.pid
        status, text = failing("--vhost-user", "w", *NULL_PORT, "--pid-file", "pid")
        assert (status, text.count("\n")) == (1, 1)
        assert f"process {keeper.process.pid} is running" in text
        assert await keeper.stop() == 0
    assert not os.path.exists("pid")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_keeper_listens_removes_the_pid_file(number):
    """It comes when the file is there already: whoever waits for that may stop the service."""
    program = (
        "import os, signal, sys\n"
        "from vring_serial.cli import main\n"
        "from vring_serial.service.keeper import Keeper\n"
        "run = Keeper.run\n"
        "def told(keeper):\n"
        "    assert os.path.exists('pid')\n"
        "    os.kill(os.getpid(), int(os.environ['NUMBER']))\n"
        "    return run(keeper)\n"
        "Keeper.run = told\n"
        "main()\n"
    )
    pid_file = ("--pid-file", "pid")
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", "--vhost-user", "v", *NULL_PORT, *pid_file],
        env=os.environ | {"NUMBER": str(int(number))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, os.listdir()) == (0, []), done.stderr


async def test_a_hangup_opens_logs_and_files_anew(tmp_path):
    chardev = ("--chardev", "file,id=f,path=out", "--port", "chardev=f,nr=1")
    async with kept(tmp_path, *chardev, "--log-file", "service.log", ready="") as keeper:
        await until_file_says(tmp_path / "service.log", "serving;")
        for number in (1, 2):
            for name in ("out", "service.log"):
                os.rename(name, f"{name}.{number}")
            keeper.process.send_signal(signal.SIGHUP)
            await until_file_says(tmp_path / "service.log", "files were opened anew")
            assert os.path.exists("out")
            os.kill(keeper.worker, signal.SIGKILL)
            await until_file_says(tmp_path / "service.log", "serving;")
        async with guest() as vm:
            port = await vm.wait_port(nr=1)
            _, writer = await port.open()
            writer.write(b"to the newest")
            await until_file_says(tmp_path / "out", "to the newest")
            writer.close()
        assert await keeper.stop() == 0
    assert "another one goes on" in Path("service.log").read_text()
    assert keeper.log == ""


async def test_json_has_the_deaths_too(tmp_path):
    async with kept(tmp_path, *NULL_PORT, "--json-log") as keeper:
        await keeper.kill_until_served()
        assert await keeper.stop() == 0
    events = [json.loads(line) for line in keeper.log.splitlines()]
    ended = [event for event in events if event["event"] == "worker_ended"]
    assert [(event["worker"], event["restarts"]) for event in ended] == [("vring", 1)]


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (("--chardev", "file,id=f,path=none/out", "--port", "chardev=f"), 1, "No such file"),
        (("--chardev", "spiceport,id=s,name=x", "--port", "chardev=s"), 2, "SPICE"),
        ((*NULL_PORT, "--max-ports", "128"), 2, "258 queues, vhost-user allows 256"),
        ((*NULL_PORT, "--log-file", "none/log"), 1, "No such file"),
    ],
)
def test_errors_before_it_serves_are_those_without_a_keeper(arguments, status, why):
    arguments = ("--vhost-user", "v", "--log-level", "error", *arguments)
    plain = failing("--no-keeper", *arguments)
    assert plain[0] == status
    assert why in plain[1]
    assert failing(*arguments) == plain
    assert os.listdir() == []


def test_a_socket_in_use_is_told_with_who_has_it():
    path = os.path.abspath("v")
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(path)
        taken.listen()
        status, text = failing("--log-level", "error", "--vhost-user", path, *NULL_PORT)
    assert status == 1
    assert text == f"vring: {path}: exists, another process listens on it (process {os.getpid()})\n"


async def test_nohup_holds_for_the_worker(tmp_path):
    """A SIGHUP that was ignored is no terminal's hang-up for the worker either."""
    chance = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    async with kept(tmp_path, *NULL_PORT, preexec_fn=chance) as keeper:
        await keeper.kill_until_served()
        os.killpg(keeper.process.pid, signal.SIGHUP)
        await keeper.logged("files were opened anew")
        assert await keeper.stop() == 0


def test_a_log_that_nobody_reads_is_no_reason_not_to_begin():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while os.write(writing, b"x" * 4096):
            pass
    except BlockingIOError:
        os.set_blocking(writing, True)
    domain = """<domain><devices><controller type='virtio-serial' index='0' ports='8' vectors='4'/>
        <channel type='null'><target type='virtio' name='a'/></channel></devices></domain>"""
    Path("domain.xml").write_text(domain)  # vectors= is warned of
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "vring_serial", "serve"),
            *("--vhost-user", "v", "--domain", "domain.xml"),
        ],
        stderr=writing,
        start_new_session=True,
    )
    try:
        wait_until(lambda: os.path.exists("v"))
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        os.close(writing)


async def test_a_worker_is_rather_killed_for_memory_than_its_keeper(tmp_path):
    async with kept(tmp_path, *NULL_PORT) as keeper:
        for _ in range(2):
            scores = [
                int(Path(f"/proc/{pid}/oom_score_adj").read_text())
                for pid in (keeper.process.pid, keeper.worker)
            ]
            assert scores[1] == min(scores[0] + 100, 1000)
            await keeper.kill_until_served()


def little(count):
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


async def test_more_descriptors_than_can_be_kept_are_told_once(tmp_path):
    async with kept(tmp_path, *SOCKET_PORT, preexec_fn=little(68)) as keeper:
        clients = [await asyncio.open_unix_connection("c") for _ in range(8)]
        await keeper.logged("more descriptors than can be kept")
        await asyncio.sleep(0)
        assert keeper.log.count("more descriptors than can be kept") == 1
        for _, writer in clients:
            writer.close()
        assert await keeper.stop() == 0


async def test_a_keeper_at_rest_has_one_thread_and_does_nothing(tmp_path):
    async with kept(tmp_path, *SOCKET_PORT) as keeper, guest() as vm:
        port = await vm.wait_port(nr=1)
        _, writer = await asyncio.open_unix_connection("c")
        reader, back = await opened(port)
        status = Path(f"/proc/{keeper.process.pid}/status")

        def switches():
            lines = status.read_text().splitlines()
            return [line for line in lines if line.startswith(("voluntary", "Threads"))]

        before = switches()
        assert before[0].split() == ["Threads:", "1"]
        for _ in range(100):  # bytes pass it by
            writer.write(b"x" * 1000)
            await reader.readexactly(1000)
        assert switches() == before
        writer.close()
        back.close()
