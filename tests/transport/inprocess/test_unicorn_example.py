"""The example with an emulator around the device, as its reader runs it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.support.examples import EXAMPLES

EXAMPLE = EXAMPLES / "unicorn" / "run.py"


@pytest.mark.peer("gcc")
def test_the_guest_in_the_emulator_speaks_with_the_host():
    if importlib.util.find_spec("unicorn") is None:
        assert not os.environ.get("CI"), "the Unicorn emulator is not installed"
        pytest.skip("the Unicorn emulator is not installed: pip install unicorn")
    result = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stderr == ""
    assert result.returncode == 0
    assert result.stdout.splitlines() == [
        "guest: virtio console in slot 5",
        "guest: found the agent's port",
        "host:  the guest's agent is there",
        "guest: resolution 1920x1080",
        "host:  it has taken the resolution",
        'guest: the host copied "hello from the host"',
        'host:  the guest copied "HELLO FROM THE HOST"',
    ]
