"""`vring agent` as a process, on a running `vring serve` and the embedded guest's agent."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.agent_session import VRING, Session
from tests.support.processes import end, end_now, running
from tests.support.waiting import DEADLINE, wait_until
from vring_serial import AgentRouter, Controller, EmbeddedGuest, VhostUserBackend
from vring_serial.agent.guest import GuestAgent

TEXT = "naïve café, 日本語, 🖥\nsecond line"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    session = Session(tmp_path_factory.mktemp("agent"))
    try:
        yield session
    finally:
        session.close()


def test_capabilities(session):
    result = session.run("caps", "--json")
    assert result.returncode == 0, result.stderr
    assert "MONITORS_CONFIG" in json.loads(result.stdout)
    assert "MONITORS_CONFIG" in session.run("caps").stdout.splitlines()


def test_resize(session):
    result = session.run("resize", "1920x1080", "1280x1024+1920+0")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "the guest took 1920x1080+0+0 1280x1024+1920+0\n"


def test_clipboard_both_ways(session):
    """The embedded guest pastes what the host copies, and selects it: PRIMARY is what arrived."""
    with session.agent("clipboard", "set", TEXT) as owner:
        wait_until(
            lambda: session.run("clipboard", "get", "--selection", "primary").stdout == TEXT,
            "the guest pasted the text",
        )
        assert session.interrupt(owner) == ("", "")


def test_paste_once_ends_by_itself_and_files_are_sources(session, tmp_path):
    source = tmp_path / "text"
    source.write_text(TEXT * 1000)
    result = session.run("clipboard", "set", "--file", source, "--paste-once")
    assert (result.returncode, result.stderr) == (0, "")
    output = tmp_path / "output"
    result = session.run("clipboard", "get", "--selection", "primary", "--output", output)
    assert (result.returncode, result.stderr) == (0, "")
    assert output.read_text() == TEXT * 1000


def test_in_the_background_the_guest_knows_of_it_when_the_command_returns(session):
    """The command's output ends as well: nothing behind holds it. The guest pastes and selects."""
    result = session.run("clipboard", "set", "--background", "behind")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    wait_until(
        lambda: session.run("clipboard", "get", "--selection", "primary").stdout == "behind",
        "the guest pasted the text",
    )


def test_what_cannot_begin_in_the_background_fails_in_front(session):
    result = session.run("--timeout", "0.5", "clipboard", "set", "--background", "x", address="no")
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr == "vring: --socket no: No such file or directory\n"


def test_watch_tells_changes(session):
    with session.agent("clipboard", "watch", "--selection", "primary", "--json") as watch:
        session.run("clipboard", "set", "watched", "--paste-once")
        while (change := json.loads(watch.stdout.readline()))["text"] != "watched":
            assert change["selection"] == "primary"
        assert change["types"] == ["text"]


def test_an_empty_clipboard_is_said(session):
    result = session.run("--timeout", "2", "clipboard", "get", "--selection", "secondary")
    assert result.returncode == 4
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_a_type_that_the_clipboard_does_not_hold_is_named(session):
    assert session.run("clipboard", "set", "text", "--paste-once").returncode == 0
    result = session.run(
        *("clipboard", "get", "--selection", "primary", "--type", "png", "--output", "/dev/null")
    )
    assert result.returncode == 4
    assert result.stderr == "vring: the primary clipboard holds no png, only text\n"


def test_files_arrive(session, tmp_path):
    big = tmp_path / "big file.bin"
    big.write_bytes(os.urandom(5 << 20))
    empty = tmp_path / "empty"
    empty.touch()
    result = session.run("send", big, empty)
    assert result.returncode == 0, result.stderr
    assert (session.downloads / "big file.bin").read_bytes() == big.read_bytes()
    assert (session.downloads / "empty").read_bytes() == b""


