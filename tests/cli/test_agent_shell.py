"""`vring agent shell` as a process: one connection for many commands, and its statuses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.agent_session import VRING, Session
from tests.support.processes import end_now, running
from tests.support.waiting import DEADLINE, wait_until
from vring_serial.agent.guest import GuestAgent


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    session = Session(tmp_path_factory.mktemp("agent"))
    try:
        yield session
    finally:
        session.close()


def script(session, text, *options):
    """Run a script that comes on standard input."""
    return session.run("shell", *options, input=text)


def test_a_script_runs_the_commands_in_order(session, tmp_path):
    file = tmp_path / "a file"
    file.write_text("content")
    (tmp_path / "script").write_text(
        "# monitors first\n"
        "\n"
        "resize 1920x1080\n"
        'clipboard set --paste-once "hello, guest"\n'
        "clipboard get --selection primary\n"
        f"send --quiet '{file}'\n"
        "exit\n"
        "never this\n"
    )
    result = session.run("shell", "--script", tmp_path / "script")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "the guest took 1920x1080+0+0\nhello, guest"
    assert (session.downloads / "a file").read_text() == "content"


def test_all_of_it_is_one_connection(session, tmp_path):
    between = tmp_path / "between.sock"
    with session.agent("monitor", "--json", "--listen", between) as monitor:
        wait_until(between.exists, "the monitor listens")
        result = session.run("shell", address=str(between), input="caps\nresize 800x600\ncaps\n")
        assert (result.returncode, result.stderr) == (0, "")
        output, _ = session.interrupt(monitor)
    seen = [json.loads(line) for line in output.splitlines()]
    requests = [one for one in seen if "AnnounceCapabilities (request)" in one["message"]]
    assert [one["from"] for one in requests if one["from"] == "client"] == ["client"]
    assert sum("MonitorsConfig" in one["message"] for one in seen) == 1


def test_the_guest_pastes_what_was_offered_behind(session):
    """What --background offers is there while the shell is, and gone behind it."""
    with session.agent("shell", stdin=subprocess.PIPE) as shell:
        shell.stdin.write("clipboard set --background kept\n")
        shell.stdin.flush()
        wait_until(
            lambda: session.run("clipboard", "get", "--selection", "primary").stdout == "kept",
            "the guest pasted the text",
        )
        assert shell.communicate("caps --json\n", timeout=DEADLINE)[1] == ""
        assert shell.returncode == 0


@pytest.mark.parametrize(
    ("line", "status", "why"),
    [
        ("rezise 800x600", 2, "No such command 'rezise'; did you mean resize?"),
        ("resize 10", 2, "'10' is not a size such as 1920x1080"),
        ("resize", 2, "Missing argument"),
        ("clipboard", 2, "Missing command."),
        ("clipboard set 'open", 2, "No closing quotation"),
        ("clipboard set --file -", 2, "the shell itself reads standard input"),
        ("send /no/such", 2, "/no/such: No such file"),
        ("monitor", 2, "monitor has a connection of its own: run it outside the shell"),
        ("clipboard get --selection secondary", 4, "the other end owns no such clipboard"),
        ("caps \x1b[2J", 2, "Got unexpected extra argument"),
    ],
)
def test_a_failure_names_the_line_and_ends_the_script(session, line, status, why):
    result = script(session, f"caps\n\n{line}\nresize 1x1\n")
    assert result.returncode == status
    assert result.stderr.startswith("standard input, line 3: ")
    assert why in result.stderr
    assert result.stderr.count("\n") == 1
    assert "\x1b" not in result.stderr
    assert "the guest took" not in result.stdout


def test_a_script_may_go_on_and_ends_with_the_first_failure(session, tmp_path):
    path = tmp_path / "script"
    path.write_bytes(b"clipboard get --selection secondary\nresize\n\xff\nresize 640x480\n")
    result = session.run("shell", "--keep-going", "--json", "--script", path)
    assert result.returncode == 4
    assert [line.split(": ")[0] for line in result.stderr.splitlines()] == [
        f"{path}, line {number}" for number in (1, 2, 3)
    ]
    assert "it is no UTF-8" in result.stderr
    size = {"width": 640, "height": 480, "x": 0, "y": 0}
    assert json.loads(result.stdout) == {"monitors": [size]}


def test_a_line_without_end_is_refused(session):
    result = script(session, "#" * (2 << 20), "--keep-going")
    assert result.returncode == 2
    assert result.stderr == "standard input, line 1: longer than 1048576 bytes\n"


def test_a_script_that_is_not_there(session):
    result = session.run("shell", "--script", "/no/such")
    assert result.returncode == 2
    assert result.stderr == "vring: --script /no/such: No such file or directory\n"


def test_every_command_prints_json(session, tmp_path):
    file = tmp_path / "file"
    file.write_text("content")
    sparse = tmp_path / "larger than any disk"
    with sparse.open("wb") as large:
        large.truncate(1 << 42)
    output = tmp_path / "output"
    commands = (
        ("caps",),
        ("clipboard", "set", "--paste-once", "text"),
        ("clipboard", "get", "--selection", "primary"),
        ("clipboard", "get", "--selection", "primary", "--output", output),
        ("send", file),
        ("send", sparse),
    )
    said = [session.run("--json", *command) for command in commands]
    assert [one.returncode for one in said] == [0, 0, 0, 0, 0, 5]
    told = [[json.loads(line) for line in one.stdout.splitlines()] for one in said]
    assert "MONITORS_CONFIG" in told[0][0]
    assert [one["event"] for one in told[1]] == ["offered", "pasted"]
    which = {"selection": "primary", "type": "text"}
    assert told[2] == [{**which, "text": "text"}]
    assert told[3] == [{**which, "output": str(output), "bytes": 4}]
    assert told[4] == [{"file": str(file), "sent": True}]
    assert (told[5][0]["sent"], told[5][0]["status"]) == (False, 5)
    assert "not enough space" in told[5][0]["error"]
    both = session.run("send", "--quiet", sparse, file)
    assert both.returncode == 5


def test_an_interrupt_ends_the_script_and_what_it_sends(session, tmp_path):
    endless = tmp_path / "endless"
    with endless.open("wb") as file:
        file.truncate(8 << 30)

    def under_way():
        return any(
            "endless" in one.name and one.stat().st_size for one in session.downloads.iterdir()
        )

    for number in (signal.SIGINT, signal.SIGTERM):
        with session.agent("shell", "--keep-going", stdin=subprocess.PIPE) as shell:
            shell.stdin.write(f"send --quiet '{endless}'\nresize 1x1\n")
            shell.stdin.flush()
            wait_until(under_way, "the transfer is under way")
            shell.send_signal(number)
            out, err = shell.communicate(timeout=DEADLINE)
            assert (shell.returncode, out, err) == (130, "", "cancelled\n")
        wait_until(lambda: not under_way(), "the guest removed the partial file")


def test_an_agent_that_restarts(tmp_path):
    """What was under way fails with status 3; the next command waits for the next agent."""
    session = Session(tmp_path)
    try:
        endless = tmp_path / "endless"
        with endless.open("wb") as file:
            file.truncate(8 << 30)
        with session.agent(
            "--timeout", "60", "shell", "--keep-going", stdin=subprocess.PIPE
        ) as shell:
            shell.stdin.write(f"resize 800x600\nsend --quiet '{endless}'\nresize 640x480\n")
            shell.stdin.flush()
            wait_until(
                lambda: any("endless" in one.name for one in session.downloads.iterdir()),
                "the transfer is under way",
            )
            end_now(session.processes.pop())
            session.start_guest()
            out, err = shell.communicate(timeout=2 * DEADLINE)
        assert shell.returncode == 3
        assert out == "the guest took 800x600+0+0\nthe guest took 640x480+0+0\n"
        assert err.startswith("standard input, line 2: ")
        assert err.count("\n") == 1
    finally:
        session.close()


async def test_a_channel_that_was_closed_is_opened_again(tmp_path):
    path = tmp_path / "agent.sock"

    async def watched(agent, text):
        """Have the shell watch the clipboard of an agent until it has seen this text there."""
        shell.stdin.write(b"clipboard watch\n")
        agent.set_clipboard(text)
        while text.encode() not in await shell.stdout.readline():
            pass

    async with contextlib.AsyncExitStack() as stack:

        async def serving():
            """An agent at ``path``, and a function that closes all that is there."""
            agent = GuestAgent()
            stack.push_async_callback(agent.aclose)
            links = []

            def link():
                links.append(agent.protocol_factory())
                return links[-1]

            server = await asyncio.get_running_loop().create_unix_server(link, path)
            stack.callback(server.close)

            def leave():
                server.close()
                for each in links:
                    each.close()

            return agent, leave

        first, first_leaves = await serving()
        command = (*VRING, "agent", "--socket", path, "shell", "--keep-going")
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        shell = await stack.enter_async_context(running(*command, **pipes))
        async with asyncio.timeout(DEADLINE):
            await watched(first, "one")
            path.unlink()
            second, second_leaves = await serving()
            first_leaves()
            assert b"line 1: the agent went away" in await shell.stderr.readline()
            await watched(second, "two")
            assert await shell.stderr.readline() == b"the channel was closed: connected again\n"
            # With nobody there, there is one clear error.
            path.unlink()
            second_leaves()
            out, err = await shell.communicate(b"resize 640x480\n")
        assert shell.returncode == 3
        assert b"the guest took" not in out
        assert err.decode().splitlines() == [
            "standard input, line 2: the agent went away",
            f"standard input, line 3: --socket {path}: No such file or directory",
        ]


def test_statuses_of_a_shell_that_cannot_begin(tmp_path):
    for address, status in (("/no/such.sock", 3), ("localhost:port", 2)):
        command = [*VRING, "agent", "--socket", address, "shell"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert (result.returncode, result.stdout) == (status, "")
        assert result.stderr.count("\n") == 1
