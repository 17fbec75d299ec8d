"""The example with an emulator around the device, as its reader runs it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.examples import EXAMPLES

EXAMPLE = EXAMPLES / "unicorn" / "run.py"


pytestmark = pytest.mark.peer("gcc")


@pytest.fixture(autouse=True)
def unicorn() -> None:
    if importlib.util.find_spec("unicorn") is None:
        assert not os.environ.get("CI"), "the Unicorn emulator is not installed"
        pytest.skip("the Unicorn emulator is not installed: pip install unicorn")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def lines(*arguments: object) -> list[str]:
    result = run(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def test_the_guest_in_the_emulator_speaks_with_the_host() -> None:
    assert lines() == [
        "guest: virtio console in slot 5",
        "guest: found the agent's port",
        "host:  the guest's agent is there",
        "guest: resolution 1920x1080",
        "host:  it has taken the resolution",
        'guest: the host copied "hello from the host"',
        'host:  the guest copied "HELLO FROM THE HOST"',
    ]


def test_it_is_saved_in_the_middle_of_a_message_and_another_process_goes_on(
    tmp_path: Path,
) -> None:
    snapshot = tmp_path / "snapshot"
    assert lines("--save", snapshot)[-1] == "host:  saved in the middle of a message"
    text = "hello from the host, " * 60
    assert lines("--restore", snapshot) == [
        f'guest: the host copied "{text}"',
        f'host:  the guest copied "{text.upper()}"',
    ]


@pytest.mark.parametrize("part", ["the machine", "the device"])
def test_a_snapshot_that_is_torn_is_named(tmp_path: Path, part: str) -> None:
    snapshot = tmp_path / "snapshot"
    lines("--save", snapshot)
    saved = snapshot.read_bytes()
    at = 10 if part == "the machine" else saved.index(b"VRINGST") + 30
    snapshot.write_bytes(saved[:at] + b"?" + saved[at + 1 :])
    result = run("--restore", snapshot)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    why = "no snapshot of this machine" if part == "the machine" else "it is torn"
    assert why in line