def test_one_refusal_does_not_stop_the_others(session, tmp_path):
    sparse = tmp_path / "larger than any disk"
    with sparse.open("wb") as file:
        file.truncate(1 << 42)
    fine = tmp_path / "fine"
    fine.write_text("fine")
    result = session.run("send", "--quiet", sparse, fine)
    assert result.returncode == 5
    assert "not enough space" in result.stderr
    assert (session.downloads / "fine").exists(), result.stderr
    assert (session.downloads / "fine").read_text() == "fine"


def test_interrupt_cancels_in_the_guest(session, tmp_path):
    endless = tmp_path / "endless"
    with endless.open("wb") as file:
        file.truncate(8 << 30)
    partial = session.downloads / "endless"

    def under_way() -> bool:
        return any(f.stat().st_size for f in session.downloads.iterdir() if "endless" in f.name)

    with session.agent("send", "--quiet", endless) as sending:
        wait_until(under_way, "the transfer is under way")
        assert session.interrupt(sending) == ("", "cancelled\n")
    wait_until(lambda: not under_way(), "the guest removed the partial file")
    assert not partial.exists()


def test_monitor_decodes(session):
    with session.agent("monitor") as monitor:
        announced = monitor.stdout.readline()
        assert " AnnounceCapabilities (request): " in announced
        assert " MONITORS_CONFIG " in announced
        assert announced.endswith(" FILES_FROM_GUEST\n")
        # What the guest answers is what it had announced.
        assert monitor.stdout.readline().endswith(" AnnounceCapabilities (answer): as before\n")
        owned = session.run("clipboard", "set", "monitored", "--paste-once")
        assert (owned.returncode, owned.stderr) == (0, "")
        grabbed = monitor.stdout.readline()
        assert " ClipboardGrab selection=" in grabbed
        assert " types=[UTF8_TEXT] " in grabbed


def test_monitor_between_a_client_and_the_channel(session, tmp_path):
    path = tmp_path / "between.sock"
    with session.agent("monitor", "--listen", path) as monitor:
        wait_until(path.exists, "the monitor listens")
        command = [*VRING, "agent", "--socket", str(path), "resize", "800x600"]
        subprocess.run(command, check=True, timeout=30, capture_output=True)
        output, _ = session.interrupt(monitor)
    assert "client: port 1 MonitorsConfig monitors=[Monitor width=800 height=600" in output
    assert "flags=USE_POS" in output
    assert "guest: port 1 Reply to=MONITORS_CONFIG error=SUCCESS" in output
    assert not path.exists()


def test_monitor_that_finds_no_descriptor_serves_its_client_later(session, tmp_path):
    path = tmp_path / "between.sock"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with session.agent("monitor", "--listen", path) as monitor:
        wait_until(path.exists, "the monitor listens")
        resource.prlimit(monitor.pid, resource.RLIMIT_NOFILE, (0, hard))
        command = [*VRING, "agent", "--socket", str(path), "--timeout", "30", "resize", "800x600"]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as client:
            try:
                assert "cannot accept a client: Too many open files" in monitor.stderr.readline()
                resource.prlimit(monitor.pid, resource.RLIMIT_NOFILE, (soft, hard))
                assert client.wait(DEADLINE) == 0
            finally:
                end_now(client)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("resize", "10"), "is not a size such as 1920x1080"),
        (("resize", "0x10"), "1 to 32767 pixels"),
        (("resize", "800x600", "800x600"), "a position each"),
        (("resize",), "Missing argument"),
        (("clipboard", "set"), "either TEXT or --file"),
        (("clipboard", "set", "a", "--file", "b"), "either TEXT or --file"),
        (("clipboard", "set", "a", "--type", "files"), "vring agent send"),
        (("clipboard", "set", "--file", "/no/such"), "--file /no/such: No such file"),
        (("send", "/"), "is a directory"),
        (("send", "/no/such"), "No such file"),
    ],
)
def test_usage_errors_are_one_line_and_status_2(session, arguments, why):
    result = session.run(*arguments)
    assert result.returncode == 2
    assert why in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("address", "status", "why"),
    [
        ("/no/such.sock", 3, "No such file"),
        ("localhost:port", 2, "'port' is no TCP port"),
        ("localhost:99999999999", 2, "is no TCP port"),
        ("127.0.0.1:1", 3, "127.0.0.1:1"),
    ],
)
def test_addresses_that_lead_nowhere(address, status, why):
    command = [*VRING, "agent", "--socket", address, "caps"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == status
    assert why in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_channel_that_stays_silent(tmp_path):
    path = tmp_path / "silent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        command = [*VRING, "agent", "--socket", str(path), "--timeout", "0.5", "caps"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 6
    assert f"--socket {path}: no SPICE agent within 0.5 s: it is open but silent" in result.stderr
    assert "or another client has the channel" in result.stderr


async def test_a_channel_that_closes_before_the_agent_answers_ends_the_command_at_once(tmp_path):
    path = tmp_path / "closing.sock"

    async def leave(reader, writer):
        await reader.read(1)
        writer.close()

    async with await asyncio.start_unix_server(leave, path):
        command = [*VRING, "agent", "--socket", str(path), "--timeout", "3600", "caps"]
        result = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=30, check=False
        )
    assert result.returncode == 3
    assert f"--socket {path}: the connection was closed before an agent answered" in result.stderr
    assert "another client" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_backend_that_stays_silent(tmp_path):
    path = tmp_path / "silent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        command = [*VRING, "guest", "--vhost-user", str(path), "--timeout", "0.5", "--list"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.endswith(" in 0.5 s; it probably serves another frontend\n")


