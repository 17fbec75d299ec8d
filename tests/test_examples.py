"""What the examples say about arguments that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
#: Stands for PyGObject, which not every machine has: arguments are checked before it is used.
GI = "def require_version(namespace, version): pass\n"
REPOSITORY = "Gio = GLib = GObject = SpiceClientGLib = None\n"
HERE = str(EXAMPLES / "spice_send.py")


def run(
    example: str, *arguments: str, modules: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    environment = os.environ | ({"PYTHONPATH": str(modules)} if modules else {})
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=False, env=environment
    )


@pytest.fixture
def gi(tmp_path: Path) -> Path:
    package = tmp_path / "modules" / "gi"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(GI)
    (package / "repository.py").write_text(REPOSITORY)
    return package.parent


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--port", "1", "--password-file", "/no/such", HERE), "/no/such: No such file"),
        (("--port", "1", "--password-file", "/", HERE), "/: Is a directory"),
        (("--port", "1", "--password-file", sys.executable, HERE), "it is not text"),
        (("--port", "1", "/no/such"), "/no/such: there is no such file"),
        (("--port", "spice", HERE), "--port: invalid port_number value: 'spice'"),
        (("--port", "65536", HERE), "--port: invalid port_number value: '65536'"),
    ],
)
def test_spice_send_names_the_argument(gi: Path, arguments: tuple[str, ...], why: str) -> None:
    result = run("spice_send.py", *arguments, modules=gi)
    assert result.returncode == 2
    assert why in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_spice_send_names_the_packages_that_it_needs(gi: Path) -> None:
    (gi / "gi" / "__init__.py").write_text("raise ImportError('no gi here')\n")
    result = run("spice_send.py", "--port", "1", HERE, modules=gi)
    assert result.returncode == 1
    assert result.stderr == (
        "spice_send: no gi here: install python3-gi and gir1.2-spiceclientglib-2.0\n"
    )


@pytest.mark.parametrize("way", ["--vfio-user", "--vhost-user"])
@pytest.mark.parametrize("path", ["", "/no/such/socket", "x" * 200])
def test_custom_device_names_the_path_that_it_cannot_use(way: str, path: str) -> None:
    result = run("custom_device.py", way, path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("custom_device: ")
    assert "Traceback" not in result.stderr