async def test_a_guest_says_that_the_device_serves_another_frontend_and_waits_for_it(tmp_path):
    """The backend accepts it once the other one has gone."""
    path = str(tmp_path / "vring.sock")
    async with Controller() as controller, VhostUserBackend(controller, path):
        first = EmbeddedGuest(path, memory=16 << 20)
        await first.start()
        second = await asyncio.create_subprocess_exec(
            *(*VRING, "guest", "--vhost-user", path, "--timeout", "3600", "--list"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(DEADLINE):
                notice = (await second.stderr.readline()).decode()
                assert "it probably serves another frontend; waiting for up to 3600 s" in notice
                await first.aclose()
                table, rest = await second.communicate()
            assert (second.returncode, rest) == (0, b"")
            assert b"host end" in table
        finally:
            await end(second)
            await first.aclose()


def test_agent_socket_needs_one_spicevmc_port(tmp_path):
    command = [*VRING, "serve", "--vhost-user", tmp_path / "v", "--agent-socket", tmp_path / "a"]
    command += ["--chardev", "null,id=n", "--port", "chardev=n"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 2
    assert "for one spicevmc port, and there are 0" in result.stderr


@pytest.mark.parametrize("shared", [False, True])
async def test_files_that_were_copied_in_the_guest(tmp_path, shared):
    """On the channel itself, and on one that is shared."""
    (tmp_path / "copied").write_bytes(os.urandom(3_000_000))
    guest = GuestAgent()
    guest.copy_files([tmp_path / "copied"])
    router = AgentRouter()
    loop = asyncio.get_running_loop()
    path = str(tmp_path / "agent.sock")
    if shared:
        ours, theirs = socket.socketpair()
        await loop.create_connection(router.protocol_factory, sock=ours)
        await loop.create_connection(guest.protocol_factory, sock=theirs)
    factory = router.client_factory if shared else guest.protocol_factory
    server = await loop.create_unix_server(factory, path)

    async def files(*options):
        command = (*VRING, "agent", "--socket", path, "clipboard", "get", "--type", "files")
        async with running(*command, *options, stdout=asyncio.subprocess.PIPE) as process:
            async with asyncio.timeout(30):
                output, _ = await process.communicate()
        assert process.returncode == 0
        return output.decode().splitlines()

    assert await files() == [str(tmp_path / "copied")]
    assert await files("--output", str(tmp_path / "in")) == [str(tmp_path / "in" / "copied")]
    assert (tmp_path / "in" / "copied").read_bytes() == (tmp_path / "copied").read_bytes()
    await router.aclose()
    await guest.aclose()
    server.close()
    await server.wait_closed()
